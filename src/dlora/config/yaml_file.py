"""How YAML is read: every word as it stands, no key twice, nothing that grows without end."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import Composer

MAX_CHARACTERS = 1 << 20  # a federation file of 1,000 members; PyYAML reads some 30,000 a second
_MAX_DEPTH = 50  # blocks in blocks; a config needs five
_MAX_VALUES = 100_000  # each counted as often as aliases repeat it
_MAX_DIGITS = 18  # of a whole number: what 64 bits hold


class _Bounded(Composer):
    """A key that stands twice, and what grows without end, is a yaml.MarkedYAMLError."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value of the tree, which PyYAML would follow as deep as Python lets it."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            problem = f"blocks lie more than {_MAX_DEPTH} deep in one another"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)  # type: ignore[attr-defined]
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """One block of keys, each of which stands there once."""
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
        """The whole tree, of which aliases make more than stands there."""
        node: yaml.Node | None = super().compose_document()
        if node is not None:
            _count(node, {})
        return node


def _count(node: yaml.Node, counted: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """The values in a node and how deep they lie, an alias counted as what it stands for."""
    if id(node) in counted:
        if counted[id(node)] == (0, 0):
            raise yaml.MarkedYAMLError(
                problem="an alias stands for a block that holds it", problem_mark=node.start_mark
            )
        return counted[id(node)]
    counted[id(node)] = 0, 0  # under way
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
    """Every value is text, so that a member may be called ``no`` or ``7``."""


class ConfigLoader(_Bounded, yaml.SafeLoader):
    """Numbers, true, false and null; all else is text.

    YAML 1.1, which PyYAML reads, takes no and off for false, 010 for 8, 1_0 for 10, 1:30 for 90,
    and 1e-3 for text.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """A whole number of a length that Python and the log can write."""
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
    """What a YAML text holds. Raises ValueError in one line: what is wrong, and where."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(
            " ".join(str(error).replace('in "<unicode string>",', "at").split())
        ) from error
