"""What the author of a section should know about its translation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Note:
    """A remark on one key.

    Attributes:
        key: The key, without ``exp_manager.``.
        text: A predicate: ``"has no effect: ..."``.
        kind: ``"told"``: it works otherwise than in NeMo 1. ``"warned"``: it does not do what was asked for.
            ``"refused"``: the run would not be what was asked for, and is not started.
    """

    key: str
    text: str
    kind: str

    def __str__(self) -> str:
        return f"exp_manager.{self.key} {self.text}"


@dataclass
class Notes:
    """The remarks on a section."""

    notes: list[Note] = field(default_factory=list)

    def tell(self, key: str, text: str) -> None:
        """Something works otherwise than in NeMo 1."""
        self.notes.append(Note(key, text, "told"))

    def warn(self, key: str, text: str) -> None:
        """Something does not do what was asked for."""
        self.notes.append(Note(key, text, "warned"))

    def refuse(self, key: str, text: str) -> None:
        """The run would not be what was asked for."""
        self.notes.append(Note(key, text, "refused"))

    def of(self, *kinds: str) -> list[Note]:
        """Those of the given kinds."""
        return [note for note in self.notes if note.kind in kinds]
