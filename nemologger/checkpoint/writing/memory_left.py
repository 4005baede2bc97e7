"""How much memory is left, before the arena takes its share: the kernel does not refuse it, it kills whoever comes next.

Where saves beside training do not fit, they are synchronous, and training goes on. What is left is what the machine has,
and what the control groups of this process (those of a container, or of a job of Slurm) allow.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemologger.errors import SaveFailedError
from nemologger.ranks import Ranks, decide, together_at_zero

_ROOT = Path("/")

#: Bytes that a writer process has of its own: 16 MB were measured, and tables of pages come to that.
_WRITER = 20 << 20


@dataclass(frozen=True)
class _Need:
    host: str
    nbytes: int
    left: Mapping[str, int]


def check_memory(ranks: Ranks, arena: int, *, steps_on_host: bool) -> None:
    """Whether the arenas of all ranks of a host, and the processes that write from them, fit into what is left. Collective.

    Args:
        ranks: The processes that write together.
        arena: Bytes of this rank's.
        steps_on_host: Training takes this memory too: it will want again what it has given back since its peak.

    Raises:
        SaveFailedError: On every rank, if they do not fit.
    """

    def look() -> _Need:
        needed = arena + _WRITER + (given_back() if steps_on_host else 0)
        return _Need(socket.gethostname(), needed, memory_left())

    needs = together_at_zero(ranks, look)
    decide(ranks, lambda: _check(needs))


def _check(needs: Sequence[_Need]) -> None:
    """Ranks of a host may each have a container of their own: only who shares one adds up."""
    for limit in {(need.host, name) for need in needs for name in need.left}:
        host, name = limit
        there = [need for need in needs if need.host == host and name in need.left]
        wanted, left = sum(need.nbytes for need in there), min(need.left[name] for need in there)
        if wanted > left:
            raise SaveFailedError(
                f"it takes {wanted / 1e6:.0f} MB of memory on {host} beside what training holds now, and "
                f"{left / 1e6:.0f} MB are left there"
            )


def memory_left(root: Path = _ROOT) -> dict[str, int]:
    """Bytes that can still be had, with swap and what the kernel would take back from its caches, by what limits them.

    That is the machine, "", and control groups, by numbers that all of their processes see. Nothing if it is not said.
    """
    return dict([*_of_machine(root), *_of_groups(root)])


def given_back(root: Path = _ROOT) -> int:
    """Bytes that this process held at its peak, and does not hold now."""
    status = _numbers(root / "proc/self/status")
    return 1024 * max(status.get("VmHWM:", 0) - status.get("VmRSS:", 0), 0)


def _of_machine(root: Path) -> Iterator[tuple[str, int]]:
    told = _numbers(root / "proc/meminfo")
    if "MemAvailable:" in told:
        yield "", 1024 * (told["MemAvailable:"] + told.get("SwapFree:", 0))


def _of_groups(root: Path) -> Iterator[tuple[str, int]]:
    """What each control group allows, from that of this process up."""
    with suppress(OSError):
        for line in _lines(root / "proc/self/cgroup"):
            yield from _of_group(root / "sys/fs/cgroup", *line.split(":", 2)[1:])


def _of_group(mount: Path, controllers: str, path: str) -> Iterator[tuple[str, int]]:
    if not controllers:
        limit, used, caches = "memory.max", "memory.current", ("inactive_file", "active_file")
    elif "memory" in controllers.split(","):
        limit, used, caches = (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_inactive_file", "total_active_file"),
        )
        mount /= "memory"
    else:
        return
    group = mount / path.lstrip("/")
    # In a container the path may be the host's, which is not there; its own group is the mount itself then.
    for one in (group, *group.parents):
        if one == mount or mount in one.parents:
            with suppress(OSError, ValueError):  # "max" is no limit
                most, now = int((one / limit).read_text()), int((one / used).read_text())
                told = _numbers(one / "memory.stat")
                yield str(one.stat().st_ino), max(most - now, 0) + sum(told.get(cache, 0) for cache in caches)


def _lines(file: Path) -> list[str]:
    """What the kernel says there. The name of a process is cut after 15 bytes, which may be within a letter."""
    return os.fsdecode(file.read_bytes()).splitlines()


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the line's first word."""
    with suppress(OSError):
        lines = [line.split() for line in _lines(file)]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    return {}
