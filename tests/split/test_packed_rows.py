"""Texts that share a row: kept apart as on the whole model, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dlora.errors import CloudError, ConfigError
from kit import tiny_models
from kit.remote_inputs import CLASSES, LM, Folder, Given, assert_same, loss_looks, remote_and_whole
from kit.updates import LOSS_BOUND


def flattened(texts: tuple[int, ...] = (5, 9, 4), **flags: bool) -> Given:
    """Texts in one row, by transformers' own collator."""
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in (list(range(1, 1 + length)) for length in texts)
    ]
    made: Given = transformers.DataCollatorWithFlattening(**flags)(rows)
    return made


def packed_rows(*rows: tuple[int, ...]) -> Given:
    """Rows of several texts each, as TRL 1.16 collates them: no mask, positions that begin again,
    no loss at a first token.
    """
    positions = torch.tensor([[place for length in row for place in range(length)] for row in rows])
    ids = torch.randint(1, 20, positions.shape, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": ids.masked_fill(positions == 0, -100),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_texts_that_share_a_row_are_kept_apart(
    model_folder: Folder, family: str, pipeline: int
) -> None:
    """TRL's packing=True and its padding_free, and transformers' collator with all that it may
    add.
    """
    remote, whole = remote_and_whole(model_folder, family, LM, pipeline)
    for given in (
        packed_rows((5, 9, 4)),
        packed_rows((5, 9, 4), (18,), (1, 1, 16)),
        flattened(),
        flattened(return_flash_attn_kwargs=True, return_seq_idx=True),
    ):
        looks = loss_looks(given["labels"])
        assert_same(remote, whole, given, looks)
        alone = whole(
            **{key: value for key, value in given.items() if key != "position_ids"}, use_cache=False
        ).loss
        if given["position_ids"][0].argmax() != given["position_ids"].shape[1] - 1:
            # what was silently trained on before
            assert abs(alone.item() - remote(**given).loss.item()) > 1e-3


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_a_body_that_would_mix_them_is_refused(model_folder: Folder, family: str) -> None:
    """transformers itself mixes them there, and says nothing."""
    task = CLASSES if family == "bert" else LM
    remote, _ = remote_and_whole(model_folder, family, task)
    given = packed_rows((5, 9, 4))
    if family == "bert":
        given["labels"] = torch.tensor([1])
    with pytest.raises(
        CloudError, match="does not keep apart the texts that share a row: give each text a row"
    ):
        remote(**given)
    remote(**given, attention_mask=torch.ones_like(given["input_ids"]))  # one text, says the mask


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"position_ids": None}, "cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 18)}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 18])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_k": torch.tensor([0, 5, 14, 20])}, "cu_seq_lens_k"),
        ({"max_length_q": 18}, "max_length_q"),
        ({"max_length_k": 8}, "max_length_k"),
        ({"seq_idx": torch.zeros(1, 18)}, "seq_idx"),
    ],
)
def test_what_tells_texts_apart_must_be_what_positions_say(
    model_folder: Folder, change: Given, name: str
) -> None:
    remote, _ = remote_and_whole(model_folder, "llama", LM)
    with pytest.raises(
        ConfigError, match=f"{name} names other texts than position_ids: give position_ids"
    ):
        remote(**flattened(return_flash_attn_kwargs=True, return_seq_idx=True) | change)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"packing": True}, {"padding_free": True, "max_length": None}, {}])
def test_trl_trains_as_on_peft(model_folder: Folder, tmp_path: Path, how: Given) -> None:
    """With TRL itself, where it is installed."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    words = tiny_models.WORDS
    rows = datasets.Dataset.from_list(
        [{"text": " ".join(words[start % 9 : start % 9 + 3 + start % 5])} for start in range(48)]
    )

    def losses(model: Any) -> list[float]:
        arguments = trl.SFTConfig(
            str(tmp_path / "trl"), max_steps=5, per_device_train_batch_size=2, report_to="none",
            use_cpu=True, bf16=False,
            logging_steps=1, learning_rate=5e-3, disable_tqdm=True, save_strategy="no",
            gradient_checkpointing=False,
            **{"max_length": 24} | how,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model, args=arguments, train_dataset=rows, processing_class=tiny_models.tokenizer()
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    remote, whole = remote_and_whole(model_folder, "llama", LM)
    assert losses(remote) == pytest.approx(losses(whole), abs=LOSS_BOUND)
