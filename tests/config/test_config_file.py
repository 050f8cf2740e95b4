"""How a config is read: words as they stand, no key twice, bounded time, and advice that is
right.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from dlora.config.cloud import CloudConfig
from dlora.config.other_keys import ADVICE, OF_A_CLOUD, OF_A_RUN
from dlora.config.reading import paths_of
from dlora.config.run import Config
from dlora.config.yaml_file import MAX_CHARACTERS
from dlora.errors import ConfigError, IdentityError
from dlora.identity.federation import Federation, federation_text
from dlora.identity.keys import new_identity

BASE = "model: m\ndata: {train: a.jsonl, eval: b.jsonl}\n"
BILLIONS = "".join(
    f"{here}: &{here} [{', '.join([f'*{there}'] * 9)}]\n"
    for there, here in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = BILLIONS.replace("[", "{<<: [").replace("]", "]}")


def load(tmp_path: Path, text: str | bytes) -> Config:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Config.load(path)


def refused(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BASE + "seed: 1\nseed: 2\n", "a key stands twice: seed, in line 3 and in line 4"),
        (
            BASE + "train:\n  rounds: 3\n  local_steps: 1\n  rounds: 4\n",
            "rounds, in line 4 and in line 6",
        ),
        (BASE + "train: {rounds: 3, rounds: 4}\n", "rounds, in line 3; keep one of them"),
        (BASE + "lora:\n  r: 3\n'lora': {r: 4}\n", "lora, in line 3 and in line 5"),
    ],
)
def test_a_key_that_stands_twice(tmp_path: Path, text: str, said: str) -> None:
    """Field case 12: both lines are named; the later value does not win."""
    assert said in refused(tmp_path, text)


def test_a_key_that_stands_twice_in_a_federation_or_member_file(tmp_path: Path) -> None:
    """Field case 12."""
    path = tmp_path / "federation.yaml"
    path.write_text("members:\n- name: a\n  role: peer\n  name: b\n")
    with pytest.raises(IdentityError, match="a key stands twice: name, in line 2 and in line 4"):
        Federation.load(path)
    path.write_text("name: a\nrole: peer\nrole: cloud\n")
    with pytest.raises(IdentityError, match="a key stands twice: role, in line 2 and in line 3"):
        Federation.load(path)


def test_a_key_of_a_merged_block_may_be_said_again(tmp_path: Path) -> None:
    """Field case 12: what `<<` brings gives way, as YAML has it; this is no key that stands
    twice.
    """
    config = load(
        tmp_path,
        "lora: &shape {r: 4}\n" + BASE + "train: {<<: {rounds: 3, local_steps: 2}, rounds: 5}\n",
    )
    assert (config.lora.r, config.train.rounds, config.train.local_steps) == (4, 5, 2)


def test_words_and_numbers_are_read_as_they_stand(tmp_path: Path) -> None:
    """Field case 22: `no` is Norway; 010, 1_0 and 1:30 are no other numbers; where a number is due,
    all are read as one.
    """
    config = load(
        tmp_path,
        "model: m\ndata: {train: a, eval: b, labels: [no, yes, on, 010, 1_0, 0, 12]}\npeers:"
        " {members: [no, se, dk]}\noutput_dir: 2024-01-31\nlora: {train_head: no, lora_dropout:"
        " .5}\ntrain: {learning_rate: 1e-3, weight_decay: 2.e-1, rounds: 1e3, max_grad_norm:"
        " null}\n",
    )
    assert config.data.labels == ("no", "yes", "on", "010", "1_0", "0", "12")
    assert config.peers.members == ("no", "se", "dk") and config.output_dir == "2024-01-31"
    assert (config.lora.train_head, config.lora.lora_dropout, config.train.rounds) == (
        False,
        0.5,
        1000,
    )
    assert (config.train.learning_rate, config.train.weight_decay, config.train.max_grad_norm) == (
        1e-3,
        0.2,
        None,
    )
    assert load(tmp_path, config.dump()) == config


@pytest.mark.parametrize(
    ("member", "said"),
    [
        ("true", "YAML reads this as true"),
        ("1.10", "the number 1.1"),
        ("12e5", "the number 1200000.0"),
    ],
)
def test_what_yaml_reads_otherwise_is_named(tmp_path: Path, member: str, said: str) -> None:
    """Field case 22: a name or label that YAML takes for something else needs quotes, and the
    message says so.
    """
    for text in (f"peers: {{members: [{member}, b]}}\n", f"output_dir: {member}\n"):
        message = refused(tmp_path, BASE + text)
        assert said in message and "put the text in quotes" in message
    assert load(tmp_path, BASE + f"peers: {{members: ['{member}', b]}}\n").peers.members == (
        member,
        "b",
    )


BOMBS = {
    "an alias of itself": (
        BASE + "lora: &a\n  b: *a\n",
        "an alias stands for a block that holds it",
    ),
    "an alias of itself in a list": (
        BASE + "lora: &a [*a]\n",
        "an alias stands for a block that holds it",
    ),
    "a billion laughs": (
        BASE + "a: &a [x, x, x, x, x, x, x, x, x]\n" + BILLIONS,
        "more than 100,000 values",
    ),
    "a billion merges": (BASE + "a: &a {x: 1}\n" + MERGES, "more than 100,000 values"),
    "lists 3,000 deep": (BASE + "lora: " + "[" * 3000 + "]" * 3000, "more than 50 deep"),
    "blocks 3,000 deep": (BASE + "lora: " + "{a: " * 3000 + "}" * 3000, "more than 50 deep"),
    "blocks deep by aliases": (
        BASE
        + "a0: &a0 1\n"
        + "".join(f"a{n + 1}: &a{n + 1} {'[' * 40}*a{n}{']' * 40}\n" for n in range(60)),
        "blocks more than 50 deep",
    ),
    "a number of 5,000 digits": (BASE + "seed: " + "9" * 5000, "a number has 5,000 digits"),
    "a text of 5,000 digits": (BASE + "seed: '" + "9" * 5000 + "'", "(5,002 characters)"),
    "a seed beyond 64 bits": (BASE + "seed: '" + "9" * 30 + "'", "less than 9223372036854775808"),
    "a key of 5,000 letters": (BASE + "x" * 5000 + ": 1", "is not YAML"),
    "2 MB": (BASE + "#" + "x" * 2 * MAX_CHARACTERS, "more than 1,048,576 characters"),
    "a list of many": (BASE + "seed: [" + "1," * 5000 + "]", "(15,000 characters)"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_config_that_grows_without_end(tmp_path: Path, name: str) -> None:
    """Field case 38: one line, and soon."""
    text, said = BOMBS[name]
    began = time.monotonic()
    assert said in refused(tmp_path, text)
    assert time.monotonic() - began < 30


def test_an_override_is_bounded_too(tmp_path: Path) -> None:
    """Field case 38."""
    (tmp_path / "run.yaml").write_text(BASE)
    for value, said in (
        ("[" * 3000, "more than 50 deep"),
        ("9" * 5000, "a number has 5,000 digits"),
        ("&a [*a]", "an alias"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            Config.load(tmp_path / "run.yaml", [f"seed={value}"])
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_many_mistakes_are_not_many_lines(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        BASE + "".join(f"key{number}: 1\n" for number in range(1000))
    )
    with pytest.raises(ConfigError, match="and 980 more mistakes$") as caught:
        Config.load(tmp_path / "run.yaml")
    assert len(str(caught.value).splitlines()) == 21


@pytest.mark.parametrize(
    "name",
    [
        "../../../X",
        "/tmp/X",
        "a/b",
        "..",
        ".hidden",
        "",
        " ",
        "a b",
        "a\\b",
        "a\n",
        "x" * 81,
        "\U0001f600",
    ],
)
def test_a_member_names_a_folder_here_and_nowhere_else(name: str) -> None:
    """Field case 35: wherever names come from, none leads out of output_dir."""
    tree = {
        "model": "m",
        "data": {"train": "a", "eval": "b"},
        "peers": {"members": ["north", name]},
    }
    with pytest.raises(ConfigError, match="^peers: members: .* cannot name a folder; use letters"):
        Config.parse(tree)
    files = {"train": {"north": "a", name: "b"}, "eval": "b", "partition": {"kind": "files"}}
    with pytest.raises(
        ConfigError, match="^data: train: the peer .* cannot name a folder; use letters"
    ):
        Config.parse({"model": "m", "data": files})


def test_members_that_are_one_folder(tmp_path: Path) -> None:
    """Field case 35."""
    said = refused(tmp_path, BASE + "peers: {members: [North, north]}\n")
    assert "'north' and 'North' are the same as folder names" in said
    assert "members names nobody" in refused(tmp_path, BASE + "peers: {members: []}\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_steps: 5", "`train.rounds` times `train.local_steps`"),
        ("train: {max_steps: 5}", "`train.rounds` times `train.local_steps`"),
        ("train: {num_train_epochs: 5}", "`train.local_epochs` and `train.rounds`"),
        ("attn_implementation: sdpa", "there is no such choice"),
        ("learning_rate: 1", "did you mean train.learning_rate?"),
        ("lora: {max_length: 3}", "did you mean data.max_length?"),
        ("peers: {seed: 3}", "did you mean peers.topology.seed or seed?"),
        ("train: {learningrate: 3}", "did you mean learning_rate?"),
    ],
)
def test_advice_for_an_unknown_key(tmp_path: Path, line: str, said: str) -> None:
    assert said in refused(tmp_path, BASE + line)


def test_advice_for_packing(tmp_path: Path) -> None:
    assert "rows are never packed together" in refused(
        tmp_path, "model: m\ndata: {train: a, eval: b, packing: true}\n"
    )


def test_advice_names_keys_that_are_there() -> None:
    known = paths_of(Config)
    named = {key for advice in ADVICE.values() for key in re.findall(r"`([^`]+)`", advice)}
    assert named - set(known) == set()
    assert {key for key in ADVICE if key in {path.split(".")[-1] for path in known}} == set()


@pytest.mark.parametrize("document", [Config, CloudConfig])
def test_every_key_has_a_path(document: type[Config | CloudConfig]) -> None:
    assert {"model", "quantization"} <= set(paths_of(document))


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    """Held well: a config as Windows writes it."""
    assert load(tmp_path, ("\ufeff" + BASE + "seed: 3\n").replace("\n", "\r\n").encode()).seed == 3


def test_utf_16_is_refused(tmp_path: Path) -> None:
    """Held well: a config in UTF-16."""
    for encoding in ("utf-16", "utf-16-le"):
        message = refused(tmp_path, BASE.encode(encoding))
        assert "UTF-8" in message or "is not YAML" in message


def test_a_path_that_cannot_be() -> None:
    """Field case 11: the same for every path; this one is the config's own."""
    for path in ("x" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            Config.load(path)


def test_a_federation_file_as_windows_writes_it(tmp_path: Path) -> None:
    """Held well: a byte order mark and CRLF in member and federation files."""
    _, member = new_identity("north", "north.example.org:7000", "peer", tmp_path)
    text = federation_text([member])
    (tmp_path / "federation.yaml").write_bytes(
        b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    )
    assert Federation.load(tmp_path / "federation.yaml").members.keys() == {"north"}
    member.write_bytes(b"\xef\xbb\xbf" + member.read_bytes().replace(b"\n", b"\r\n"))
    assert federation_text([member]) == text


def test_a_path_stands_for_its_config_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: none\ndata: {train: a.jsonl, eval: b.jsonl}\n")
    config = Config.given(tmp_path / "run.yaml")
    assert Config.given(str(tmp_path / "run.yaml")) == config and Config.given(config) is config
    with pytest.raises(
        ConfigError, match="expected a dlora.Config or the path of its YAML, got a dict"
    ):
        Config.given({"model": "none"})  # type: ignore[arg-type]


def test_the_other_kind_of_config_is_one_line() -> None:
    run = {
        "model": "none",
        "data": {"train": "a", "eval": "b"},
        "task": "classification",
        "lora": {"r": 4},
    }
    with pytest.raises(
        ConfigError,
        match="^this is the config of a run .*, and it is read as that of a cloud; .*--cloud$",
    ):
        CloudConfig.parse(run)
    with pytest.raises(
        ConfigError,
        match="^this is the config of a cloud .*, and it is read as that of a run; .*config$",
    ):
        Config.parse({"model": "none", "limits": {}, "listen": "a:1", "metrics": "a:2"})


def test_keys_of_the_other_kind_are_those_of_its_config_alone() -> None:
    run, cloud = set(Config.model_fields), set(CloudConfig.model_fields)
    assert cloud - run == OF_A_CLOUD and run - cloud == OF_A_RUN
