"""Kills a training run again and again, at random moments and in every way, and checks that nobody can tell afterwards.

Usage, for as long as wanted::

    python tests/helpers/kill_loop.py --kills 100 --ranks 2 --workers 2 --beside

The run saves every few steps. One that nobody kills tells the losses first; every step that a killed one takes, once or
again, must have the same. A life is killed

- whole (its training processes, loader workers and writers) or only its training processes,
- with two ranks also only rank 0, or only rank 1: the other one must end by itself, with an error,
- while it cleans up what the life before has left,
- or loses only a writer process, with ``--beside``: it must train on.

Afterwards no process of it may be there. Prints a table; ends with 1 if anything was not as promised.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import train_toy
from processes import free_port

from nemologger import names
from nemologger.checkpoint.find import survey
from nemologger.checkpoint.verify import problems
from nemologger.disk import lock

EVERY = 3
PLANTED = "dead-run"  # a leftover that takes a moment to remove
FILES = 3000
PATIENCE = 60.0  # seconds for what must happen soon; a busy machine needs some


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is run, and for how long."""

    ranks: int
    workers: int
    beside: bool
    steps: int
    chosen: tuple[str, ...] = ()

    @property
    def ways(self) -> list[str]:
        """How a life can end."""
        if self.chosen:
            return list(self.chosen)
        ranks = ["rank 0", "rank 1"] if self.ranks > 1 else []
        return ["whole", "trainers", *ranks, "cleaning", *["writer"] * self.beside]


class Life:
    """One start of the run: a process for each rank. They are forked, which saves them the imports.

    Args:
        kind: What to run.
        directory: Where.
    """

    def __init__(self, kind: Kind, directory: Path) -> None:
        self._directory = directory
        port = str(free_port())
        self.ranks = [self._start(kind, rank, port) for rank in range(kind.ranks)]
        self.codes: dict[int, int] = {}
        self._family: dict[int, str] = {}

    def _start(self, kind: Kind, rank: int, port: str) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            log = os.open(self._directory / f"output-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            os.setsid()
            if kind.ranks > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0", LOCAL_RANK=str(rank))
            options = ["--every", EVERY, "--devices", kind.ranks, "--workers", kind.workers, "--pause", 0.01]
            train_toy.main([*map(str, [self._directory, kind.steps, *options]), *["--beside"] * kind.beside])
            code = 0
        except BaseException:  # noqa: BLE001  as at the end of a script
            sys.excepthook(*sys.exc_info())
        finally:
            _end_interpreter(code)
        raise AssertionError

    def over(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in enumerate(self.ranks):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.ranks)

    def family(self) -> dict[int, str]:
        """All processes that were seen of it: when each was started, by its number."""
        for rank, pid in enumerate(self.ranks):
            if rank not in self.codes:
                self._family.update({one: _born(one) for one in _with_descendants(pid)})
        return self._family

    def writers(self) -> list[int]:
        """Its processes that write beside training."""
        return [writer for pid in self.ranks for writer in writers(pid)]

    def left(self) -> list[int]:
        """Those of its processes that still run."""
        return [pid for pid, born in self._family.items() if born and _born(pid) == born]

    def kill(self, pids: list[int]) -> None:
        """SIGKILL for ``pids``, all at once."""
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _end_interpreter(code: int) -> None:
    """What the end of a script does; ``os._exit`` alone would leave the process groups and workers as they are."""
    import atexit
    import multiprocessing.util

    try:
        multiprocessing.util._exit_function()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code)


def writers(pid: int) -> list[int]:
    """The processes that write for the one that trains."""
    return [one for one in _with_descendants(pid) if b"writer_main" in _read(Path(f"/proc/{one}/cmdline"))]


def _with_descendants(pid: int) -> Iterator[int]:
    yield pid
    tasks: list[Path] = []
    with suppress(OSError):  # it has ended meanwhile
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    for task in tasks:
        for child in _read(task / "children").split():
            yield from _with_descendants(int(child))


def _born(pid: int) -> str:
    """When a process was started; "" if it has ended."""
    fields = _read(Path(f"/proc/{pid}/stat")).decode().rpartition(")")[2].split()
    return "" if not fields or fields[0] in "ZX" else fields[19]


def _read(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""


def losses(directory: Path, ranks: int) -> list[tuple[int, int, str]]:
    """``(rank, step, loss)`` for each step that was ever taken."""
    taken = []
    for rank in range(ranks):
        for line in _read(directory / f"losses-{rank}.txt").decode().splitlines():
            step, loss = line.split()
            taken.append((rank, int(step), loss))
    return taken


@dataclasses.dataclass
class Result:
    """What was seen."""

    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    moments: Counter[str] = dataclasses.field(default_factory=Counter)
    restarts: int = 0
    resumed: int = 0
    repeats: int = 0
    runs: int = 0
    compared: int = 0
    differences: int = 0
    slowest_survivor: float = 0.0
    slowest_end: float = 0.0
    wrong: list[str] = dataclasses.field(default_factory=list)

    def row(self, kind: Kind) -> str:
        """A line of the table."""
        how = ", ".join(f"{way} {count}" for way, count in sorted(self.kills.items()))
        when = ", ".join(f"{moment} {count}" for moment, count in sorted(self.moments.items()))
        cells = [
            kind.ranks, "async" if kind.beside else "sync", kind.workers, self.kills.total(), how, when, self.restarts,
            self.resumed, self.repeats, self.compared, self.differences, f"{self.slowest_survivor:.1f}",
            f"{self.slowest_end:.1f}", len(self.wrong),
        ]  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


COLUMNS = (
    "ranks", "saves", "workers", "kills", "how", "when", "restarts", "resumed", "said so", "steps compared", "differences",
    "slowest survivor, s", "last process gone, s", "wrong",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


class Loop:
    """Kills runs of one kind.

    Args:
        kind: What to run.
        base: Where.
        dice: Where randomness comes from.
    """

    def __init__(self, kind: Kind, base: Path, dice: random.Random) -> None:
        self._kind = kind
        self._base = base
        self._dice = dice
        self._result = Result()
        self._straight: dict[tuple[int, int], str] = {}

    def run(self, kills: int) -> Result:
        """Kill until that has happened ``kills`` times, in every way as often."""
        whole = self._base / "straight"
        self._finish(whole)
        self._straight = {(rank, step): loss for rank, step, loss in losses(whole, self._kind.ranks)}
        if len(self._straight) != self._kind.ranks * self._kind.steps:
            output = _read(whole / "output-0.txt").decode()[-3000:]
            raise RuntimeError(f"the run that nobody kills took {len(self._straight)} steps: {output}")
        ways = self._kind.ways * (-(-kills // len(self._kind.ways)))
        self._dice.shuffle(ways)
        # The first life gets somewhere.
        ways.insert(0, ways.pop(next(number for number, way in enumerate(ways) if way != "cleaning")))
        todo = ways[:kills]
        while todo:
            self._result.runs += 1
            directory = self._base / f"run-{self._result.runs}"
            directory.mkdir()
            while todo and self._steps(directory) < self._kind.steps - 10:
                self._live(directory, todo.pop(0))
            self._finish(directory)
            self._compare(directory)
        if kills and not self._result.resumed:
            self._complain(self._base, "no life has resumed: nothing was seen")
        return self._result

    # --- lives ----------------------------------------------------------------------------------------------------

    def _finish(self, directory: Path) -> None:
        """A life that nobody ends."""
        directory.mkdir(exist_ok=True)
        life = Life(self._kind, directory)
        self._watch(life, lambda: False, 300)
        self._result.restarts += 1
        if set(life.codes.values()) != {0}:
            self._complain(directory, f"a life that was not killed ended with {life.codes}")
        self._nothing_left(directory, life)

    def _live(self, directory: Path, way: str) -> None:
        checkpoints = directory / "toy" / "checkpoints"
        if way == "cleaning":
            _plant(checkpoints)
        before, met = self._steps(directory), _meetings(directory)
        life = Life(self._kind, directory)
        self._result.restarts += 1
        if way == "cleaning":
            planted = checkpoints / PLANTED
            self._watch(life, lambda: not planted.exists() or len(os.listdir(planted)) < FILES, PATIENCE, often=True)
        elif way == "writer" or not self._result.kills or self._dice.random() < 0.8:
            some = self._dice.randint(EVERY + 1, 4 * EVERY)  # so that there is something to resume from
            self._watch(life, lambda: self._steps(directory) >= before + some, PATIENCE)
            if way != "writer" and self._dice.random() < 0.5:  # a save takes little of the time
                self._watch(life, lambda: _unfinished(checkpoints), 2, often=True)
                time.sleep(self._dice.random() * 0.01)
            else:
                time.sleep(self._dice.random() * 0.15)
        else:
            if way in ("rank 0", "rank 1"):  # who has not met the other yet cannot know that it has died
                self._watch(life, lambda: _meetings(directory) > met, PATIENCE)
            time.sleep(self._dice.random())
        if life.over():
            if set(life.codes.values()) != {0}:
                self._complain(directory, f"a life ended by itself, with {life.codes}")
            return
        self._kill(directory, life, way)

    def _kill(self, directory: Path, life: Life, way: str) -> None:
        checkpoints = directory / "toy" / "checkpoints"
        pids = {
            "trainers": life.ranks,
            "rank 0": life.ranks[:1],
            "rank 1": life.ranks[1:],
            "writer": life.writers()[:1],
        }
        life.kill(pids.get(way) or list(life.family()))
        moment = "cleaning" if (checkpoints / PLANTED).exists() else "saving" if _unfinished(checkpoints) else "between"
        self._result.kills[way] += 1
        self._result.moments[moment] += 1
        if way == "writer":
            now = self._steps(directory)
            if not self._watch(
                life, lambda: self._steps(directory) >= min(now + 3 * EVERY, self._kind.steps), PATIENCE
            ):
                self._complain(directory, f"without its writer the run did not go on: {life.codes}")
            life.kill(list(life.family()))
        began = time.monotonic()
        if not self._watch(life, lambda: False, 2 * PATIENCE):
            self._complain(directory, f"the rank that was left did not end within {2 * PATIENCE:g} s")
            life.kill(list(life.family()))
            self._watch(life, lambda: False, PATIENCE)
        if way in ("rank 0", "rank 1"):
            self._result.slowest_survivor = max(self._result.slowest_survivor, time.monotonic() - began)
            survivor = life.codes[1 if way == "rank 0" else 0]
            if survivor <= 0 and self._steps(directory) < self._kind.steps:
                self._complain(directory, f"after {way} was killed, the other one ended with {survivor}")
        self._nothing_left(directory, life)

    def _watch(self, life: Life, condition: Callable[[], bool], seconds: float, *, often: bool = False) -> bool:
        """Wait until ``condition()`` holds or the life is over. Whether that came soon enough."""
        end = time.monotonic() + seconds
        looked = 0.0
        while not (life.over() or condition()):
            if time.monotonic() - looked > 0.1:
                life.family()
                looked = time.monotonic()
            if time.monotonic() > end:
                return False
            time.sleep(0.0003 if often else 0.01)
        return True

    # --- what must hold -------------------------------------------------------------------------------------------

    def _nothing_left(self, directory: Path, life: Life) -> None:
        """All that the life has started must end with it."""
        began = time.monotonic()
        while (left := life.left()) and time.monotonic() < began + PATIENCE:
            time.sleep(0.01)
        self._result.slowest_end = max(self._result.slowest_end, time.monotonic() - began)
        if left:
            what = [_read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode()[:200] for pid in left]
            self._complain(directory, f"still running after {PATIENCE:g} s: {what}")
            life.kill(left)

    def _compare(self, directory: Path) -> None:
        """The losses, and what lies in the directory of a run that was killed and has come to its end."""
        taken = losses(directory, self._kind.ranks)
        wrong = [(rank, step) for rank, step, loss in taken if self._straight.get((rank, step)) != loss]
        missing = self._straight.keys() - {(rank, step) for rank, step, _ in taken}
        self._result.compared += len(taken)
        self._result.differences += len(wrong) + len(missing)
        if wrong or missing:
            self._complain(directory, f"(rank, step) that differ: {sorted(wrong)}; that nobody took: {sorted(missing)}")
        logs = [_read(log) for log in (directory / "toy").rglob("nemo_log_globalrank-0*")]
        self._result.resumed += sum(log.count(b"resuming from") for log in logs)
        self._result.repeats += sum(log.count(b"are the same again, to the bit") for log in logs)
        if any(b"is not what it was before the run ended" in log for log in logs):
            self._complain(directory, "a life has said that a step does not repeat")
        checkpoints = directory / "toy" / "checkpoints"
        # The file of a lock stays where its owner was killed.
        found = sorted({path.name for path in checkpoints.iterdir()} - {lock.FILE})
        last = f"step={self._kind.steps}-last"
        if len(found) != 3 or last not in found or len(survey(checkpoints)) != 3:
            self._complain(directory, f"the run has left {found}")
        for name in found:
            for problem in problems(checkpoints / name):
                self._complain(directory, str(problem))

    def _steps(self, directory: Path) -> int:
        return max((step for _, step, _ in losses(directory, self._kind.ranks)), default=0)

    def _complain(self, directory: Path, what: str) -> None:
        self._result.wrong.append(f"{directory}: {what}")
        print(self._result.wrong[-1], file=sys.stderr, flush=True)


def _meetings(directory: Path) -> int:
    """How often the ranks have found each other."""
    return _read(directory / "output-0.txt").count(b"All distributed processes registered")


def _unfinished(checkpoints: Path) -> bool:
    """Whether something is being written or removed."""
    with suppress(FileNotFoundError):
        return any(name.endswith((names.UNFINISHED, ".partial", names.REPLACED)) for name in os.listdir(checkpoints))
    return False


def _plant(checkpoints: Path) -> None:
    """What a run leaves that died while it wrote a checkpoint of many files."""
    planted = checkpoints / PLANTED
    planted.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        (planted / str(number)).touch()
    names.marker(planted).touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many, of each kind of run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="of the training loader")
    parser.add_argument("--beside", action="store_true", help="save beside training")
    parser.add_argument("--both", action="store_true", help="save beside training, and not")
    parser.add_argument("--ways", nargs="+", default=[], help='how to kill, for example "rank 0"; default every way')
    parser.add_argument("--steps", type=int, default=90, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="keep everything there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # No TemporaryDirectory: each fork would remove it when it ends.
    base = options.directory or Path(tempfile.mkdtemp(prefix="kill-loop-"))
    wrong = 0
    print(HEADER, flush=True)
    try:
        for ranks, beside, workers in product(
            options.ranks, [False, True] if options.both else [options.beside], options.workers
        ):
            kind = Kind(ranks, workers, beside, options.steps, tuple(options.ways))
            place = base / f"{ranks}-{'async' if beside else 'sync'}-{workers}"
            place.mkdir(parents=True)
            result = Loop(kind, place, random.Random(f"{options.seed} {kind}")).run(options.kills)
            print(result.row(kind), flush=True)
            wrong += len(result.wrong)
    finally:
        if options.directory is None and not wrong:
            shutil.rmtree(base)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
