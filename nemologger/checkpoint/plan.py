"""What every rank writes, and where: decided once for a run, the same in every save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import xxhash

from nemologger import names
from nemologger.checkpoint.shards import held, local, part_of
from nemologger.checkpoint.shares import Part, Piece, into_files, share_of
from nemologger.checkpoint.snapshot import Snapshot
from nemologger.checkpoint.weights import Entry, Place, entries, lay_out, metadata
from nemologger.errors import CheckpointError
from nemologger.ranks import Ranks, together_at_zero


@dataclass(frozen=True)
class Plan:
    """One rank's plan.

    Attributes:
        outline: Of the snapshots that it is for.
        parts: What this rank holds of each tensor.
        files: For each of its files, the places of its pieces.
        metadata: ``.metadata`` of all ranks; on rank 0 only.
    """

    outline: str
    parts: Mapping[str, Part]
    files: Mapping[str, list[Place]]
    metadata: bytes

    def reader(self, snapshot: Snapshot) -> Callable[[Piece], torch.Tensor]:
        """What gives the values of a piece, as a view of the live tensor."""
        here = {key: local(tensor) for key, tensor in snapshot.tensors.items()}
        return lambda piece: part_of(here[piece.key], piece, self.parts[piece.key].offsets)


class Planner:
    """Makes plans, and keeps the latest.

    Args:
        ranks: The processes that write together.
        files_per_rank: At most so many ``.distcp`` files for each rank.
    """

    def __init__(self, ranks: Ranks, files_per_rank: int = 2) -> None:
        self._ranks = ranks
        self._files_per_rank = files_per_rank
        self._plan: Plan | None = None

    def plan(self, snapshot: Snapshot) -> Plan:
        """The plan for ``snapshot``. Collective; without a new plan, one short exchange.

        Raises:
            CheckpointError: On every rank, if the ranks do not hold the same tensors, or one cannot be written.
        """
        outline = snapshot.outline
        plan = self._plan
        known = plan is not None and plan.outline == outline
        if self._ranks.exchange(known, all) and plan is not None:
            return plan
        mine: list[tuple[dict[str, Part], dict[str, list[Place]]]] = []

        def lay() -> tuple[str, list[Entry]]:
            parts = {key: held(tensor, key) for key, tensor in snapshot.tensors.items()}
            files = files_of(self._ranks.rank, self._ranks.world_size, parts, snapshot, self._files_per_rank)
            mine.append((parts, files))
            return xxhash.xxh3_64_hexdigest(outline.encode()), entries_of(files)

        shares = together_at_zero(self._ranks, lay)
        described = together_at_zero(self._ranks, lambda: _described(snapshot, shares))
        self._plan = Plan(outline, *mine[0], described[0] if described else b"")
        return self._plan


def files_of(
    rank: int, world_size: int, parts: Mapping[str, Part], snapshot: Snapshot, files_per_rank: int
) -> dict[str, list[Place]]:
    """The files of ``rank``, and the places of the pieces in each."""
    groups = into_files(share_of(rank, world_size, parts, snapshot.rank_zero), files_per_rank)
    return {names.shard(rank, i): lay_out(group, snapshot.tensors) for i, group in enumerate(groups)}


def entries_of(files: Mapping[str, list[Place]]) -> list[Entry]:
    """What ``.metadata`` says of ``files``."""
    return [entry for name, places in files.items() for entry in entries(name, places)]


def _described(snapshot: Snapshot, shares: list[tuple[str, list[Entry]]]) -> bytes:
    """``.metadata``, on rank 0."""
    different = [rank for rank, (outline, _) in enumerate(shares) if outline != shares[0][0]]
    if different:
        raise CheckpointError(
            f"ranks {different} hold other tensors than rank 0 (names, shapes, dtypes or sharding differ): the model or its "
            "optimizer is not the same on all ranks"
        )
    stored = [entry for _, share in shares for entry in share]
    return metadata(snapshot.tensors, snapshot.paths, stored) if shares else b""
