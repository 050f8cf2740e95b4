"""How much memory this process may still take: what the machine has, and what its container may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that are free on this machine and within every limit of a container or a Slurm job."""
    return min([psutil.virtual_memory().available, *_within_limits(root)])


def _within_limits(root: Path) -> Iterator[int]:
    """What each control group of this process, and each group around it, leaves of its limit.

    The kernel gives back the pages of files when a group needs room, so they count as free.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                counts = dict(
                    entry.split() for entry in (folder / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # no limit, or seen from within a container
                continue
            prefix = "total_" if controllers else ""
            files = sum(
                int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")
            )
            yield max(0, limit - used + files)
