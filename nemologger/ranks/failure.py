"""An exception on its way to the other ranks."""

from __future__ import annotations

from dataclasses import dataclass

from nemologger.errors import NemologgerError, RankError


@dataclass(frozen=True)
class Failure:
    """What is told of it."""

    kind: type[NemologgerError]
    message: str

    @staticmethod
    def of(error: BaseException, rank: int) -> Failure:
        """``error`` as it will be seen by the others."""
        if isinstance(error, NemologgerError):
            return Failure(type(error), str(error))
        return Failure(RankError, f"rank {rank}: {type(error).__name__}: {error}")

    def error(self, rank: int | None = None) -> NemologgerError:
        """The exception to raise, naming ``rank`` if one is given."""
        named = rank is None or self.message.startswith(f"rank {rank}: ")
        return self.kind(self.message if named else f"rank {rank}: {self.message}")
