"""What saves beside training need on every rank: a plan, memory, and a process that writes from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from nemologger.checkpoint.state.shards import local
from nemologger.checkpoint.state.snapshot import Snapshot
from nemologger.checkpoint.writing.arena import Arena
from nemologger.checkpoint.writing.ending import cause_of
from nemologger.checkpoint.writing.memory_left import check_memory
from nemologger.checkpoint.writing.plan import Plan, Planner
from nemologger.checkpoint.writing.staging import StagingMode
from nemologger.checkpoint.writing.writer import Writer
from nemologger.errors import SaveFailedError, SilentRankError
from nemologger.ranks import Ranks, all_together, together_at_zero

log = logging.getLogger(__name__)

#: The ranks tell each other so often, in seconds, that they wait: far more often than one is taken for dead.
TURN = 1.0


@dataclass(frozen=True)
class Layout:
    """What does not change from save to save, but for a writer that has died."""

    plan: Plan
    arena: Arena
    writer: Writer


class Equipment:
    """Makes all of it when it is needed, and keeps it from save to save.

    Args:
        planner: Says what each rank writes.
        ranks: The processes that write together.
        staging: When the state is copied: see :class:`~nemologger.checkpoint.writing.async_saver.AsyncSaver`.

    Attributes:
        layout: What there is, if it is.
    """

    def __init__(self, planner: Planner, ranks: Ranks, staging: StagingMode) -> None:
        self._planner = planner
        self._ranks = ranks
        self._staging = staging
        self.layout: Layout | None = None
        self._has_fitted = False

    @property
    def has_writer(self) -> bool:
        """Whether the writer process can be given jobs."""
        return self.layout is not None and self.layout.writer.alive

    @property
    def heard(self) -> int:
        """How often it has said how far it is."""
        return self.layout.writer.heard if self.layout is not None else 0

    def overlaps(self, snapshot: Snapshot) -> bool:
        """Whether training goes on while ``snapshot`` is copied."""
        return self._staging == "overlapped" or (self._staging == "auto" and _on_cuda(snapshot))

    def overlap_no_more(self) -> None:
        """The copies of a save have failed: training waits for those to come."""
        if self._staging != "at_once":
            self._staging = "at_once"
            log.warning("the saves to come are staged at once")

    def prepare(self, snapshot: Snapshot) -> Layout:
        """Make memory and writer for saves of this shape. Collective; nothing to do if they are there.

        A writer that has died since the save before is replaced, on its rank alone.

        Raises:
            SaveFailedError: If that failed on any rank.
        """
        try:
            plan = self._planner.plan(snapshot)
            fits = self.layout is not None and self.layout.plan is plan
            all_fit, all_write = self._ranks.exchange((fits, fits and self.has_writer), min)
            if not all_fit:
                self.close()
                self._check_memory(plan, snapshot)
                together_at_zero(self._ranks, lambda: self._make(plan, snapshot))
            elif not all_write:
                together_at_zero(self._ranks, self._replace_writer)
            # A process that takes its time to start, on one rank, is no reason for the others to take that one for dead.
            while not all_together(self._ranks, self._writer_begins):
                pass
        except SilentRankError:
            raise
        except Exception as error:  # also that no thread can be started, or no memory be had
            self.close()
            raise SaveFailedError(f"saving beside training could not be set up: {cause_of(error)}") from error
        if self.layout is None:
            raise SaveFailedError("saving beside training could not be set up")
        return self.layout

    def kill_writer(self) -> None:
        """End the writer process, whatever it does; the next save gets another one."""
        if self.layout is not None:
            self.layout.writer.kill()

    def close(self) -> None:
        """Give back the memory, and end the writer process."""
        layout = self.layout
        if layout is not None:
            layout.writer.close()  # Ctrl-C may end this: give_up() goes on then
            self.layout = None
            layout.arena.close()

    def _check_memory(self, plan: Plan, snapshot: Snapshot) -> None:
        """Once in a run: later it has had the memory, and no save is to fail for a guess of how much is left."""
        if not self._has_fitted:
            check_memory(self._ranks, plan.nbytes, steps_on_host=not _on_cuda(snapshot))
            self._has_fitted = True

    def _make(self, plan: Plan, snapshot: Snapshot) -> None:
        arena = Arena(plan.files, snapshot.tensors)
        try:
            self.layout = Layout(plan, arena, Writer(arena, plan.metadata))
        except BaseException:
            arena.close()
            raise
        log.info(
            "saving beside training takes %.0f MB of memory on this rank while the run lasts (its share of a state "
            "of %.0f MB)",
            arena.size / 1e6,
            snapshot.nbytes / 1e6,
        )

    def _writer_begins(self) -> bool:
        return self.layout is not None and self.layout.writer.begins(TURN)

    def _replace_writer(self) -> None:
        """On a rank that has lost its own."""
        layout = self.layout
        if layout is not None and not self.has_writer:
            log.warning("the writer process %d has died, or was ended: another one is started", layout.writer.pid)
            layout.writer.close()
            self.layout = replace(layout, writer=Writer(layout.arena, layout.plan.metadata))


def _on_cuda(snapshot: Snapshot) -> bool:
    return any(local(tensor).is_cuda for tensor in snapshot.tensors.values())
