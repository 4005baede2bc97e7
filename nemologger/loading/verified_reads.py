"""What is wrong with a checkpoint that a run is to go on from, found out before it is loaded, by all ranks together."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Generator
from pathlib import Path

from nemologger.checkpoint.reading.load import Opened, open_verified
from nemologger.checkpoint.verify import Problem, are_seen, merged, problems, verifying
from nemologger.errors import NemologgerError, RankError
from nemologger.ranks import Ranks

log = logging.getLogger(__name__)

Seen = tuple[str, list[Problem]]
Ask = Callable[[Path], list[Seen]]


def faults(checkpoint: Path) -> list[str]:
    """What is wrong with the files of ``checkpoint``, found out by this process alone."""
    return [str(problem) for problem in problems(checkpoint)]


class VerifiedReads:
    """Verifies checkpoints before one of them is loaded.

    A process alone verifies a checkpoint by loading it, and keeps what it has loaded last: one pass over the files instead
    of two. Several share the files out among themselves: rank 0 alone would read for hours what all of them have written.

    Args:
        ranks: The processes.
        keep: Of a checkpoint, the flat keys of the tensors that a process alone keeps; None to keep nothing at all.
    """

    def __init__(self, ranks: Ranks, keep: Callable[[Path], Callable[[str], bool]] | None) -> None:
        self._ranks = ranks
        self._keep = keep if ranks.world_size == 1 else None
        self.checkpoints: dict[Path, Opened] = {}

    def share(self, checkpoint: Path) -> Generator[int, None, Seen]:
        """What this rank does when rank 0 asks for all of them; the name of its host, and what it has found."""
        found = yield from verifying(checkpoint, rank=self._ranks.rank, world_size=self._ranks.world_size)
        return socket.gethostname(), found

    def progress(self, remaining: int) -> None:
        """Say how far it is."""
        log.info("verifying the checkpoint to resume from: %.1f GB still to read", remaining / 1e9)

    def faults(self, checkpoint: Path, ask: Ask) -> list[str]:
        """What is wrong with the files of ``checkpoint``, which is kept if it is nothing. On rank 0.

        Raises:
            RankError: If another rank does not read what rank 0 reads.
        """
        if self._keep is None:
            return self.faults_only(checkpoint, ask)
        self.checkpoints.clear()
        try:
            self.checkpoints[checkpoint] = open_verified(checkpoint, self._keep(checkpoint))
        except NemologgerError:  # all that is wrong is to be said; if nothing is, loading says again why it cannot
            return self.faults_only(checkpoint, ask)
        return []

    def faults_only(self, checkpoint: Path, ask: Ask) -> list[str]:
        """As :meth:`faults`, and keep nothing."""
        seen = ask(checkpoint)
        found = merged(problems for _, problems in seen)
        if found and not seen[0][1] and not are_seen(checkpoint, found):
            rank, (host, theirs) = next((rank, one) for rank, one in enumerate(seen) if one[1])
            raise RankError(
                f"rank {rank} on {host} does not read {checkpoint} as it was written: {theirs[0]}. Rank 0 on {seen[0][0]} "
                f"does, so the checkpoint is whole. Look at the file system and the memory of {host}, or leave it out of "
                "the run; nothing was loaded."
            )
        return [str(problem) for problem in found]
