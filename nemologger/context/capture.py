"""Constructor arguments, captured while the object is made.

The arguments are taken in ``__new__``: Python hands it those of the outermost constructor, whatever chain of ``__init__``
follows, and a class made by ``@dataclass`` has no other place where they pass. No frame is added to ``__init__``, where
Lightning's ``save_hyperparameters`` looks around.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import fiddle as fdl

from nemologger.context import configs
from nemologger.context.record import Capture, attach, captured
from nemologger.context.snapshot import Memo, snapshot
from nemologger.context.uncaptured import type_name
from nemologger.errors import ConfigurationError, ContextError

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


class CapturedConfig:
    """The attribute ``__io__``: the ``fdl.Config`` of the call that made the object."""

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        capture = captured(instance)
        if capture is None or capture.config is None:
            reason = "of a class" if instance is None else (capture and capture.error) or "were not captured"
            raise AttributeError(f"the constructor arguments {reason}")
        return capture.config

    def __set__(self, instance: object, value: Any) -> None:
        if not isinstance(value, fdl.Buildable):
            raise ConfigurationError(f"__io__ must be an fdl.Config, not {type_name(value)}")
        attach(instance, Capture(value))


class ConstructorSignature:
    """The attribute ``__signature__``: that of ``__init__``, which ``__new__(*args, **kwargs)`` would hide."""

    def __get__(self, instance: object | None, owner: type[Any]) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        signature = configs.signature_of(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def new(cls: type[T], original: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Make an instance of ``cls`` by its ``__new__``, ``original``, and leave the arguments with it."""
    if original is not object.__new__:
        instance = original(cls, *args, **kwargs)
    elif cls.__init__ is object.__init__ and (args or kwargs):
        # Python raises this itself, but not for a class that has a __new__.
        raise TypeError(f"{cls.__name__}() takes no arguments")
    else:
        instance = object.__new__(cls)
    if isinstance(instance, cls):
        capture_call(instance, type(instance), args, kwargs)
    return instance


def capture_call(instance: object, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Leave with ``instance`` that it was made by this call of ``target``. Never raises: the object comes first."""
    try:
        signature = configs.signature(target)
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return  # the constructor is about to say so; or this is a copy being made, which gets its capture anyway
        memo: Memo = {}
        args = tuple(snapshot(argument, memo) for argument in args)
        kwargs = {name: snapshot(argument, memo) for name, argument in kwargs.items()}
        capture = Capture(configs.make(fdl.Config, target, configs.bind(signature, args, kwargs)))
    except Exception as error:  # noqa: BLE001  said when the context is written
        capture = Capture(None, f"could not be captured: {type(error).__name__}: {error}")
    attach(instance, capture)


def is_tracked(cls: type) -> bool:
    """Whether the arguments of ``cls`` are captured."""
    return isinstance(inspect.getattr_static(cls, "__io__", None), CapturedConfig)


@overload
def track_io(target: type[T], artifacts: Sequence[Any] = ()) -> type[T]: ...
@overload
def track_io(target: C, artifacts: Sequence[Any] = ()) -> C: ...


def track_io(target: Any, artifacts: Sequence[Any] = ()) -> Any:
    """Let a class or a factory function capture the arguments it is called with, as ``IOMixin`` does.

    For classes of other libraries; subclasses are tracked with them. Calling it again changes nothing. Objects that exist
    already are not captured.

    Args:
        target: A class, which is changed in place; a function, of which a capturing one is returned (what it returns must
            have a ``__dict__``); or any other object, whose class is meant.
        artifacts: ``FileArtifact`` and ``DirArtifact`` of the class: arguments that name files to keep with the context.

    Returns:
        ``target``, or the capturing function.

    Raises:
        ConfigurationError: If the class cannot be changed, because it is written in C.

    Example:
        >>> class Theirs:
        ...     def __init__(self, size, name="x"): ...
        >>> track_io(Theirs)(3).__io__
        <Config[Theirs(size=3)]>
    """
    if isinstance(target, (types.FunctionType, types.BuiltinFunctionType)):
        return _track_function(target)
    cls: Any = target if isinstance(target, type) else type(target)
    try:
        if artifacts:
            cls.__io_artifacts__ = list(artifacts)
        if not is_tracked(cls):
            _track_class(cls)
    except TypeError as error:
        raise ConfigurationError(
            f"{cls.__module__}.{cls.__qualname__} cannot be tracked: {error}. Derive a class from it and IOMixin instead."
        ) from error
    return target


def _track_class(owner: Any) -> None:
    own = vars(owner).get("__new__")
    signature_is_own = "__signature__" in vars(owner)

    def __new__(cls: type[T], /, *args: Any, **kwargs: Any) -> T:
        return new(cls, own.__func__ if own is not None else super(owner, cls).__new__, args, kwargs)

    owner.__new__ = __new__
    owner.__io__ = CapturedConfig()
    if not signature_is_own:
        owner.__signature__ = ConstructorSignature()


def _track_function(function: Any) -> Any:
    if getattr(function, "__io_tracked__", False):
        return function

    @functools.wraps(function)
    def capturing(*args: Any, **kwargs: Any) -> Any:
        memo: Memo = {}
        given = tuple(snapshot(argument, memo) for argument in args)
        named = {name: snapshot(argument, memo) for name, argument in kwargs.items()}
        made = function(*args, **kwargs)
        capture_call(made, capturing, given, named)
        return made

    capturing.__io_tracked__ = True  # type: ignore[attr-defined]
    return capturing


def reinit(instance: T) -> T:
    """Make a fresh object from the arguments that ``instance`` was made with, nested ones included.

    Raises:
        ContextError: If they were not captured.

    Example:
        >>> @track_io
        ... class Box:
        ...     def __init__(self, items): self.items = items
        >>> box = Box([1])
        >>> box.items.append(2)
        >>> reinit(box).items
        [1]
    """
    capture = captured(instance)
    if capture is None or capture.config is None:
        reason = (capture and capture.error) or "its class neither inherits IOMixin nor was given to track_io"
        raise ContextError(f"cannot make another {type_name(instance)}: {reason}")
    made: T = fdl.build(configs.copy(capture.config))
    return made
