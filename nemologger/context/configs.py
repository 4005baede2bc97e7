"""Fiddle's ``Config`` and ``Partial``, taken apart and put together: the only place that knows how they are laid out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import fiddle as fdl
from fiddle import daglish
from fiddle._src import signatures

if sys.version_info >= (3, 14):
    from annotationlib import Format

Arguments = dict["str | int", Any]


def make(kind: type[Any], target: Callable[..., Any], arguments: Mapping[str | int, Any]) -> Any:
    """A ``kind`` (``fdl.Config`` or ``fdl.Partial``) of ``target`` with ``arguments``, which are not checked.

    Fiddle's own constructor would also record where each argument was set, and evaluate the annotations of ``target``.
    """
    signature(target)
    metadata = fdl.BuildableTraverserMetadata(target, tuple(arguments), {}, {})
    return kind.__unflatten__(tuple(arguments.values()), metadata)


def config(target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """An ``fdl.Config`` of ``target`` with the arguments of a call.

    Raises:
        TypeError: If ``target`` does not take these arguments.
    """
    return make(fdl.Config, target, bind(signature(target), args, kwargs, partial=True))


def signature(target: Callable[..., Any]) -> inspect.Signature:
    """The signature under which fiddle will call ``target``."""
    try:
        known: inspect.Signature = signatures.get_signature(target)
    except NameError:  # of an annotation; fiddle would fail in the same way whenever it meets ``target``
        known = signature_of(target)
        signatures._signature_cache[target] = known  # noqa: SLF001  nothing public tells it
    return known


def signature_of(target: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``target``, whatever its annotations name.

    Since Python 3.14 they are evaluated when somebody asks for them, and may name what only a type checker imports.
    """
    if sys.version_info >= (3, 14):
        return inspect.signature(target, annotation_format=Format.FORWARDREF)
    return inspect.signature(target)


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, partial: bool = False
) -> Arguments:
    """The arguments of a call by name, those that have none by position: the keys that fiddle stores them under.

    Raises:
        TypeError: If the call does not fit the signature, or leaves a required argument out and ``partial`` is not set.
    """
    bound = (signature.bind_partial if partial else signature.bind)(*args, **kwargs).arguments
    arguments: Arguments = {}
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        if name not in bound:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            arguments.update(enumerate(bound[name], start=index))
        elif parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(bound[name])
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            arguments[index] = bound[name]
        else:
            arguments[name] = bound[name]
    return arguments


def arguments(buildable: Any) -> Arguments:
    """The arguments that were set, in the order of the signature."""
    values, metadata = buildable.__flatten__()
    return dict(zip(metadata.argument_names, values, strict=True))


def copy(value: Any) -> Any:
    """``value`` with its configs and plain containers copied, and everything else shared."""

    def visit(node: Any, state: Any) -> Any:
        return state.map_children(node) if state.is_traversable(node) else node

    return daglish.MemoizedTraversal.run(visit, value)


def step(path: str, key: object) -> str:
    """``path`` one argument, key or index further, as a message and ``subpath=`` spell it."""
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"
