"""Reads YAML: words stay text, a key may not come twice, and depth and size are limited."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import Composer

# Enough for a federation file of 1,000 members. PyYAML reads about 30,000 characters per second.
MAX_CHARACTERS = 1 << 20
_MAX_DEPTH = 50  # blocks within blocks; a config needs five
_MAX_VALUES = 100_000  # a value that aliases repeat counts each time
_MAX_DIGITS = 18  # in a whole number, so that it fits into 64 bits


class _Bounded(Composer):
    """Raises yaml.MarkedYAMLError for a key that comes twice and for a tree that is too large."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one value; the depth is limited, because PyYAML recurses for each level."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            problem = f"blocks lie more than {_MAX_DEPTH} deep in one another"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)  # type: ignore[attr-defined]
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose one block of keys; a key that comes twice is an error."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                where = (
                    f"in line {line}"
                    if lines[key.value] == line
                    else f"in line {lines[key.value]} and in line {line}"
                )
                raise yaml.MarkedYAMLError(
                    problem=f"a key stands twice: {key.value[:80]}, {where}; keep one of them"
                )
            lines[key.value] = line
        return node

    def compose_document(self) -> yaml.Node | None:
        """Compose the whole tree and check its size, with every alias expanded."""
        node: yaml.Node | None = super().compose_document()
        if node is not None:
            _count(node, {})
        return node


def _count(node: yaml.Node, counted: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(the number of values in a node, its depth), with every alias expanded."""
    if id(node) in counted:
        if counted[id(node)] == (0, 0):
            raise yaml.MarkedYAMLError(
                problem="an alias stands for a block that holds it", problem_mark=node.start_mark
            )
        return counted[id(node)]
    counted[id(node)] = 0, 0  # marks a node that is being counted, to find an alias to itself
    total, depth = 1, 1
    if isinstance(node, yaml.CollectionNode):
        parts = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        for inner_total, inner_depth in [_count(part, counted) for part in parts]:
            total, depth = total + inner_total, max(depth, 1 + inner_depth)
    if total > _MAX_VALUES or depth > _MAX_DEPTH:
        what = (
            f"more than {_MAX_VALUES:,} values"
            if total > _MAX_VALUES
            else f"blocks more than {_MAX_DEPTH} deep"
        )
        raise yaml.MarkedYAMLError(
            problem=f"with its aliases it stands for {what}", problem_mark=node.start_mark
        )
    counted[id(node)] = total, depth
    return total, depth


class TextLoader(_Bounded, yaml.BaseLoader):
    """Reads every value as text, so that a member may have the name ``no`` or ``7``."""


class ConfigLoader(_Bounded, yaml.SafeLoader):
    """Reads numbers, true, false and null; every other value is text.

    PyYAML follows YAML 1.1, which reads no and off as false, 010 as 8, 1_0 as 10, 1:30 as 90, and
    1e-3 as text. This class does not.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """A whole number; one with too many digits for Python and the log is an error."""
        if len(node.value) > _MAX_DIGITS:
            problem = f"a number has {len(node.value):,} digits, at most {_MAX_DIGITS} are read"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return int(self.construct_yaml_int(node))


_NUMBER = "-+.0123456789"
for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)\Z", _NUMBER),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z", _NUMBER),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z", _NUMBER),
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("merge", r"<<\Z", "<"),
):
    ConfigLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first)
    )
ConfigLoader.add_constructor("tag:yaml.org,2002:int", ConfigLoader.whole_number)


def read_yaml(text: str, loader: type[TextLoader | ConfigLoader]) -> Any:
    """The content of a YAML text. Raises ValueError: one line with the mistake and its place."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(
            " ".join(str(error).replace('in "<unicode string>",', "at").split())
        ) from error
