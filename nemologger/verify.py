"""Check a checkpoint, or all those of a run or of several runs: ``python -m nemologger.verify PATH``.

Exit code 0: all whole; 1: something is damaged or unfinished; 2: there is no checkpoint at PATH, or it cannot be reached.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemologger import names
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.find import Status, inspect, survey
from nemologger.checkpoint.verify import Problem, problems
from nemologger.disk.there import exists, is_dir, is_symlink
from nemologger.errors import ConfigurationError, DamagedCheckpointError, NotFoundError, UnfinishedCheckpointError
from nemologger.stores.path import storage_path

_DEPTH = 3  # of a checkpoint's run below a directory of experiments: name, version, and one for a sweep


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_checkpoint` found.

    Attributes:
        path: The checkpoint.
        files: Size in bytes of every file it consists of, as it was written.
        problems: What is wrong, file by file; empty if nothing.
        deep: Whether every byte was read.
    """

    path: Path
    files: dict[str, int]
    problems: tuple[Problem, ...]
    deep: bool

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify_checkpoint(
    path: str | Path, deep: bool = True, *, storage_options: Mapping[str, Any] | None = None
) -> Verification:
    """Check that every byte of a checkpoint is the one that was written. Changes nothing.

    Args:
        path: A checkpoint's directory, or its ``weights/``; also a URL.
        deep: Read all files and compare checksums; else only look at their sizes.
        storage_options: For a URL, what the fsspec file system takes beyond the usual environment.

    Raises:
        NotFoundError: If there is no checkpoint at ``path``.
        UnfinishedCheckpointError: If it was never finished.
        DamagedCheckpointError: If its manifest is missing or damaged, so that the files cannot be told.

    Example:
        >>> verify_checkpoint("runs/demo/checkpoints/gone")
        Traceback (most recent call last):
        nemologger.errors.NotFoundError: there is no checkpoint at runs/demo/checkpoints/gone
    """
    checkpoint = storage_path(path, storage_options, "path")
    if checkpoint.name in (names.WEIGHTS, names.EMA_WEIGHTS):
        checkpoint = checkpoint.parent
    if not is_dir(checkpoint) and exists(checkpoint):
        raise DamagedCheckpointError(
            f"{checkpoint} is a file: only checkpoints of nemologger, directories, can be verified"
        )
    if not is_dir(checkpoint):
        raise NotFoundError(f"there is no checkpoint at {path}")
    found = inspect(checkpoint)
    if found.status is Status.UNFINISHED:
        raise UnfinishedCheckpointError(f"{checkpoint} was never finished, or was being removed: {found.why}")
    if found.status is Status.FOREIGN and not any(exists(checkpoint / part) for part in (names.WEIGHTS, names.CONTEXT)):
        raise NotFoundError(
            f"{path} is no checkpoint: it has neither {names.MANIFEST} nor {names.WEIGHTS}/. `python -m nemologger.verify` "
            "finds those below a directory"
        )
    if found.status is Status.FOREIGN:
        raise DamagedCheckpointError(f"{checkpoint} has no {names.MANIFEST}: nemologger did not write it")
    if found.manifest is None:
        raise DamagedCheckpointError(f"{checkpoint}: {found.why}")
    files = {name: record.size for name, record in found.manifest.files.items()}
    return Verification(checkpoint, files, tuple(problems(checkpoint, deep=deep)), deep)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nemologger.verify", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "path", nargs="+", help="a checkpoint, a run directory, or one with several of them; also a URL"
    )
    parser.add_argument("--shallow", action="store_true", help="compare sizes only, do not read the files")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        checkpoints = []
        for path in options.path:
            found = list(_checkpoints(storage_path(path)))
            if not found:
                raise NotFoundError(f"there is no checkpoint at {path}")
            checkpoints += found
        # Each is checked on its own, so that one damaged manifest does not hide the others.
        codes = [_report(console, checkpoint, deep=not options.shallow) for checkpoint in checkpoints]
        if len(codes) > 1:
            _sum_up(console, checkpoints, codes)
    except (ConfigurationError, NotFoundError) as error:
        codes, why = [], str(error)
    except OSError as error:
        codes, why = [], f"{error.filename or options.path[0]} cannot be read: {error.strerror or error}"
    if not codes:
        console.print(why, style="red", markup=False, soft_wrap=True)
        return 2
    return max(codes)


def _checkpoints(path: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The checkpoint ``path``, those in it, or those of the runs below it."""
    is_file = path.suffix == ".ckpt" and exists(path)
    if is_file or path.name == names.WEIGHTS or any(exists(path / part) for part in (names.MANIFEST, names.WEIGHTS)):
        yield path
    elif is_dir(path):
        found = [one.path for one in survey(path)]
        yield from (one for one in found if not is_symlink(one))
        for below in sorted(path.iterdir()) if depth else ():
            if below not in found and is_dir(below) and not is_symlink(below) and not below.name.startswith("."):
                yield from _checkpoints(below, depth - 1)


def _report(console: Console, checkpoint: Path, *, deep: bool) -> int:
    try:
        result = verify_checkpoint(checkpoint, deep)
    except (NotFoundError, UnfinishedCheckpointError, DamagedCheckpointError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    manifest = manifests.read(result.path)
    wrong = {problem.file: problem.what for problem in result.problems}
    without = "" if manifest.has_optimizer else ", no optimizer state"
    # A title of the table would be broken to its width, in the middle of the path.
    title = f"{checkpoint} (step {manifest.step}{without}), {sum(result.files.values()):,} bytes"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    table = Table("file", "bytes", "")
    for file, size in result.files.items():
        state = (
            f"[red]{wrong[file]}[/red]" if file in wrong else "[green]ok[/green]" if deep else "[green]size ok[/green]"
        )
        table.add_row(file, f"{size:,}", state)
    console.print(table)
    return 0 if result.ok else 1


def _sum_up(console: Console, checkpoints: Sequence[Path], codes: Sequence[int]) -> None:
    wrong = [str(checkpoint) for checkpoint, code in zip(checkpoints, codes, strict=True) if code]
    console.print(f"{len(codes)} checkpoints: {len(codes) - len(wrong)} ok, {len(wrong)} not", highlight=False)
    for path in wrong:
        console.print(f"not ok: {path}", style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
