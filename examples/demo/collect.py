"""Collect real text without a download: docstrings of eight installed libraries, shared out to
organisations.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = (
    "torch",
    "transformers",
    "sympy",
    "pandas",
    "numpy",
    "networkx",
    "huggingface_hub",
    "datasets",
)
# a library; one of its two organisations gets each half of the training rows
TRAIN_ROWS, TEST_ROWS = 450, 100
# 48 tokens, what the demo's model reads, are about 200 characters
MIN_CHARACTERS, MAX_CHARACTERS = 100, 400
# a library, drawn by the seed: enough rows, and reading all of transformers would take 10 s
MODULES_READ = 400
OPENING_WORDS = 12  # two texts that open with the same words are copies of one another

# Tests and code taken over from elsewhere are not a library's documentation.
NOT_ITS_OWN = re.compile(
    r"_?tests?|testing|_vendor|vendored|third_party|_internal|conftest\.py|test_.*|externals?"
)

# The eight names give nothing away: each is read as "library".
NAMES = re.compile(
    r"(py)?torch|transformers|sympy|pandas|numpy|networkx|hugging[ _]?face(["
    r" _]hub)?|datasets|\b(np|pd|nx)(?=\.)",
    re.I,
)


def docstrings(module: Path) -> Iterator[str]:
    """The docstrings of one source file, each on one line, the eight names masked; it is parsed,
    never imported.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # some libraries write "\\d" without the r
        tree = ast.parse(module.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield NAMES.sub("library", " ".join((ast.get_docstring(node) or "").split()))


def opening(text: str) -> str:
    """What copies of a text have in common: its first words, letters only."""
    return " ".join(re.findall("[a-z]+", text.lower())[:OPENING_WORDS])


def read_library(name: str, rng: random.Random) -> list[list[str]]:
    """The usable texts of an installed library, one list a module, modules in a drawn order."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"the demo reads the docstrings of {name}, which is not installed; pip install"
            " 'dlora[demo]'"
        )
    root = Path(spec.submodule_search_locations[0])
    modules = sorted(
        path
        for path in root.rglob("*.py")
        if not any(map(NOT_ITS_OWN.fullmatch, path.relative_to(root).parts))
    )
    rng.shuffle(modules)
    texts = [
        [text[:MAX_CHARACTERS] for text in docstrings(path)] for path in modules[:MODULES_READ]
    ]
    return [[text for text in module if len(text) >= MIN_CHARACTERS] for module in texts]


def drop_copies(libraries: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
    """Keep a text's first copy within a library, and none of one that stands in two libraries."""
    owners: dict[str, set[str]] = {}
    for name, modules in libraries.items():
        for text in (text for module in modules for text in module):
            owners.setdefault(opening(text), set()).add(name)
    seen: set[str] = set()

    def first(text: str) -> bool:
        key = opening(text)
        new = key not in seen and len(owners[key]) == 1
        seen.add(key)
        return new

    return {
        name: [list(filter(first, module)) for module in modules]
        for name, modules in libraries.items()
    }


def split(name: str, modules: list[list[str]], rng: random.Random) -> tuple[list[str], list[str]]:
    """Training and test texts of one library; all texts of a module are on one side."""
    train: list[str] = []
    test: list[str] = []
    for module in modules:
        side = test if len(test) + len(module) <= TEST_ROWS else train
        side.extend(module)
    if len(train) < TRAIN_ROWS or len(test) < TEST_ROWS:
        raise SystemExit(
            f"{name} gives {len(train)} training and {len(test)} test texts, the demo needs"
            f" {TRAIN_ROWS} and {TEST_ROWS}; install the version named in constraints.txt"
        )
    return rng.sample(train, TRAIN_ROWS), test


def collect(seed: int) -> tuple[dict[str, list[dict[str, str]]], list[dict[str, str]]]:
    """Rows of each organisation and rows of the test, {"text": ..., "library": ...}.

    Organisation i holds half the training texts of library i and half of those of the next library.
    """
    rng = random.Random(seed)
    kept = drop_copies({name: read_library(name, rng) for name in LIBRARIES})
    organisations: list[list[dict[str, str]]] = [[] for _ in LIBRARIES]
    test_rows: list[dict[str, str]] = []
    for index, name in enumerate(LIBRARIES):
        train, test = split(name, kept[name], rng)
        rows = [{"text": text, "library": name} for text in train]
        organisations[index] += rows[::2]
        organisations[index - 1] += rows[1::2]
        test_rows += [{"text": text, "library": name} for text in test]
    for rows in (*organisations, test_rows):
        rng.shuffle(rows)
    return {
        f"organisation-{index + 1}": rows for index, rows in enumerate(organisations)
    }, test_rows


def main() -> None:
    """Write organisation-1.jsonl to organisation-8.jsonl and test.jsonl into a folder, and say what
    is in them.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    organisations, test = collect(arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {**organisations, "test": test}.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (arguments.folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        held = sorted({row["library"] for row in rows}, key=LIBRARIES.index)
        print(
            f"{name:<16}{len(rows):>5} rows  "
            f" {' + '.join(held) if len(held) < len(LIBRARIES) else 'all eight'}"
        )


if __name__ == "__main__":
    main()
