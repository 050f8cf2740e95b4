"""Texts that a language model writes after the rows' prompts, compared with the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dlora.config.training import GenerationSection
from dlora.data.formats import IGNORED, Example
from dlora.errors import ConfigError
from dlora.lora.stacked import StackedModel
from dlora.tasks.scores import Scores

# as GSM8K's answers have them (openai/grade-school-math): commas between thousands
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Asked:
    """A prompt as tokens, and the answer that is due, as text."""

    input_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Writing:
    """What a run asks its model, and how the texts are written and compared."""

    asked: list[Asked]
    tokenizer: Any
    section: GenerationSection


def writing_of(
    section: GenerationSection | None, examples: Sequence[Example], tokenizer: Any
) -> Writing | None:
    """What a model is asked for each example: the last answer of the row, after all before it.
    ``section`` None: nothing.

    Raises ConfigError for rows that have no prompt, or whose answer was cut.
    """
    if section is None:
        return None
    asked = []
    for example in examples:
        assert isinstance(example.labels, list)
        learned = [label != IGNORED for label in example.labels]
        end = len(learned) - learned[::-1].index(True) if any(learned) else 0
        start = end
        while start > 0 and learned[start - 1]:
            start -= 1
        if not start:
            raise ConfigError(
                "generation: a row of data.eval has no prompt before its answer, and plain text has"
                " none: take rows with prompt + completion, instructions or chats"
            )
        if example.num_learned_cut:
            raise ConfigError(
                "generation: data.max_length cuts answers of data.eval, whose ends would be missing"
                " in what is compared; raise it"
            )
        answer = tokenizer.decode(example.input_ids[start:end], skip_special_tokens=True)
        asked.append(Asked(example.input_ids[:start], answer))
    return Writing(asked, tokenizer, section)


@torch.no_grad()
def written(
    model: StackedModel, writing: Writing, chosen: Sequence[int], num_participants: int
) -> list[list[str]]:
    """The greedy text of each of the P participants whose factors are bound, after the prompts of
    these numbers: P lists. All rows go through the model together, padded on the left.
    """
    tokenizer = writing.tokenizer
    prompts = [writing.asked[number].input_ids for number in chosen] * num_participants
    longest = max(len(prompt) for prompt in prompts)
    pad: int = tokenizer.pad_token_id
    missing = [longest - len(prompt) for prompt in prompts]
    ids = [[pad] * short + prompt for short, prompt in zip(missing, prompts, strict=True)]
    mask = [[0] * short + [1] * len(own) for short, own in zip(missing, prompts, strict=True)]
    network = model.network
    # the model's own words for the end, such as that of a turn, and the tokenizer's
    ends = network.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    output: Tensor = network.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=GenerationConfig(
            max_new_tokens=writing.section.max_new_tokens,
            do_sample=False,
            num_beams=1,
            # a checkpoint may ask for these
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
        ),
    )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [texts[start : start + len(chosen)] for start in range(0, len(texts), len(chosen))]


def last_number(text: str) -> str | None:
    """The last number in a text, without commas and closing zeros; None: there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number: str = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def exact_match(texts: Sequence[str], answers: Sequence[str]) -> float:
    """The part of the texts whose last number is that of the answer, as GSM8K is scored; an answer
    without a number must be the same text.
    """
    right = 0
    for text, answer in zip(texts, answers, strict=True):
        due = last_number(answer)
        right += text.strip() == answer.strip() if due is None else last_number(text) == due
    return right / len(answers)


def rouge_l(texts: Sequence[str], answers: Sequence[str]) -> float:
    """The mean ROUGE-L F-measure, by torchmetrics; without stemming."""
    # here, because importing it takes a second
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(list(texts), list(answers), rouge_keys="rougeL")["rougeL_fmeasure"])


_SCORES: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "rouge_l": rouge_l,
}


def compared(writing: Writing, texts: Sequence[str]) -> Scores:
    """The scores of texts that were written after all prompts, in their order."""
    answers = [asked.answer for asked in writing.asked]
    return {name: _SCORES[name](texts, answers) for name in writing.section.scores}
