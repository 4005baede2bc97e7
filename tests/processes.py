"""Start real training processes, alone or several that train together, and stop them."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

_HERE = Path(__file__).parent
_LIGHT = _HERE / "light_start"


def environment(extra: Mapping[str, str] | None = None, *, light: bool = True) -> dict[str, str]:
    """For a child: this directory's modules, one thread, no colours; with ``light``, without what few need (light_start)."""
    path = os.pathsep.join([str(_HERE), *[str(_LIGHT)] * light, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(extra or {})}


def python(
    script: str | Path, *arguments: object, timeout: float = 120, check: bool = True, light: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` to its end."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment(light=light), capture_output=True, text=True, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@contextmanager
def started(script: str | Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """``script`` while it runs; killed at the end, with all it has started."""
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background may not hear Ctrl-C
    )
    try:
        yield process
    finally:
        kill(process)
        process.stdout.close()


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for ``process`` and all it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def seen_by_ranks(script: Path, count: int, directory: Path) -> list[dict[str, Any]]:
    """What each of ``count`` processes ``script RANK DIRECTORY`` has written to ``DIRECTORY/rank<RANK>.json``."""
    command = [sys.executable, str(script)]
    ranks = [subprocess.Popen([*command, str(rank), str(directory)], env=environment()) for rank in range(count)]
    try:
        codes = [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(codes):
        raise AssertionError(f"{script} ended with {codes}")
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(count)]


def tell(seen: Mapping[str, Any], rank: int, count: int, directory: Path) -> NoReturn:
    """The end of a process that :func:`seen_by_ranks` has started: with the others, for some may still ask it something."""
    partial = directory / f"rank{rank}.partial"
    partial.write_text(json.dumps(seen))
    partial.rename(directory / f"rank{rank}.json")
    while not all((directory / f"rank{other}.json").exists() for other in range(count)):
        time.sleep(0.05)
    os._exit(0)


def torchrun(
    script: str | Path, ranks: int, *arguments: object, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` as ``ranks`` processes, as ``torchrun`` does."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}",
        str(script), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-9000:]}")
    return done


def free_port() -> int:
    """A port that nobody listens on, and that the kernel gives to nobody who asks for any port, however long it takes."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(given.read_text().split()[0]) if given.exists() else 32_768
    below = lowest if lowest > 20_000 else 1 << 16  # somebody wants nearly all of them to be given away
    while True:
        port = random.SystemRandom().randrange(15_000, below)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def wait_for(condition, timeout: float = 150, every: float = 0.02) -> None:
    """Wait until ``condition()`` holds."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not come true within {timeout} s")
        time.sleep(every)
