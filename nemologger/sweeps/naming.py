"""What a combination is called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable

# Where a run writes and how far it goes are no part of what it is: a sweep started again with more steps goes on.
NOT_IDENTITY = (
    "exp_manager.",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.log_every_n_steps",
)
_LONGEST = 120  # a file name has 255 bytes at most, and others are made from this one
_ODD = re.compile(r"[^A-Za-z0-9_.=,+-]+")


def job_name(overrides: Iterable[str], *, swept: Collection[str] = (), excluded: Collection[str] = ()) -> str:
    """A name for a combination, fit for a directory, that depends on its overrides alone.

    Args:
        overrides: ``key=value`` each; their order does not matter.
        swept: Keys that differ between the combinations: always part of the name.
        excluded: Keys, or prefixes that end with a dot, that are not part of it.

    Returns:
        The overrides, sorted. Where that cannot be a short directory name, a readable part of it and a hash of it all.

    Example:
        >>> job_name(["seed=1", "+model.lr=0.1", "trainer.max_steps=9"], excluded=["trainer."])
        'model.lr=0.1,seed=1'
        >>> job_name(["data=/mnt/a b"])
        'data=_mnt_a_b-409451b9'
    """
    kept = sorted(o.lstrip("+") for o in overrides if key_of(o) in swept or not _is_in(key_of(o), excluded))
    text = ",".join(kept) or "defaults"
    readable = _ODD.sub("_", text).lstrip("._-") or "job"
    if readable == text and len(text) <= _LONGEST:
        return text
    return f"{readable[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def key_of(override: str) -> str:
    """What an override sets, without Hydra's prefixes.

    Example:
        >>> key_of("++model.lr=0.1")
        'model.lr'
    """
    return override.split("=", 1)[0].lstrip("+~")


def _is_in(key: str, excluded: Collection[str]) -> bool:
    return any(key == other or (other.endswith(".") and key.startswith(other)) for other in excluded)
