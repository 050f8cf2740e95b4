"""The pages' blocks: what a reader would type or copy, taken out of Markdown and done in a folder,
small.
"""

from __future__ import annotations

import glob
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from kit.call_cli import call, start

ROOT = Path(__file__).parents[2]
SERVES = re.compile(r"dlora (cloud|peer) ")  # started beside what follows


class Block(NamedTuple):
    """``language``: that of the fence; "" where none is named; "shell" where the block is
    indented.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def first(self) -> str:
        """The first line, without a prompt and what is said beside it."""
        return self.text.partition("\n")[0].removeprefix("$ ").partition("  #")[0].strip()

    def commands(self) -> list[str]:
        """Of a shell block; what a console shows between them is left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "shell":
            return [line for line in lines if line.strip()]
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def blocks(page: str) -> Iterator[Block]:
    """Every block of a page but fences without a language: outputs, trees and drawings, unless a
    prompt stands in them.
    """
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        begin = at
        at += 1
        if lines[begin].startswith("```"):
            end = lines.index("```", at)
            text = "\n".join(lines[at:end])
            if lines[begin] != "```" or text.startswith("$ "):
                yield Block(page, begin + 1, lines[begin][3:] or "console", text)
            at = end + 1
        elif lines[begin].startswith("    ") and (begin == 0 or not lines[begin - 1].strip()):
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            yield Block(
                page, begin + 1, "shell", "\n".join(line.strip() for line in lines[begin:at])
            )


class Walk(ExitStack):
    """Does blocks in ``folder``, in which this process stands; ``instead``: words of the page ->
    words that serve here.
    """

    def __init__(self, page: str, folder: Path, instead: Mapping[str, str]) -> None:
        super().__init__()
        self.left, self.folder, self.instead = list(blocks(page)), folder, instead
        self.done: list[str] = []
        self.beside: dict[str, subprocess.Popen[str]] = {}  # command -> process

    def take(self, first: str) -> Block:
        """The next block that begins so, in this folder's words."""
        block = next(block for block in self.left if block.first.startswith(first))
        self.left.remove(block)
        self.done.append(block.first)
        return block._replace(text=self.here(block.text))

    def here(self, text: str) -> str:
        """In this folder's words."""
        for words, own in self.instead.items():
            text = text.replace(words, own)
        return text

    def write(self, first: str, name: str) -> None:
        """A block is a file."""
        (self.folder / name).write_text(self.take(first).text + "\n")

    def type(self, first: str, *but: str) -> str:
        """Every command of a block, but those that begin with one of ``but``; what they printed."""
        said = []
        for command in self.take(first).commands():
            if not command.startswith(but or ("nothing",)):
                said.append(self.command(command))
        return "".join(said)

    def command(self, line: str) -> str:
        """One command; it must succeed."""
        if SERVES.match(line):
            self.beside[line] = start(self.folder, *shlex.split(line, comments=True)[1:])
            self.callback(self._end, self.beside[line])
            return ""
        if not line.startswith("dlora "):
            programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            ran = subprocess.run(
                ["bash", "-euc", line],
                capture_output=True,
                text=True,
                env=os.environ | {"PATH": programs},
            )
            assert ran.returncode == 0, f"{line}: {ran.stderr}"
            return ran.stdout
        line, _, target = line.partition(" > ")
        words = [
            found
            for word in shlex.split(line, comments=True)[1:]
            for found in sorted(glob.glob(word)) or [word]
        ]
        outcome = call(*words)
        assert outcome.exit_code == 0, f"{line}: {outcome.err}"
        if target:
            Path(target.partition("#")[0].strip()).write_text(outcome.out)
        return outcome.out + outcome.err

    def python(self, first: str, **names: Any) -> str:
        """A block of Python, with ``names`` there; what it printed."""
        block, out = self.take(first), io.StringIO()
        text = block.text
        if block.language == "diff":
            text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("+"))
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            exec(compile(text, f"{block.page}:{block.line}", "exec"), names)
        return out.getvalue()

    def finish(self) -> None:
        """Wait for what was started beside: each ends well by itself."""
        for line, process in self.beside.items():
            _, err = process.communicate()  # pytest's own limit is that of the test
            assert process.returncode == 0, f"{line}: {err}"
        self.beside.clear()

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        process.terminate()
        process.communicate(timeout=60)
