"""Texts that models write: batches of stacked peers write what each writes alone in transformers,
and the scores are those of an independent computation.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import dlora
from dlora.config.run import Config
from dlora.errors import ConfigError
from dlora.events.log import read_log
from dlora.lora.adapter_io import load_adapter
from dlora.run.prepare import prepare
from dlora.tasks.generation import exact_match, last_number, rouge_l, writing_of, written
from kit import tiny_models

MakeConfig = Callable[..., Config]


def pairs(path: Path, count: int, start: int = 0) -> str:
    """Prompts of unequal length, of which some have numbers as answers."""
    rows = []
    for index in range(start, start + count):
        words = tiny_models.sentence(index)[0].split()
        words = [word.replace("was", "is") if start else word for word in words]
        rows.append(
            {"prompt": " ".join(words[:-1] * (1 + index % 3)), "completion": f" {words[-1]}"}
        )
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def alone_in_peft(config: Config, folder: str, prompts: list[list[int]], new: int) -> list[str]:
    """What PEFT and transformers write for each prompt by itself, without padding."""
    base = transformers.AutoModelForCausalLM.from_pretrained(config.model)
    model = peft.PeftModel.from_pretrained(base, Path(config.output_dir, folder)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return texts


def check_every_adapter(config: Config) -> list[str]:
    """Stacked and in batches against each alone; returns the texts of the average."""
    prepared = prepare(config)
    assert prepared.writing is not None and config.generation is not None
    folders = ["consensus", *(f"peers/{name}" for name in prepared.names)]
    loaded = [load_adapter(Path(config.output_dir, folder), prepared.model) for folder in folders]
    prepared.model.network.eval()
    prepared.model.use({name: torch.cat([one[name] for one in loaded]) for name in loaded[0]})
    numbers = range(len(prepared.writing.asked))
    together = written(prepared.model, prepared.writing, numbers, len(folders))
    prompts = [asked.input_ids for asked in prepared.writing.asked]
    scored = dlora.score(config.output_dir)
    answers = [asked.answer for asked in prepared.writing.asked]
    for folder, texts in zip(folders, together, strict=True):
        alone = alone_in_peft(config, folder, prompts, config.generation.max_new_tokens)
        assert texts == alone
        expected = {
            "exact_match": sum(map(same_answer, alone, answers)) / len(answers),
            "rouge_l": sum(map(subsequence_f, alone, answers)) / len(answers),
        }
        printed = scored[folder.removeprefix("peers/")]
        for name in config.generation.scores:
            assert printed[name] == pytest.approx(expected[name], abs=1e-6)
    return together[0]


def same_answer(text: str, answer: str) -> bool:
    """GSM8K's rule, written out a second time."""
    numbers = [re.findall(r"-?[0-9][0-9,]*\.?[0-9]*|-?\.[0-9]+", one) for one in (text, answer)]
    if not numbers[1]:
        return text.strip() == answer.strip()
    values = [float(found[-1].replace(",", "")) if found else None for found in numbers]
    return values[0] == values[1]


def subsequence_f(text: str, answer: str) -> float:
    """ROUGE-L's F-measure from the table of longest common subsequences."""
    a, b = (re.findall(r"[a-z0-9]+", one.lower()) for one in (text, answer))
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    common = table[-1][-1]
    return 2 * common / (len(a) + len(b)) if common else 0.0


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "opt"))]
)
def test_stacked_peers_write_what_each_writes_alone(
    make_config: MakeConfig, tmp_path: Path, family: str
) -> None:
    config = make_config(
        family, "causal-lm", **{
            "data.train": pairs(tmp_path / "pairs.jsonl", 64),
            "data.eval": pairs(tmp_path / "asked.jsonl", 12, 64),
            "data.max_length": 40, "per_device_eval_batch_size": 5, "peers.count": 2,
            "train.rounds": 20, "train.learning_rate": 2e-2, "eval_every": 0,
            "generation": {"scores": ["exact_match", "rouge_l"], "max_new_tokens": 6},
        },
    )  # fmt: skip
    dlora.simulate(config)
    texts = check_every_adapter(config)
    assert len(set(texts)) > 1  # it learned to answer one thing here and another there
    log = read_log(Path(config.output_dir, "log.jsonl"))
    assert log[0]["metric"] == "exact_match"
    assert (
        "exact match of the averaged adapter" in Path(config.output_dir, "report.html").read_text()
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("DLORA_ASSETS" not in os.environ, reason="DLORA_ASSETS has the rows")
def test_fifty_rows_of_gsm8k(make_config: MakeConfig, tmp_path: Path) -> None:
    root = Path(os.environ["DLORA_ASSETS"])
    files = {}
    for name, count in (("train", 100), ("test", 50)):
        with gzip.open(root / f"data/commonsense/gsm8k/{name}.jsonl.gz", "rt") as lines:
            rows: list[dict[str, Any]] = [json.loads(next(lines)) for _ in range(count)]
        files[name] = tmp_path / f"{name}.jsonl"
        made = [
            {"prompt": f"{row['question']}\nAnswer:", "completion": f" {row['answer']}"}
            for row in rows
        ]
        files[name].write_text("\n".join(json.dumps(row) for row in made) + "\n")
    config = make_config(
        "llama", "causal-lm", **{
            "model": str(root / "models/stories260K/hf"),
            "data.train": str(files["train"]), "data.eval": str(files["test"]),
            "data.max_length": 1024, "per_device_eval_batch_size": 16, "peers.count": 2,
            "train.rounds": 2, "train.local_steps": 1, "eval_every": 0,
            "generation": {"scores": ["exact_match", "rouge_l"], "max_new_tokens": 16},
        },
    )  # fmt: skip
    dlora.simulate(config)
    assert len(check_every_adapter(config)) == 50


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 1,234,567", "1234567"),
        ("#### 42", "42"),
        ("it is $18.50.", "18.5"),
        ("5.", "5"),
        ("3.0 apples", "3"),
        ("minus -7", "-7"),
        (".5", ".5"),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_answers_are_compared() -> None:
    assert exact_match(["a 7", "no", " yes ", "8"], ["#### 7", "#### 7", "yes", "none"]) == 0.5
    assert rouge_l(["The cat sat"], ["the cat lay"]) == pytest.approx(2 / 3)
    assert rouge_l([""], ["the"]) == 0


def test_what_cannot_be_asked_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    asked = {"generation": {"scores": ["rouge_l"]}}
    with pytest.raises(ConfigError, match="task classification has no score rouge_l"):
        make_config(**asked)
    with pytest.raises(ConfigError, match="generation does not go with split yet"):
        make_config("llama", "causal-lm", **asked, split={"cloud": "hub"})
    with pytest.raises(ConfigError, match="generation does not go with lora.modules_to_save yet"):
        make_config("llama", "causal-lm", **asked, lora={"modules_to_save": ["lm_head"]})
    with pytest.raises(ConfigError, match="a row of data.eval has no prompt"):
        prepare(make_config("llama", "causal-lm", **asked))
    rows = {
        "data.train": pairs(tmp_path / "a.jsonl", 8),
        "data.eval": pairs(tmp_path / "b.jsonl", 8, 64),
    }
    config = make_config("llama", "causal-lm", **asked, **rows)
    data = prepare(config).data
    [cut] = {example.num_learned_cut for example in data.evaluation}
    assert cut == 0 and config.generation is not None
    long = {"prompt": "the", "completion": "very " * 30}
    (tmp_path / "b.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(ConfigError, match="data.max_length cuts answers"):
        prepare(config)
    assert writing_of(None, data.evaluation, None) is None
