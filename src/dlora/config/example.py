"""Prints a config with every key, its default and its meaning; the printed text can be loaded."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dlora.config.cloud import CloudConfig
from dlora.config.reading import Section, section_of
from dlora.config.run import Config

# Values for keys that have no default, or whose default does not show what a value looks like.
_GIVEN: dict[str, Any] = {
    "model": "path/to/model",
    "train": "train.jsonl",
    "eval": "eval.jsonl",
    "cloud": "hub",
    "r": 8,
    "frame": "frame.safetensors",
}


def example(document: type[Config | CloudConfig]) -> str:
    """The YAML of a run or a cloud, with comments. Blocks that are null by default are comments."""
    run = document is Config
    head = "a run (dlora simulate, peer, device)" if run else "a cloud (dlora cloud)"
    lines = [f"# Every key of {head} with its default; what has one can be left out."]
    enough = "model, data.train, data.eval and peers.count are" if run else "model is"
    lines.append(f"# To begin, {enough} enough.")
    return "\n".join([*lines, *_block(document, "")]) + "\n"


def schema(document: type[Config | CloudConfig]) -> str:
    """The JSON Schema of the same keys, for editors."""
    return json.dumps(document.model_json_schema(), indent=2)


def _block(section: type[Section], indent: str) -> list[str]:
    lines = []
    for key, field in section.model_fields.items():
        inner = section_of(section, key)
        lines += _comment(field.description or (inner.__doc__ if inner else None), indent)
        if inner is None:
            lines.append(f"{indent}{key}: {_value(key, field)}")
        elif field.default is None:  # a block that is not there by default
            lines.append(f"{indent}{key}: null")
            lines += [f"#{line}" for line in (f"{indent}{key}:", *_block(inner, indent + "  "))]
        else:
            lines += [f"{indent}{key}:", *_block(inner, indent + "  ")]
    return lines


def _comment(meaning: str | None, indent: str) -> list[str]:
    words = " ".join((meaning or "").split())
    return textwrap.wrap(words, 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _value(key: str, field: FieldInfo) -> str:
    """The default as YAML. It is written as JSON, but a text is written without quotes."""
    default = _GIVEN.get(key) if field.default is PydanticUndefined else field.default
    if isinstance(default, str):
        return default
    return json.dumps(default if not isinstance(default, tuple) else list(default))
