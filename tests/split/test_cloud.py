"""A cloud and its devices over real TLS: what it does for them, whom it refuses, and how it
stops.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dlora.config.cloud import CloudConfig
from dlora.config.run import Config
from dlora.errors import CloudError, ConfigError, IdentityError, ModelError, UserError
from dlora.lora.factors import Factors
from dlora.lora.stacked import StackedModel
from dlora.net.channel import Channel
from dlora.programs.cloud import cloud
from dlora.split.device.half import Half
from dlora.stopping import Stop
from dlora.train import forward
from dlora.wire.frame import ChannelDown
from dlora.wire.split.codec import split_kind
from dlora.wire.split.frames import Drop, Opened, Refused
from kit import queue_cloud
from kit.call_cli import call, contents
from kit.processes import until
from kit.serving_cloud import PATIENCE_S, Members, manifest_of, opened, serving


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


@pytest.fixture
def bert(model_folder: Callable[..., Path]) -> Path:
    return model_folder("bert")


@contextmanager
def linked(members: Members, name: str, config: Config) -> Iterator[Half]:
    """A device's half, through the cloud."""
    half = queue_cloud.device_half(config)
    assert config.split is not None
    kind = split_kind(config.split.wire)

    def dial() -> Channel:
        channel = dialler.dial()
        channel.kind = kind
        return channel

    with members.dialler(name) as dialler:
        half.link(dial, config.split.pipeline, lambda seconds: None)
        yield half


def logits_of(model: StackedModel, factors: Factors) -> torch.Tensor:
    model.use(factors)
    return forward(model, queue_cloud.batch())


def scraped(place: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{place}/metrics", timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def test_a_device_trains_through_the_cloud_and_all_of_it_is_counted(
    members: Members, bert: Path
) -> None:
    config = queue_cloud.config(bert, **{"split.wire": "bfloat16"})
    batch, whole = queue_cloud.batch(), queue_cloud.whole_model(config)
    expected = logits_of(whole, queue_cloud.factors(whole))
    before = contents(members.folder)
    with (
        serving(members, bert, {"metrics": "127.0.0.1:0"}) as served,
        linked(members, "phone", config) as half,
    ):
        factors, tokens = queue_cloud.factors(half.model), int(batch.attention_mask.sum())
        logits = [logits_of(half.model, factors) for _ in range(2)]
        torch.testing.assert_close(logits[0], expected, atol=0.05, rtol=0)
        logits[0].sum().backward()
        assert all(factor.grad is not None for factor in factors.values())
        served.wait_for("part", device="phone", tokens=tokens, keep=True)
        until(
            lambda: served.heard("load", device="phone", parts=1),
            "the second forward's part to be here",
            PATIENCE_S,
        )
        metrics = served.wait_for("serving")["metrics"]
        found = scraped(metrics)
        assert found["dlora_devices_linked"] == 1
        assert found['dlora_parts_in_flight{device="phone"}'] == 1
        assert found['dlora_tokens_in_flight{device="phone"}'] == tokens
        assert found['dlora_steps_total{device="phone"}'] == 1
        assert found['dlora_sent_bytes_total{device="phone"}'] > 0
        summary = served.summary()
        with pytest.raises(OSError):
            scraped(metrics)
    phone = summary["devices"]["phone"]
    assert (
        summary["cloud"],
        phone["links"],
        phone["tokens"],
        phone["steps"],
        phone["failures"],
    ) == ("hub", 1, tokens, 1, {})
    last = served.heard("load", device="phone")[-1]
    assert (last["parts"], last["tokens"]) == (0, 0)
    assert (phone["sent_bytes"], phone["received_bytes"]) == (
        last["sent_bytes"],
        last["received_bytes"],
    )
    assert served.wait_for("opened")["wire"] == "bfloat16"
    assert served.heard("failed") == served.heard("connection-refused") == []
    assert contents(members.folder) == before  # the cloud keeps nothing


def test_one_device_too_many_is_refused_until_another_has_gone(
    members: Members, bert: Path
) -> None:
    manifest = manifest_of(queue_cloud.device_half(queue_cloud.config(bert)))
    limits = {"limits.max_devices": 1, "limits.max_tokens": 99, "limits.max_parts": 7}
    with serving(members, bert, limits) as served, members.dialler("tablet") as tablet:
        with members.dialler("phone") as phone:
            assert opened(phone, manifest)[1] == Opened(99, 7)
            channel, answer = opened(tablet, manifest)
            assert (
                isinstance(answer, Refused)
                and "1 devices are here, and limits.max_devices is that" in answer.reason
            )
            with pytest.raises(ChannelDown):
                channel.receive(PATIENCE_S)
        served.wait_for("closed", device="phone")
        assert opened(tablet, manifest)[1] == Opened(99, 7)
        summary = served.summary()
    assert summary["refused_links"] == 1
    assert summary["devices"]["tablet"]["links"] == 1


def test_a_half_of_another_model_is_told_what_differs(
    members: Members, bert: Path, model_folder: Callable[..., Path]
) -> None:
    config = queue_cloud.config(model_folder("roberta"))
    with serving(members, bert) as served, linked(members, "phone", config) as half:
        with pytest.raises(
            CloudError,
            match="the cloud refuses this device: model: the device has roberta, the cloud bert",
        ):
            logits_of(half.model, queue_cloud.factors(half.model))
        assert "roberta" in served.wait_for("refused", device="phone")["reason"]
        served.wait_for("closed", device="phone")


def test_a_device_that_misbehaves_loses_its_link_and_nobody_else_does(
    members: Members, bert: Path
) -> None:
    manifest = manifest_of(queue_cloud.device_half(queue_cloud.config(bert)))
    with (
        serving(members, bert) as served,
        members.dialler("phone") as phone,
        members.dialler("tablet") as tablet,
    ):
        other, _ = opened(tablet, manifest)
        channel = phone.dial()
        channel.send(Drop(1))
        with pytest.raises(ChannelDown):
            channel.receive(PATIENCE_S)
        assert "Drop before Open" in served.wait_for("connection-refused")["reason"]
        assert isinstance(opened(phone, manifest)[1], Opened)
        assert not other.is_down
        served.summary()
        # told to stop: the link goes down, and the device would dial again
        with pytest.raises(ChannelDown):
            other.receive(PATIENCE_S)


# The name of the key's owner; keys of the config; what is said
STARTS: dict[str, tuple[str, dict[str, Any], type[UserError], str]] = {
    "nobody": ("hbu", {}, IdentityError, "hbu is not a member in .*did you mean hub"),
    "a-device": (
        "phone",
        {},
        IdentityError,
        "phone is a device in .*--role cloud --address HOST:PORT",
    ),
    "a-peer": ("north", {}, IdentityError, "north is a peer in .*--role cloud"),
    "without-address": (
        "attic",
        {},
        IdentityError,
        "attic is a cloud without an address .*--address HOST:PORT",
    ),
    "no-place": ("hub", {"listen": "7000"}, ConfigError, "--listen 7000: expected HOST:PORT"),
    "no-place-for-metrics": (
        "hub",
        {"metrics": "9100"},
        ConfigError,
        "metrics 9100: expected HOST:PORT",
    ),
    "no-model": ("hub", {"model": "./modle"}, ModelError, "model ./modle: no such folder"),
    "no-device": ("hub", {"device": "warp"}, ModelError, "device warp: .*take auto or cpu"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_cloud_that_cannot_start_says_why(case: str, members: Members, bert: Path) -> None:
    name, changes, kind, says = STARTS[case]
    key = members.key(name) if name in ("hub", "phone", "north", "attic") else members.key("hub")
    with pytest.raises(kind, match=says):
        cloud(
            CloudConfig.parse({"model": str(bert)} | changes),
            name=name,
            key=key,
            federation=members.federation,
        )


@pytest.mark.parametrize("option", ["--listen", "metrics"])
def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    option: str, members: Members
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = f"127.0.0.1:{other.getsockname()[1]}"
        key = "listen" if option == "--listen" else option
        config = CloudConfig.parse({"model": "./no-such-model", key: place})
        with pytest.raises(
            ConfigError, match=f"cannot listen on {place}: another program does; .*{option}"
        ):
            cloud(config, name="hub", key=members.key("hub"), federation=members.federation)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_serves_until_it_is_told_to_stop(
    as_json: bool, members: Members, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cloud.yaml").write_text(f"model: {bert}\n")
    port = members.address.rpartition(":")[2]
    serving, hear = threading.Event(), Stop.hear

    def heard(stop: Stop, event: Mapping[str, Any]) -> None:
        hear(stop, event)
        if not stop.loading:  # before that a signal ends this process at once
            serving.set()

    monkeypatch.setattr(Stop, "hear", heard)

    def end() -> None:
        if serving.wait(PATIENCE_S):
            os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    files: list[str | Path] = ["--key", members.key("hub"), "--federation", members.federation]
    more = ["--json"] if as_json else []
    outcome = call(
        "cloud", tmp_path / "cloud.yaml", "--name", "hub", *files, "--set", "device=cpu", *more
    )
    ending.join()
    assert outcome.exit_code == 0, outcome
    said = outcome.err.splitlines()
    # before or after the line that it serves
    assert "stopping; devices dial again when the cloud is back" in said
    if as_json:
        assert len(said) == 1
        assert json.loads(outcome.out)["devices"] == {}
    else:
        serves = f"serving {bert} on [::]:{port} for devices of {members.federation}; Ctrl-C stops"
        assert any(line.startswith(serves) for line in said)
        assert outcome.out.startswith("served ")


def test_the_command_says_what_is_missing(members: Members, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "cloud.yaml").write_text(f"model: {bert}\n")
    files: list[str | Path] = ["--key", members.key("north"), "--federation", members.federation]
    outcome = call("cloud", tmp_path / "cloud.yaml", "--name", "north", *files)
    assert (outcome.exit_code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: north is a peer") and outcome.err.count("\n") == 1
