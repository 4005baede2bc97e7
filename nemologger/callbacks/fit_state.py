"""What ExactResume saves: of a fit as a whole, and of each of its ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nemologger.exact.loaders.session import Place
from nemologger.exact.program.built import Built
from nemologger.exact.program.made import Made, without
from nemologger.lightning_port import PlateauSteps

_FORMAT = 1


@dataclass(frozen=True)
class RankState:
    """What one rank adds to a checkpoint.

    Attributes:
        place: Where its loaders and generators are.
        program: What the program has changed there beside weights; None before training starts.
        buffers: Those that are not rank 0's.
        made: What the program had made before training.
    """

    place: Place
    program: dict[str, Any] | None = None
    buffers: dict[str, Any] = field(default_factory=dict)
    made: Made = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        return self.place.to_plain() | {"program": self.program, "buffers": self.buffers, "made": self.made}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> RankState:
        """What :meth:`to_plain` was made of."""
        place, program = Place.from_plain(plain), plain.get("program")
        return RankState(place, program, plain.get("buffers", {}), plain.get("made", {}))

    def made_once(self) -> Made:
        """What the program had made, but for what training then changed: that is brought back, or has been named."""
        program = self.program or {"attributes": {"attributes": {}}}
        return without(self.made, program["attributes"]["attributes"], program.get("lost", ()))

    def on_other_ranks(self, rank: int, before: int, now: int, device: torch.device) -> RankState:
        """That of ``rank`` of ``now`` ranks, where there were ``before``: much was of those."""
        program = None if self.program is None else {**self.program, "logged": None}
        return RankState(self.place.on_other_ranks(rank, before, now, device), program)


@dataclass(frozen=True)
class FitState:
    """What a checkpoint says of a fit.

    Attributes:
        epoch_over: Whether an epoch had been trained, but for what ends it.
        raised: None unless an exception had ended it: whether a validation was due.
        reload_epoch: The epoch that the training loaders were made in.
        plateau: Schedules that were yet to be stepped.
        data: What each training loader read.
        names: The order of names in that.
        workers: Whether processes of its own loaded it.
        gradient_order: The order in which gradients were summed over ranks, where that matters.
        readers: How many ranks read data of their own.
        built: What optimizers and schedules had been made with.
        ranks: What each rank has added, as plain types, or packed. None on other ranks than 0.
    """

    epoch_over: bool
    raised: bool | None
    reload_epoch: float
    plateau: PlateauSteps
    data: list[dict[str, Any]]
    names: list[Made]
    workers: list[bool]
    gradient_order: list[str]
    readers: int
    built: Built
    ranks: list[bytes | dict[str, Any]] | None

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        return {"format": _FORMAT, **vars(self), "plateau": asdict(self.plateau)}

    @staticmethod
    def from_plain(plain: dict[str, Any] | None) -> FitState | None:
        """What :meth:`to_plain` was made of; None if it is nothing, or of a format to come."""
        if not plain or plain.get("format") != _FORMAT:
            return None
        return FitState(
            epoch_over=plain["epoch_over"],
            raised=plain.get("raised"),
            reload_epoch=plain["reload_epoch"],
            plateau=PlateauSteps(**plain["plateau"]),
            data=plain["data"],
            names=plain.get("names", []),
            workers=plain.get("workers", []),
            gradient_order=plain.get("gradient_order", []),
            readers=plain.get("readers", len(plain["ranks"] or ())),
            built=plain.get("built", {}),
            ranks=plain["ranks"],
        )
