"""How much memory is left, before the arena takes its share: the kernel does not refuse it, it kills whoever comes next.

Where saves beside training do not fit, they are synchronous, and training goes on. What is left is what the machine has,
and what the control groups of this process (those of a container, or of a job of Slurm) allow.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemologger.errors import SaveFailedError
from nemologger.ranks import Ranks

_ROOT = Path("/")


@dataclass(frozen=True)
class _Need:
    host: str
    nbytes: int
    left: int | None


def check_memory(ranks: Ranks, arena: int, *, steps_on_host: bool) -> None:
    """Whether the arenas of all ranks of a host fit into what is left there. Collective.

    Args:
        ranks: The processes that write together.
        arena: Bytes of this rank's.
        steps_on_host: Training takes this memory too: it will want again what it has given back since its peak.

    Raises:
        SaveFailedError: On every rank, if they do not fit.
    """
    mine = _Need(socket.gethostname(), arena + (given_back() if steps_on_host else 0), memory_left())
    problem = ranks.exchange(mine, _problem)
    if problem:
        raise SaveFailedError(problem)


def _problem(needs: Sequence[_Need]) -> str:
    """What does not fit, or ""."""
    for host in {need.host for need in needs}:
        there = [need for need in needs if need.host == host]
        wanted = sum(need.nbytes for need in there)
        left = min((need.left for need in there if need.left is not None), default=wanted)
        if wanted > left:
            return (
                f"it takes {wanted / 1e6:.0f} MB of memory on {host} beside what training holds now, and "
                f"{left / 1e6:.0f} MB are left there"
            )
    return ""


def memory_left(root: Path = _ROOT) -> int | None:
    """Bytes that can still be had, with swap and what the kernel would take back from its caches. None if it is not said."""
    return min([left for left in (_of_machine(root), *_of_groups(root)) if left is not None], default=None)


def given_back(root: Path = _ROOT) -> int:
    """Bytes that this process held at its peak, and does not hold now."""
    status = _numbers(root / "proc/self/status")
    return 1024 * max(status.get("VmHWM:", 0) - status.get("VmRSS:", 0), 0)


def _of_machine(root: Path) -> int | None:
    told = _numbers(root / "proc/meminfo")
    return 1024 * (told["MemAvailable:"] + told.get("SwapFree:", 0)) if "MemAvailable:" in told else None


def _of_groups(root: Path) -> list[int | None]:
    """What each control group allows, from that of this process up."""
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        return [left for line in lines for left in _of_group(root / "sys/fs/cgroup", *line.split(":", 2)[1:])]
    return []


def _of_group(mount: Path, controllers: str, path: str) -> list[int | None]:
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
        return []
    group = mount / path.lstrip("/")
    # In a container the path may be the host's, which is not there; its own group is the mount itself then.
    return [_left(one, limit, used, caches) for one in (group, *group.parents) if one == mount or mount in one.parents]


def _left(group: Path, limit: str, used: str, caches: tuple[str, ...]) -> int | None:
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None
    told = _numbers(group / "memory.stat")
    return max(most - now, 0) + sum(told.get(cache, 0) for cache in caches)


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line, by the line's first word."""
    with suppress(OSError):
        lines = [line.split() for line in file.read_text().splitlines()]
        return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    return {}
