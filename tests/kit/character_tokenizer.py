"""Letters for tokens: a tokenizer, files of rows, and what an example says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dlora.config.training import DataSection
from dlora.data.formats import Example
from dlora.data.load import load_data
from dlora.errors import UserError


def make_tokenizer(
    *, bert: bool = False, eos: bool = True, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Every character is a token. bert: [CLS] a [SEP] b [SEP] with type ids; else <s> first and
    </s> to append.
    """
    specials = ["<pad>", "<s>", "</s>", "[CLS]", "[SEP]"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    numbered = {token: index for index, token in enumerate(specials + characters)}
    backend = Tokenizer(models.WordLevel(numbered, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bert:
        single, pair, used = (
            "[CLS]:0 $A:0 [SEP]:0",
            "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            [("[CLS]", 3), ("[SEP]", 4)],
        )
    else:
        single, pair, used = "<s> $A", "<s> $A $B", [("<s>", 1)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=used
    )
    names = (
        ["input_ids", "token_type_ids", "attention_mask"]
        if bert
        else ["input_ids", "attention_mask"]
    )
    given = {} if bert else {"bos_token": "<s>"}
    given |= {"eos_token": "</s>"} if eos and not bert else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        model_input_names=names,
        chat_template=template,
        **given,
    )


PLAIN, BERT = make_tokenizer(), make_tokenizer(bert=True)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def section(train: Any, evaluation: Any = None, **keys: Any) -> DataSection:
    return DataSection.model_validate({"train": train, "eval": evaluation or train, **keys})


def refusal(said: str, *arguments: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_data(*arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def learnt(example: Example, tokenizer: Any = PLAIN) -> str:
    """The text of the tokens in the loss, the end written as </s>."""
    assert isinstance(example.labels, list) and len(example.labels) == len(example.input_ids)
    assert all(
        label in (-100, token)
        for label, token in zip(example.labels, example.input_ids, strict=True)
    )
    return "".join(
        tokenizer.convert_ids_to_tokens([label for label in example.labels if label != -100])
    )


def whole(example: Example, tokenizer: Any = PLAIN) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(example.input_ids))
