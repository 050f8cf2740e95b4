"""The house keeps its shape: imports go down, libraries stay in their rooms, files stay small,
importing is cheap.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dlora

SOURCE = Path(__file__).parents[1] / "src" / "dlora"

# Top to bottom. A file imports from the floors below it, never from above. Files on one floor may
# not import one another unless they share a folder. "folder/" stands for every file in it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__", "__main__"),
    ("cli",),
    ("commands/",),
    ("programs/",),
    ("costs/",),
    ("run/",),
    ("show/cloud/", "show/report/write"),
    ("show/report/tables", "show/report/pictures"),
    ("show/report/page",),
    ("show/progress", "show/tables", "show/topology"),
    ("show/drawing", "show/words"),
    ("show/svg",),
    ("evaluate", "decentralized/peer/", "split/cloud/", "split/device/"),
    ("train", "decentralized/gossip", "split/", "net/"),
    ("lora/active", "decentralized/mixing", "decentralized/topology", "tasks/"),
    (
        "decentralized/drawn",
        "decentralized/finite_time",
        "decentralized/graphs",
        "lora/adapt",
        "lora/adapter_io",
        "lora/all_adapters",
        "lora/biases",
        "lora/bottleneck",
        "lora/bottleneck_io",
        "lora/core",
        "lora/layers",
        "lora/mapped",
        "lora/model_card",
        "lora/moments",
        "lora/sharded",
        "lora/stacked",
        "lora/swapped",
        "lora/taken_out",
        "lora/targets",
        "lora/units",
    ),
    ("decentralized/matrices", "lora/factors", "lora/kill_revive"),
    ("lora/meter",),
    ("data/load", "events/", "identity/", "model/load"),
    ("model/",),
    (
        "data/batches",
        "data/checks",
        "data/first_look",
        "data/formats",
        "data/labels",
        "data/partition",
        "data/texts",
    ),
    ("data/chats", "data/rows"),
    ("data/row_files",),
    ("data/arrow_rows",),
    ("config/example",),
    ("config/cloud",),
    ("config/peers_file",),
    ("config/run",),
    ("config/bottleneck", "config/peers", "config/training"),
    ("config/reading",),
    ("config/", "files", "stopping"),
    ("wire/peer/", "wire/split/"),
    ("wire/",),
    ("errors", "seeds", "version"),
)
# Folders that never know of each other, whatever their floors.
STRANGERS = (
    ("decentralized/", "net/"),
    ("split/", "net/"),
    ("split/", "decentralized/"),
    ("net/", "wire/peer/"),
    ("net/", "wire/split/"),
    ("split/cloud/", "split/device/"),
    ("wire/peer/", "wire/split/"),
)

_COMMANDS = ("documents", "identities", "looking", "options", "training")
COMMANDS = {f"commands/{name}" for name in _COMMANDS}
# Third parties and the only files that import them; an empty set is nobody.
ROOMS: dict[str, set[str]] = {
    "transformers": {
        "programs/trainer_callback",
        *(f"model/{name}" for name in ("files", "layers", "load", "quiet")),
        *(f"lora/{name}" for name in ("adapter_io", "biases", "layers", "stacked", "taken_out")),
        *(f"split/{name}" for name in ("device/half", "device/body", "device/head", "cloud/body")),
        "tasks/generation",
    },
    "peft": {
        "model/quiet",
        *(f"lora/{name}" for name in ("adapter_io", "core", "layers", "stacked", "swapped")),
        *(f"lora/{name}" for name in ("taken_out", "targets")),
    },
    "grpc": {f"net/{name}" for name in ("dialling", "grpc_link", "listener")},
    "grpc_health": {"net/listener"},
    "google": {"wire/frame", "wire/peer/peer_pb2", "wire/split/codec", "wire/split/split_pb2"},
    "cryptography": {"identity/certificates", "identity/signatures"},
    "prometheus_client": {"show/cloud/metrics"},
    "typer": {"cli", *COMMANDS, "show/progress"},
    "torchmetrics": {"tasks/generation", "tasks/scores"},
    "rich": {"cli", *COMMANDS, "show/progress", "show/tables", "show/cloud/table"},
    **{name: set() for name in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")},
}
MAX_LINES_OF_A_CLASS, MAX_ATTRIBUTES = 250, 12
REASONS = ("Its attributes are", "Most of its attributes are", "It is one class because")
MAX_LINES = 400  # of at most 100 columns, as ruff holds them

FILES = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): path
    for path in sorted(SOURCE.rglob("*.py"))
}
PACKAGES = {name for name in FILES if name.endswith("/__init__")}  # of the subfolders
each_file = pytest.mark.parametrize("name", FILES)


def covers(pattern: str, name: str) -> bool:
    return name.startswith(pattern) if pattern.endswith("/") else name == pattern


def floor_of(name: str) -> int:
    """Floors counted from the top. An unlisted file is a mistake in the table, not a pass."""
    for number, patterns in enumerate(FLOORS):
        if any(covers(pattern, name) for pattern in patterns):
            return number
    raise AssertionError(
        f"src/dlora/{name}.py has no floor; add it to FLOORS in tests/test_house.py"
    )


def imported(tree: ast.AST) -> Iterator[str]:
    """Full dotted names of everything imported, at the top or inside a function, for types only or
    not.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write it from dlora on"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(dotted: str) -> str | None:
    """The file of src/dlora that an imported name lives in; None for a third party's and for
    `dlora` itself.
    """
    top, *parts = dotted.split(".")
    if top != "dlora":
        return None
    while parts:
        for name in ("/".join(parts), "/".join([*parts, "__init__"])):
            if name in FILES:
                return name
        parts.pop()
    return None


def complaint(importer: str, target: str) -> str | None:
    """Why one file may not import another; None when it may."""
    for one, other in STRANGERS:
        if (covers(one, importer) and covers(other, target)) or (
            covers(other, importer) and covers(one, target)
        ):
            return f"{importer} imports {target}: {one} and {other} never know of each other"
    here, there = floor_of(importer), floor_of(target)
    if there > here:
        return None
    folder = Path(importer).parent
    if there == here and folder == Path(target).parent != Path("."):
        return None
    return (
        f"{importer} imports {target}, which is"
        f" {'on its own floor' if there == here else 'above it'}"
    )


def parse(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in FILES if name not in PACKAGES])
def test_imports_go_down(name: str) -> None:
    floor_of(name)
    targets = {
        file for dotted in imported(parse(name)) if (file := file_of(dotted)) and file != name
    }
    assert [wrong for target in sorted(targets) if (wrong := complaint(name, target))] == []


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("cli", "errors", True),
        ("errors", "config/run", False),
        ("train", "evaluate", False),
        ("data/load", "model/load", False),
        ("data/formats", "data/load", False),
        ("events/log", "show/progress", False),
        ("model/load", "lora/stacked", False),
        ("lora/stacked", "lora/adapter_io", True),
        ("programs/simulate", "run/prepare", True),
        ("run/prepare", "programs/simulate", False),
        ("show/report/write", "run/account", False),
        ("decentralized/gossip", "net/memory", False),
        ("net/memory", "decentralized/topology", False),
        ("net/memory", "wire/frame", True),
        ("net/grpc", "wire/peer/codec", False),
        ("wire/frame", "wire/peer/codec", False),
        ("decentralized/peer/life", "decentralized/gossip", True),
        ("decentralized/gossip", "decentralized/peer/life", False),
        ("split/device/step", "split/cloud/part", False),
    ],
)
def test_the_rule_itself(importer: str, target: str, allowed: bool) -> None:
    assert (complaint(importer, target) is None) == allowed


def test_imports_are_seen_wherever_they_stand() -> None:
    code = (
        "import dlora.errors\nif x:\n    from dlora.lora import factors\ndef f():\n    from"
        " dlora.data import rows"
    )
    assert {file_of(name) for name in imported(ast.parse(code))} == {
        "errors",
        "lora/factors",
        "data/rows",
    }


def test_rooms_have_no_circle() -> None:
    """Files on one floor of a folder may import one another; neither they nor the folders go round
    in a circle.
    """
    files = {
        name: {
            file for dotted in imported(parse(name)) if (file := file_of(dotted)) and file != name
        }
        for name in FILES
    }
    rooms: dict[str, set[str]] = {}
    for name, targets in files.items():
        if name != "__init__":  # the public names, for type checkers
            room = name.rpartition("/")[0] or name
            rooms.setdefault(room, set()).update(
                to for target in targets if (to := target.rpartition("/")[0] or target) != room
            )
    assert list(TopologicalSorter(files).static_order())
    assert list(TopologicalSorter(rooms).static_order())


def test_the_corridor_is_short() -> None:
    beside_folders = [path.name for path in SOURCE.iterdir() if path.is_file()]
    assert len(beside_folders) <= 12, sorted(beside_folders)


@each_file
def test_third_parties_stay_in_their_rooms(name: str) -> None:
    tops = {dotted.split(".")[0] for dotted in imported(parse(name))}
    assert [top for top in sorted(tops) if name not in ROOMS.get(top, {name})] == []


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_folder_is_a_caption_only(name: str) -> None:
    """Code in a folder's __init__ would run, and import, whenever one of its files is wanted."""
    assert len(parse(name).body) == 1


@each_file
def test_files_are_small_rooms_with_a_caption(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    caption = (ast.get_docstring(parse(name)) or "").partition("\n\n")[0]
    assert caption.endswith("."), "the first paragraph is a sentence"


def test_tests_benchmarks_and_examples_are_small_too() -> None:
    root = SOURCE.parents[1]
    long = {
        path.relative_to(root).as_posix()
        for folder in ("tests", "benchmarks", "examples")
        for path in (root / folder).rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES
    }
    assert long == set()


def attributes(class_: ast.ClassDef) -> set[str]:
    """Names that the class declares, and that its methods set on ``self``."""
    declared = [line.target for line in class_.body if isinstance(line, ast.AnnAssign)]
    names = {target.id for target in declared if isinstance(target, ast.Name)}
    return names | {
        node.attr
        for node in ast.walk(class_)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


@each_file
def test_a_large_class_says_why(name: str) -> None:
    """A block of the config has as many attributes as keys, and users read its docstring."""
    if name.startswith("config/"):
        return
    for node in ast.walk(parse(name)):
        if not isinstance(node, ast.ClassDef):
            continue
        long = (node.end_lineno or 0) - node.lineno >= MAX_LINES_OF_A_CLASS
        says_why = any(reason in (ast.get_docstring(node) or "") for reason in REASONS)
        assert says_why == (long or len(attributes(node)) > MAX_ATTRIBUTES), node.name


def test_importing_is_cheap() -> None:
    code = (
        "import sys, dlora, dlora.errors, dlora.config.run; print(*{name.split('.')[0] for name in"
        " sys.modules})"
    )
    loaded = set(run_python(code).split())
    slow = {"torch", "transformers", "peft", "datasets", "matplotlib", "typer", "numpy", "scipy"}
    assert {"dlora", "pydantic"} <= loaded and not loaded & slow


def test_every_python_file_is_type_checked() -> None:
    """A benchmark and a slow test once gave a number where a range was due; nothing that runs
    rarely may rot unseen.
    """
    root = SOURCE.parents[1]
    checked = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    listed = ["git", "ls-files", "*.py", "scripts/tree"]
    ours = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout
    unchecked = [
        name for name in ours.split() if not any(Path(name).is_relative_to(at) for at in checked)
    ]
    assert ours and unchecked == []


@pytest.mark.slow
def test_bitsandbytes_is_imported_for_a_quantised_base_only() -> None:
    """It takes seconds, and PEFT imports it wherever it is installed; what it finds later is what
    is there.
    """
    code = (
        "import sys, importlib.util, dlora.programs.simulate\nfrom peft.import_utils import"
        " is_bnb_available\nprint('bitsandbytes' in sys.modules, is_bnb_available() =="
        " (importlib.util.find_spec('bitsandbytes') is not None))"
    )
    assert run_python(code).split() == ["False", "True"]


def test_all_is_what_is_public() -> None:
    """What a type checker sees in __init__.py, what __all__ lists and what an import gives are one
    set of names.
    """
    public: dict[str, tuple[str, str]] = {}
    for node in ast.walk(parse("__init__")):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dlora"):
            public |= {
                alias.asname or alias.name: (node.module, alias.name) for alias in node.names
            }
    assert public
    code = "import dlora; print(*dlora.__all__)"
    assert run_python(code).split() == sorted(public)
    for name, (module, original) in public.items():
        assert getattr(dlora, name) is getattr(importlib.import_module(module), original)


def test_an_unknown_name_is_an_attribute_error() -> None:
    code = (
        "import dlora\ntry:\n    dlora.nonsense\nexcept AttributeError as error:\n    print(error)"
    )
    assert "nonsense" in run_python(code)
