"""Start real training processes, alone or several that train together, and stop them.

They are forked from one that has imported what they need (:mod:`zygote`), or, where how they start matters, started.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from forked import Forked

_HERE = Path(__file__).parent
_LIGHT = _HERE / "light_start"


def environment(extra: Mapping[str, str] | None = None, *, light: bool = True) -> dict[str, str]:
    """For a child: this directory's modules, one thread, no colours; with ``light``, without what few need (light_start)."""
    path = os.pathsep.join([str(_HERE), *[str(_LIGHT)] * light, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **(extra or {})}


def python(
    script: str | Path,
    *arguments: object,
    timeout: float = 240,
    check: bool = True,
    light: bool = True,
    extra: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` to its end, with ``extra`` in its environment; without ``light`` as one that is started, not forked.

    One that was forked is killed with all it has started, the ranks of an agent too, if it takes longer than ``timeout``.
    """
    command = [str(script), *map(str, arguments)]
    if light:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
            process = Forked(command, environment(extra), out=out, error=error, session=True)
            try:
                process.wait(timeout)
            except BaseException:
                kill(process)
                raise
            done = _done(process, out, error)
    else:
        done = subprocess.run(
            [sys.executable, *command],
            env=environment(extra, light=False),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


@contextmanager
def started(script: str | Path, *arguments: object) -> Iterator[Forked]:
    """``script`` while it runs; killed at the end, with all it has started."""
    process = Forked(
        [str(script), *map(str, arguments)], environment(), out=subprocess.PIPE, error=subprocess.STDOUT, session=True
    )
    try:
        yield process
    finally:
        kill(process)
        process.stdout.close()


def kill(process: Forked) -> None:
    """SIGKILL for ``process`` and all it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


@contextmanager
def ranks(
    script: str | Path, count: int, *arguments: object, out: IO[str] | None = None, error: IO[str] | None = None
) -> Iterator[list[Forked]]:
    """``count`` processes that train together, as ``torchrun`` might have started them; killed at the end.

    Their output and errors go to ``out``, or those to ``error``.
    """
    command, port = [str(script), *map(str, arguments)], str(free_port())
    apart = error if error is not None else subprocess.STDOUT if out is not None else None
    started = [Forked(command, environment(_of_rank(rank, count, port)), out=out, error=apart) for rank in range(count)]
    try:
        yield started
    finally:
        end(started)


def ended(processes: Sequence[Forked], timeout: float) -> int:
    """Wait until all of them have ended well, or one has not; its exit code."""

    def codes() -> list[int | None]:
        return [process.poll() for process in processes]

    wait_for(lambda: any(codes()) or None not in codes(), timeout)
    return next(filter(None, codes()), 0)


def end(processes: Sequence[Forked]) -> None:
    """SIGKILL for those that still run."""
    for process in processes:
        process.kill()
        process.wait()


def _of_rank(rank: int, count: int, port: str) -> dict[str, str]:
    """What ``torchrun`` tells a process, but that rank 0 is to keep the store."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "False",
    }  # fmt: skip


def seen_by_ranks(script: Path, count: int, directory: Path) -> list[dict[str, Any]]:
    """What each of ``count`` processes ``script RANK DIRECTORY`` has written to ``DIRECTORY/rank<RANK>.json``.

    ``PORT`` in their environment is one that nobody listens on.
    """
    given = environment({"PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"})
    started = [Forked([str(script), str(rank), str(directory)], given) for rank in range(count)]
    try:
        code = ended(started, 240)
    finally:
        end(started)
    assert code == 0, f"{script} ended with {code}"
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
    script: str | Path, count: int, *arguments: object, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` as ``count`` processes that ``torchrun`` might have started."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        with ranks(script, count, *arguments, out=out, error=error) as started:
            code = ended(started, timeout)
        done = _done(started[0], out, error)
    if code:
        raise AssertionError(f"{script} ended with {code}:\n{done.stdout[-3000:]}\n{done.stderr[-9000:]}")
    return done


def _done(process: Forked, out: IO[str], error: IO[str]) -> subprocess.CompletedProcess[str]:
    for file in (out, error):
        file.seek(0)
    return subprocess.CompletedProcess(process.args, process.returncode, out.read(), error.read())


def free_port() -> int:
    """A port that nobody listens on, and that the kernel gives to nobody who asks for any port, however long it takes.

    Nor do other processes that run tests beside this one: whoever gets it may take some time until it listens.
    """
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(given.read_text().split()[0]) if given.exists() else 32_768
    below = lowest if lowest > 20_000 else 1 << 16  # somebody wants nearly all of them to be given away
    workers, worker = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)), os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    while True:
        port = random.SystemRandom().randrange(15_000 + int(worker.removeprefix("gw")), below, workers)
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
