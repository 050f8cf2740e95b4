"""Reads a config: YAML, overrides and ${NAME}; reports each mistake in one line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from dlora.config.other_keys import ADVICE, OF_A_CLOUD, OF_A_RUN
from dlora.config.yaml_file import MAX_CHARACTERS, ConfigLoader, read_yaml
from dlora.errors import ConfigError

_MAX_SHOWN = 80  # characters of a value in a message
_MAX_LINES = 20  # mistakes in one message


def _as_written(value: Any) -> Any:
    if isinstance(value, bool | float):
        what = str(value).lower() if isinstance(value, bool) else f"the number {value}"
        raise ValueError(f"YAML reads this as {what}; put the text in quotes")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("a text with a zero byte names nothing; take it out")
    return value


# a name or a label; a whole number in the YAML becomes text
Text = Annotated[str, BeforeValidator(_as_written)]


class Section(BaseModel):
    """One block of the YAML. It is immutable, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )


S = TypeVar("S", bound=Section)


class Document(Section):
    """The outermost block: the content of one config file."""

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Read a YAML file, apply overrides ``key.sub=value``, and replace ``${NAME}``.

        The values for ``${NAME}`` come from the environment. Raises ConfigError, which names the
        key, the value and what was expected.
        """
        try:
            with Path(path).open(encoding="utf-8-sig") as file:
                text = file.read(MAX_CHARACTERS + 1)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            reason = (
                f"not UTF-8 at byte {error.start}"
                if isinstance(error, UnicodeDecodeError)
                else reason
            )
            raise ConfigError(
                f"config {_short(path)} cannot be read ({reason}); give the path of a YAML file"
            ) from error
        try:
            tree = read_yaml(text, ConfigLoader)
        except ValueError as error:
            raise ConfigError(f"config {path} is not YAML: {error}") from error
        if not isinstance(tree, dict):
            found = "nothing" if tree is None else f"a {type(tree).__name__}"
            needed = " and ".join(
                key for key, field in cls.model_fields.items() if field.is_required()
            )
            raise ConfigError(f"config {path} holds {found}, expected keys such as {needed}")
        for override in overrides:
            _apply_override(tree, override)
        return cls.parse(tree)

    @classmethod
    def given(cls, config: Self | str | Path) -> Self:
        """Return a config unchanged, or load it when a path is given.

        Raises ConfigError when it is neither a config nor a path, or when the file is wrong.
        """
        if isinstance(config, str | Path):
            return cls.load(config)
        if not isinstance(config, cls):
            raise ConfigError(
                f"config: expected a dlora.{cls.__name__} or the path of its YAML, got a"
                f" {type(config).__name__}"
            )
        return config

    @classmethod
    def parse(cls, tree: dict[str, Any]) -> Self:
        """Check a nested dict of keys. Raises ConfigError with one line for each mistake."""
        return parse_section(cls, _substitute(tree))

    def dump(self) -> str:
        """The config as YAML, with every default."""
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
        )


def parse_section(section: type[S], tree: dict[str, Any]) -> S:
    """Check one block on its own. Raises ConfigError with one line for each mistake."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        mistakes = error.errors()
        if len(other := sorted(_of_another_kind(section).intersection(tree))) > 2:
            kind, right = (
                ("a run", "a cloud") if "limits" in section.model_fields else ("a cloud", "a run")
            )
            raise ConfigError(
                f"this is the config of {kind} ({', '.join(other[:4])}, ...), and it is read as"
                f" that of {right}; give that, or write one with: dlora config"
                + (" --cloud" if right == "a cloud" else "")
            ) from None
        lines = [
            *dict.fromkeys(
                " ".join(_explain(one, section, tree).split()) for one in mistakes[:_MAX_LINES]
            )
        ]
        more = len(mistakes) - _MAX_LINES
        raise ConfigError(
            "\n".join([*lines, *([f"and {more} more mistakes"] if more > 0 else [])])
        ) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override}: expected key=value, such as --set train.rounds=50")
    *parents, leaf = path.split(".")
    branch = tree
    for parent in parents:
        branch = branch.setdefault(parent, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a block of keys")
    try:
        branch[leaf] = read_yaml(value, ConfigLoader)
    except ValueError as error:
        raise ConfigError(f"--set {_short(override)}: the value is not YAML: {error}") from error


def _substitute(value: Any, key: str = "") -> Any:
    """Replace every ``${NAME}`` by its value in the environment.

    Raises ConfigError when a name is not set there.
    """
    if isinstance(value, dict):
        return {
            name: _substitute(inner, f"{key}.{name}".strip(".")) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [_substitute(inner, key) for inner in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ConfigError(
                f"{key} uses ${{{name}}}, which is not set in the environment; export {name}=..."
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", look_up, value)


def _explain(mistake: Any, root: type[Section], tree: Any) -> str:
    """One mistake that pydantic found, as one line with the key as the user writes it."""
    path = [str(part) for part in mistake["loc"]]
    key = ".".join(path)
    section: Any = root
    depth = 0
    while depth < len(path) - 1 and (inner := section_of(section, path[depth])):
        section, depth = inner, depth + 1
    form = next(
        (
            at
            for at in range(depth + 1, len(path))
            if isinstance(mistake["loc"][at], str) and not _is_in(tree, mistake["loc"][: at + 1])
        ),
        None,
    )
    # For a key with several forms pydantic reports a mistake for each form. One line for the key is
    # enough.
    if form is not None:
        for part in mistake["loc"][:form]:
            tree = tree[part]
        return (
            f"{'.'.join(path[:form])}: expected {section.model_fields[path[depth]].description};"
            f" got {_short(repr(tree))}"
        )
    if mistake["type"] == "extra_forbidden":
        return f"{key} is not a key; {_advice(path[-1], section, root)}"
    if mistake["type"] == "dict_type":
        described = section.model_fields[path[depth]].description
        return f"{key}: expected {described}; got {_short(repr(mistake['input']))}"
    if mistake["type"] == "missing":
        return (
            f"{key} is missing:"
            f" {section.model_fields[path[depth]].description or 'the config must have it'}"
        )
    message = mistake["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub(
        r"valid dictionary or instance of \w+",
        "block of keys",
        re.sub(r"[Tt]uple", "list", message),
    )
    if isinstance(mistake["input"], dict):
        return f"{key}: {message}".removeprefix(": ")
    message = message if message.startswith("YAML") else f"{message[0].lower()}{message[1:]}"
    return f"{key}: {message}, got {_short(repr(mistake['input']))}"


def _is_in(tree: Any, path: Sequence[Any]) -> bool:
    """Whether the user has written a key of this path."""
    for part in path:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _of_another_kind(root: type[Section]) -> frozenset[str]:
    """Keys that only the other kind of config has."""
    return (
        OF_A_RUN
        if "limits" in root.model_fields
        else OF_A_CLOUD
        if "train" in root.model_fields
        else frozenset()
    )


def _advice(key: str, section: type[Section], root: type[Section]) -> str:
    """A text that says what to write instead of an unknown key."""
    known = list(section.model_fields)
    elsewhere = [path for path in paths_of(root) if path.split(".")[-1] == key]
    if key in ADVICE and "limits" not in root.model_fields:  # a cloud has few of these keys
        return ADVICE[key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def paths_of(section: type[Section], above: str = "") -> list[str]:
    """Every key of a document by its full path, for example train.rounds."""
    paths = []
    for key in section.model_fields:
        paths.append(above + key)
        if inner := section_of(section, key):
            paths += paths_of(inner, f"{above}{key}.")
    return paths


def _short(value: str | Path) -> str:
    """A value as text, cut to a length that fits into a message."""
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text):,} characters)"


def section_of(section: Any, key: str) -> type[Section] | None:
    """The class of the block that a key of ``section`` holds; None if the key holds a value."""
    field = section.model_fields.get(key) if section else None
    candidates = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
