"""All generators that the batches of a stream may be drawn from, at one moment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nemologger.exact.program.generators import set_states, states_of
from nemologger.exact.reach.look import Look
from nemologger.exact.rng import RngState
from nemologger.exact.values import contents

_OF_PROCESS = ("python", "numpy", "torch")


@dataclass(frozen=True)
class Moment:
    """The states of generators.

    Attributes:
        rng: Those of the process.
        own: Those that the stream keeps, by path.
    """

    rng: RngState
    own: dict[str, Any]

    @staticmethod
    def of(roots: Mapping[str, Any]) -> Moment:
        """This moment, for a stream that consists of ``roots``."""
        return Moment(RngState.capture(), states_of(Look(roots)))

    def moved_since(self, earlier: Moment) -> set[str]:
        """The names of those that are in another state than they were ``earlier``."""
        then = earlier.digests()
        return {name for name, digest in self.digests().items() if then.get(name) != digest}

    def restore(self, roots: Mapping[str, Any], names: Collection[str]) -> None:
        """Set those that have one of ``names`` to this state."""
        ours = {name: getattr(self.rng, name) for name in _OF_PROCESS if name in names}
        replace(RngState.capture(), **ours).restore()
        set_states(Look(roots), {path: state for path, state in self.own.items() if path in names})

    def to_plain(self) -> dict[str, Any]:
        """As plain types."""
        return {"rng": self.rng.to_plain(), "own": self.own}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Moment:
        """What :meth:`to_plain` was made of."""
        return Moment(RngState.from_plain(plain["rng"]), plain["own"])

    def digests(self) -> dict[str, int]:
        """A number for each, by name."""
        of_process = {name: getattr(self.rng, name) for name in _OF_PROCESS}
        return {name: contents.fingerprint(state) for name, state in {**of_process, **self.own}.items()}
