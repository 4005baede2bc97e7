"""``IOMixin``: a base class whose instances know the arguments they were made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from nemologger.context.artifacts import FileArtifact
from nemologger.context.capture import CapturedConfig, ConstructorSignature, new
from nemologger.context.dump import dump_context
from nemologger.context.hparams import why_not
from nemologger.context.record import captured
from nemologger.context.uncaptured import type_name
from nemologger.disk import Disk
from nemologger.errors import ContextError

T = TypeVar("T")


def forget_argument(instance: object, name: str) -> None:
    """Leave an argument that ``instance`` was made with out of what is kept of it: a secret."""
    capture = captured(instance)
    if capture is not None and capture.config is not None and name in capture.config.__arguments__:
        delattr(capture.config, name)


class IOMixin:
    """Inherit this, beside any other class, and the constructor's arguments are kept as ``__io__``, an ``fdl.Config``.

    Only arguments that were passed are kept, as they were at that moment. Arguments that are captured objects, partials or
    dataclass instances become configs themselves; an ``fdl.Config`` that was passed is built with the rest. Set
    ``__io_artifacts__`` to a list of :class:`FileArtifact` and :class:`DirArtifact` for arguments that name files.

    Example:
        >>> class Tokenizer(IOMixin):
        ...     def __init__(self, lower=True): ...
        >>> class Model(IOMixin):
        ...     def __init__(self, width, tokenizer=None, depth=2): ...
        >>> Model(8, Tokenizer(lower=False)).__io__
        <Config[Model(width=8, tokenizer=<Config[Tokenizer(lower=False)]>)]>
    """

    __io__: Any = CapturedConfig()
    __io_artifacts__: Sequence[FileArtifact] = ()
    # Declared as what it is for the class; inspect.signature asks for it there.
    __signature__: Any = ConstructorSignature()

    def __new__(cls: type[T], /, *args: Any, **kwargs: Any) -> T:
        """Make the instance, and take down the arguments on their way to ``__init__``."""
        return new(cls, super().__new__, args, kwargs)  # type: ignore[misc]

    @classmethod
    def io_artifacts(cls) -> Sequence[FileArtifact]:
        """The arguments that name files to keep with the context."""
        return cls.__io_artifacts__

    def io_dump(
        self,
        output: str | Path,
        yaml_attrs: Sequence[str] = (),
        *,
        disk: Disk | None = None,
        strict: bool = True,
    ) -> None:
        """Write the captured arguments into the directory ``output``, so that ``load_context`` makes the object again.

        Until it is complete, the directory has no ``io.json``. A context that was there is replaced. An argument that
        cannot be written is left out with a warning that names it, the others are kept.

        Args:
            output: The directory, made if need be.
            yaml_attrs: Arguments to write as ``<name>.yaml`` too, to be read by people.
            disk: Where to write; the local file system by default.
            strict: Raise for an artifact that is required and not there. False: warn, and keep everything else.

        Raises:
            ContextError: If the arguments were not captured or a required artifact is missing. Nothing is written then.
            OSError: If the disk fails.

        Example:
            >>> import tempfile
            >>> from nemologger.io import TrainerContext
            >>> IOMixin.io_dump(TrainerContext(model=None, trainer=None), tempfile.mkdtemp())
        """
        capture = captured(self)
        if capture is None or capture.config is None:
            raise ContextError(f"{type_name(self)} cannot be written: {why_not(self)}")
        dump_context(
            capture.config,
            output,
            yaml_attrs,
            disk=disk,
            strict=strict,
            owner=self._io_owner(),
            minor=self._io_minor(strict),
        )

    def _io_minor(self, strict: bool) -> tuple[str, ...]:
        """What the paths of values begin with whose loss is hardly worth a word."""
        return ()

    def _io_owner(self) -> object:
        """The object that lives as long as the run, by which a warning is given once."""
        return self
