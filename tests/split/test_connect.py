"""`dlora.connect`: an ordinary Hugging Face model whose body is in a cloud, for anybody's training
loop and for a Trainer.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from dlora.config.run import Config
from dlora.errors import ConfigError
from kit.connected import TASKS, batches, config, connect, connected, train
from kit.serving_cloud import Members, serving
from kit.updates import LOSS_BOUND, UPDATE_BOUND, assert_same, peft_oracle

ModelFolder = Callable[..., Path]
CLASSES = {
    "bert": transformers.BertForSequenceClassification,
    "llama": transformers.LlamaForCausalLM,
}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    return Members(tmp_path_factory.mktemp("members"))


@pytest.fixture(scope="module", params=["bert", pytest.param("llama", marks=pytest.mark.slow)])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(family: str, model_folder: ModelFolder) -> Path:
    return model_folder(family, TASKS[family])


@pytest.fixture(scope="module")
def cloud(members: Members, folder: Path) -> Iterator[None]:
    """Of the family's model."""
    with serving(members, folder):
        yield


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.usefixtures("cloud")
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_anybodys_training_loop_is_that_of_peft(
    members: Members, folder: Path, family: str, tmp_path: Path, accumulate: int
) -> None:
    """Law 6, through TLS; what is saved loads with PEFT and gives the same logits."""
    settings = config(folder, family)
    oracle, initial = peft_oracle(settings)
    expected = train(oracle, family, accumulate)
    final = peft.get_peft_model_state_dict(oracle)
    with connected(members, settings) as model:
        assert isinstance(model, CLASSES[family])
        model.save_pretrained(tmp_path / "before")
        assert {
            name: value.tolist() for name, value in weights_of(tmp_path / "before").items()
        } == {name: value.tolist() for name, value in initial.items()}
        losses = train(model, family, accumulate)
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < LOSS_BOUND
        assert losses[-1] != losses[0]
        model.save_pretrained(tmp_path / "after")
        after = weights_of(tmp_path / "after")
        update, reference = (
            {name: end[name] - initial[name] for name in initial} for end in (after, final)
        )
        assert_same(update, reference, UPDATE_BOUND["adamw"], TASKS[family])

        base, _ = fresh_base(settings)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "after").eval()
        assert_same_logits(model, loaded, family)


def assert_same_logits(model: Any, loaded: Any, family: str) -> None:
    """Of every real token, and of those the loss looks at when there are labels: the others do not
    travel then.
    """
    [batch] = batches(family, 1)
    model.eval()
    with torch.no_grad():
        losses = [either(**batch).loss.item() for either in (model, loaded)]
        labels = batch.pop("labels")
        ours, theirs = (either(**batch).logits for either in (model, loaded))
    real = batch["attention_mask"].bool() if labels.dim() == 2 else slice(None)
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def fresh_base(settings: Config) -> tuple[Any, None]:
    """The whole model, as a user of the folder would load it."""
    if settings.task == "causal-lm":
        return transformers.AutoModelForCausalLM.from_pretrained(settings.model), None
    return (
        transformers.AutoModelForSequenceClassification.from_pretrained(
            settings.model, num_labels=2, pad_token_id=0
        ),
        None,
    )


@pytest.mark.usefixtures("cloud")
@pytest.mark.parametrize("train_head", [True, False])
def test_its_parameters_are_the_factors_and_the_head(
    members: Members, folder: Path, family: str, train_head: bool
) -> None:
    settings = config(folder, family, **{"lora.train_head": train_head})
    oracle: Any = peft_oracle(settings)[0]
    with connected(members, settings) as model:
        trainable = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        expected = {
            name.removeprefix("base_model.model.")
            .replace("modules_to_save.default.", "")
            .replace(".default.weight", "")
            for name, parameter in oracle.named_parameters()
            if parameter.requires_grad and (train_head or "lora_" in name)
        }
        assert set(trainable) == expected
        assert all(parameter.dim() == 2 for name, parameter in trainable.items() if "lora_" in name)
        body = sum(
            parameter.numel() for parameter in oracle.base_model.model.base_model.parameters()
        )
        # the frozen weights are elsewhere
        assert sum(parameter.numel() for parameter in model.parameters()) < body / 2
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        train(model, family)
        changed = {
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(parameter, before[name])
        }
        assert changed == expected


@pytest.mark.usefixtures("cloud")
def test_a_trainer_trains_evaluates_and_saves_it(
    members: Members, folder: Path, family: str, tmp_path: Path
) -> None:
    settings = config(folder, family)
    rows = [
        {key: value[row] for key, value in batch.items()}
        for batch in batches(family)
        for row in range(4)
    ]
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / "trainer"), "max_steps": 5, "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "gradient_accumulation_steps": 2, "disable_tqdm": True, "seed": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip

    def trained(model: Any) -> tuple[transformers.Trainer, list[float]]:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(**arguments),
            train_dataset=padded(rows),
            eval_dataset=padded(rows[:8]),
        )
        trainer.train()
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    oracle, _ = peft_oracle(settings)
    _, expected = trained(oracle)
    with connected(members, settings) as model:
        trainer, losses = trained(model)
        assert len(losses) == 5
        assert losses == pytest.approx(expected, abs=1e-4)  # the logs are rounded
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
        trainer.save_model(str(tmp_path / "saved"))
        for saved in (tmp_path / "saved", tmp_path / "trainer" / "checkpoint-4"):
            files = sorted(path.name for path in saved.glob("adapter*"))
            assert files == ["adapter_config.json", "adapter_model.safetensors"]
            trained_only = load_file(saved / "model.safetensors")  # what a Trainer reads to go on
            assert (
                len(trained_only) == len(weights_of(saved))
                and trained_only.keys() <= model.state_dict().keys()
            )
        loaded = peft.PeftModel.from_pretrained(fresh_base(settings)[0], tmp_path / "saved").eval()
        assert_same_logits(model, loaded, family)
        arguments["gradient_checkpointing"] = True
        with pytest.raises(
            ConfigError,
            match=(
                "gradient_checkpointing: .* write gradient_checkpointing=False in TrainingArguments"
            ),
        ):
            trained(model)


def padded(rows: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """All of one length, for the default collator; what was added is masked and in no loss."""
    longest = max(len(row["input_ids"]) for row in rows)

    def grown(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        missing = longest - len(row["input_ids"])
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            key: (
                torch.nn.functional.pad(value, (0, missing), value=fill[key])
                if value.dim()
                else value
            )
            for key, value in row.items()
        }

    return [grown(row) for row in rows]


@pytest.mark.usefixtures("cloud")
def test_it_writes_texts_without_a_cache_and_says_so_with_one(
    members: Members, folder: Path, family: str
) -> None:
    if family != "llama":
        pytest.skip("classifies")
    settings = config(folder, family)
    whole = fresh_base(settings)[0].eval()  # B is zero: the adapter changes nothing yet
    prompt = torch.tensor([[1, 5, 9, 12]])
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with connected(members, settings) as model:
        model.eval()
        written = model.generate(prompt, use_cache=False, **options)
        assert torch.equal(written, whole.generate(prompt, use_cache=False, **options))
        assert torch.equal(model.generate(prompt, **options), written)
        with pytest.raises(
            ConfigError, match="keeps no key-value cache; call generate.*use_cache=False"
        ):
            model.generate(prompt, use_cache=True, **options)
        logits = [
            model(input_ids=prompt, labels=prompt, **more).loss.item()
            for more in ({}, {"num_items_in_batch": 3})
        ]
        assert logits == [
            whole(input_ids=prompt, labels=prompt, **more).loss.item()
            for more in ({}, {"num_items_in_batch": 3})
        ]


def test_a_schedule_is_said_to_have_no_part_in_it(
    members: Members, folder: Path, family: str
) -> None:
    with pytest.warns(UserWarning, match="connect trains all units"):
        connect(members, config(folder, family, schedule={"kind": "kr"})).disconnect()


@pytest.mark.usefixtures("cloud")
def test_a_disconnected_or_forgotten_model_leaves_no_thread(
    members: Members, folder: Path, family: str
) -> None:
    def wires() -> int:
        return sum(thread.name == "dlora-wire" for thread in threading.enumerate())

    settings, [batch] = config(folder, family), batches(family, 1)
    model = connect(members, settings)
    loss = model(**batch).loss
    assert wires() == 1
    model.disconnect()
    model.disconnect()
    assert wires() == 0
    with pytest.raises(ConfigError, match="disconnected; make another with dlora.connect"):
        loss.backward()
    with pytest.raises(ConfigError, match="disconnected; make another with dlora.connect"):
        model(**batch)
    del model, loss
    model = connect(members, settings)
    model.disconnect()  # before it was ever used
    with pytest.raises(ConfigError, match="disconnected; make another with dlora.connect"):
        model(**batch)
    model = connect(members, settings)
    model(**batch).loss.backward()
    del model
    gc.collect()
    assert wires() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("cloud")
def test_a_trainer_goes_on_from_a_checkpoint_and_takes_the_best(
    members: Members, folder: Path, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Interrupted and gone on with in a new process's model, the factors are those of one run, to
    the last bit.
    """
    settings = config(folder, family)
    rows = padded(
        [
            {key: value[row] for key, value in batch.items()}
            for batch in batches(family)
            for row in range(4)
        ]
    )

    def trained(model: Any, output: str, steps: int, **more: Any) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(tmp_path / output), max_steps=steps, save_steps=2, report_to="none", use_cpu=True,
            learning_rate=5e-3,
            per_device_train_batch_size=4, disable_tqdm=True, lr_scheduler_type="constant", seed=0,
            **more,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])

    def factors(model: Any) -> dict[str, torch.Tensor]:
        return {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if value.requires_grad
        }

    with connected(members, settings) as model:
        trained(model, "whole", 4).train()
        whole = factors(model)
    with connected(members, settings) as model:
        trained(model, "cut", 2).train()
    with connected(members, settings) as model:
        trainer = trained(model, "cut", 4)
        with caplog.at_level("WARNING", "transformers"):
            trainer.train(resume_from_checkpoint=True)
        assert not any("missing keys" in message for message in caplog.messages)
        assert trainer.state.global_step == 4
        for name, value in factors(model).items():
            assert torch.equal(value, whole[name]), name
        loaded = peft.PeftModel.from_pretrained(
            fresh_base(settings)[0], tmp_path / "cut" / "checkpoint-4"
        ).eval()
        assert_same_logits(model, loaded, family)
    # transformers reads the folder as an adapter too, not as a model of few weights
    if family == "llama":
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut" / "checkpoint-4")
        assert sum("lora_" in name for name, _ in found.named_parameters()) == len(whole)
    with connected(members, settings) as model:
        best = trained(
            model,
            "best",
            6,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )
        best.train()
        assert best.state.best_model_checkpoint is not None
        for name, value in load_file(
            Path(best.state.best_model_checkpoint) / "model.safetensors"
        ).items():
            assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.usefixtures("cloud")
def test_with_ends_the_link(members: Members, folder: Path, family: str) -> None:
    [batch] = batches(family, 1)
    with pytest.raises(ZeroDivisionError), connect(members, config(folder, family)) as model:
        model(**batch).loss.backward()
        raise ZeroDivisionError
    assert all(thread.name != "dlora-wire" for thread in threading.enumerate())
    with pytest.raises(ConfigError, match="disconnected; make another with dlora.connect"):
        model(**batch)
