"""A peer of a virtual world goes on from an older copy of its folder, or starts anew."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable

from kit.virtual_federation import World


async def rounds_of(world: World, name: str, count: int) -> None:
    """Until a peer has committed so many rounds."""
    while name not in world.commits or world.commits[name][1].rounds_done < count:
        await asyncio.sleep(0.05)


async def end_of(world: World, name: str) -> BaseException | None:
    """Kill a peer or wait for its end; what it ended with."""
    [outcome] = await asyncio.gather(world.tasks[name], return_exceptions=True)
    return outcome


def older_copy_of(victim: str, anew: bool = False) -> Callable[[World], object]:
    """Copy the folder of ``victim`` after two rounds, kill it after four, go on from the copy; or
    start anew instead.
    """

    async def plan(world: World) -> None:
        place = world.folder / victim
        await rounds_of(world, victim, 2)
        copy, commit = shutil.copytree(place, world.folder / "copy"), world.commits[victim]
        await rounds_of(world, victim, 4)
        world.kill(victim)
        await end_of(world, victim)
        shutil.rmtree(place)
        if anew:
            del world.commits[victim]
        else:
            shutil.copytree(copy, place)
            world.commits[victim] = commit
        world.ended = await end_of(world, await begun(world, victim))  # type: ignore[attr-defined]
        world.tasks.pop(victim)

    return plan


async def begun(world: World, name: str) -> str:
    world.begin(name)
    return name
