"""How a config is read: YAML, overrides, ${NAME}, and every mistake in it as one line in the user's spelling."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dlora.errors import ConfigError


class Section(BaseModel):
    """One block of the YAML: immutable, and every key in it is a known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


S = TypeVar("S", bound=Section)


class Document(Section):
    """The outermost block: what one file holds."""

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Self:
        """Read a YAML file, apply ``key.sub=value`` overrides, fill in ``${NAME}`` from the environment.

        Raises ConfigError naming the key, what came and what was expected.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
            raise ConfigError(f"config {path} cannot be read ({reason}); give the path of a YAML file") from error
        try:
            tree = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).replace('in "<unicode string>",', "at").split())
            raise ConfigError(f"config {path} is not YAML: {reason}") from error
        if not isinstance(tree, dict):
            found = "nothing" if tree is None else f"a {type(tree).__name__}"
            needed = " and ".join(key for key, field in cls.model_fields.items() if field.is_required())
            raise ConfigError(f"config {path} holds {found}, expected keys such as {needed}")
        for override in overrides:
            _apply_override(tree, override)
        return cls.parse(tree)

    @classmethod
    def parse(cls, tree: dict[str, Any]) -> Self:
        """Check a nested dict of keys. Raises ConfigError with one line for each mistake."""
        return parse_section(cls, _substitute(tree))

    def dump(self) -> str:
        """The resolved YAML: every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def parse_section(section: type[S], tree: dict[str, Any]) -> S:
    """Check one block on its own. Raises ConfigError with one line for each mistake."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(mistake, section, tree) for mistake in error.errors())
        raise ConfigError("\n".join(lines)) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text (it wants 1.0e-3); people write 1e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
        branch[leaf] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: {value} is not YAML") from error


def _substitute(value: Any, key: str = "") -> Any:
    """Replace every ``${NAME}`` by the environment's value; an unset one is an error."""
    if isinstance(value, dict):
        return {name: _substitute(inner, f"{key}.{name}".strip(".")) for name, inner in value.items()}
    if isinstance(value, list):
        return [_substitute(inner, key) for inner in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ConfigError(f"{key} uses ${{{name}}}, which is not set in the environment; export {name}=...")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", look_up, value)


def _explain(mistake: Any, root: type[Section], tree: Any) -> str:
    """One pydantic mistake as one line in the user's spelling."""
    path = [str(part) for part in mistake["loc"]]
    key = ".".join(path)
    section: Any = root
    depth = 0
    while depth < len(path) - 1 and (inner := _section_of(section, path[depth])):
        section, depth = inner, depth + 1
    form = next((at for at in range(depth + 1, len(path)) if isinstance(mistake["loc"][at], str)), None)
    if form is not None:  # a key with several forms: pydantic names the form, and each of them complains
        for part in mistake["loc"][:form]:
            tree = tree[part]
        return f"{'.'.join(path[:form])}: expected {section.model_fields[path[depth]].description}; got {tree!r}"
    if mistake["type"] == "extra_forbidden":
        known = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{key} is not a key; {hint}"
    if mistake["type"] == "missing":
        return f"{key} is missing; the config must say it"
    message = mistake["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = re.sub(r"valid dictionary or instance of \w+", "block of keys", re.sub(r"[Tt]uple", "list", message))
    if isinstance(mistake["input"], dict):
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}: {message[0].lower()}{message[1:]}, got {mistake['input']!r}"


def _section_of(section: Any, key: str) -> type[Section] | None:
    field = section.model_fields.get(key) if section else None
    candidates = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
