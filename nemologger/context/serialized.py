"""A configuration as fiddle serializes it: what is inside of an ``io.json``.

Writing is fiddle's. Reading is not: fiddle's reader looks references up as they come, and calls what stands in the place of
a named tuple's class. Here every reference passes the policy with the path where it stands, and only known kinds of nodes
are made. Nothing that the file describes is called; that is left to ``fdl.build``.
"""

from __future__ import annotations

import collections
import json
import pickle
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
from fiddle.experimental import serialization

from nemologger.context import configs
from nemologger.context.configs import step
from nemologger.context.policy import Policy
from nemologger.context.references import TORCH_CONSTANTS, Reference, reference_to
from nemologger.errors import ContextError, RefusedError

_FIDDLE = ("fiddle", "fiddle.config", "fiddle._src.config", "fiddle._src.partial", "fiddle._src.tagging")
_BUILDABLES = {"Config": fdl.Config, "Partial": fdl.Partial, "ArgFactory": fdl.ArgFactory}
_ROOT = "<root>"

Node = Any


# --- write ------------------------------------------------------------------------------------------------------------


def encode(value: Any) -> str:
    """The text of an ``io.json`` for ``value``, which :class:`~nemologger.context.values.Writable` has converted.

    Raises:
        ContextError: If fiddle cannot write it after all.
    """
    for constant in _constants(value):
        reference = reference_to(constant)
        if reference is not None:
            serialization.register_constant(reference.module, reference.symbol, compare_by_identity=True)
    try:
        document = json.loads(serialization.dump_json(value))
    except Exception as error:
        raise ContextError(f"the context cannot be written as JSON: {error}") from error
    _use_public_names(document)
    return json.dumps(document)


def _constants(value: Any) -> Iterator[Any]:
    """What fiddle has to be told is a constant: dtypes and the like, and functions of torch that are written in C."""
    if isinstance(value, fdl.Buildable):
        yield from _constants([value.__fn_or_cls__, *configs.arguments(value).values()])
    elif isinstance(value, dict):
        yield from _constants([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _constants(item)
    elif isinstance(value, (*TORCH_CONSTANTS, types.BuiltinFunctionType)):
        yield value


def _use_public_names(node: Node) -> None:
    if isinstance(node, dict):
        if node.get("type") == "pyref":
            public = Reference(node["module"], node["name"]).public()
            node["module"], node["name"] = public.module, public.symbol
        for child in node.values():
            _use_public_names(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            _use_public_names(child)


# --- read -------------------------------------------------------------------------------------------------------------


class Placeholder:
    """Stands in a configuration for a class or function that could not be had. Building it raises what loading would have.

    Attributes:
        reference: What the file names there.
        error: Why it is not here.
    """

    def __init__(self, reference: str, error: Exception) -> None:
        self.reference = reference
        self.error = error
        self.__name__ = self.__qualname__ = f"<placeholder for {reference}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise the error that loading would have raised."""
        raise type(self.error)(str(self.error))

    def __repr__(self) -> str:
        return self.__qualname__


class Reader:
    """Reads one ``io.json``.

    Args:
        path: The file.
        policy: Decides over its references.
        lenient: Put a :class:`Placeholder` where a reference is refused or missing, instead of raising.

    Attributes:
        placeholders: Why each placeholder was put, in order.

    Raises:
        ContextError: If the file is damaged, with its path.
    """

    def __init__(self, path: Path, policy: Policy, *, lenient: bool = False) -> None:
        self._path = path
        self._policy = policy
        self._lenient = lenient
        self._read: dict[str, Any] = {}
        self._open: set[str] = set()
        self.placeholders: list[str] = []
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"it is not JSON ({error})") from error
        if not isinstance(document, dict) or not isinstance(document.get("objects"), dict) or "root" not in document:
            raise self._damaged("it has no 'root' and 'objects'")
        self._root, self._objects = document["root"], document["objects"]

    def value(self, subpath: str = "") -> Any:
        """The configuration, or the part of it at ``subpath``. What is outside of that part is not even looked up.

        Args:
            subpath: Argument names, keys and indices as in ``model.config`` or ``extra.datamodule``.

        Raises:
            ContextError: If the file is damaged, or there is nothing at ``subpath``.
            RefusedError: If something is referred to that the policy does not admit.
        """
        try:
            node, where = self._root, ""
            for part in _parts(subpath):
                node, where = self._child(node, part, where), step(where, part)
            return self._value(node, where)
        except RecursionError as error:
            raise self._damaged("it is nested too deeply") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, ContextError):
                raise
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def _damaged(self, reason: str) -> ContextError:
        return ContextError(f"{self._path} is damaged or is not a context: {reason}.")

    def _child(self, node: Node, part: str | int, where: str) -> Node:
        node = self._follow(node)
        items = [item for _, item in node.get("items", ())]
        names = self._names(node)
        for name, item in zip(names, items, strict=True):
            if name == part or str(name) == str(part):
                return item
        there = ", ".join(map(str, names)) or "nothing"
        raise ContextError(
            f"{self._path} has nothing at {step(where, part)!r}; at {where or _ROOT!r} there is: {there}."
        )

    def _names(self, node: Node) -> list[Any]:
        metadata = self._follow(node.get("metadata"))
        kind = self._type(node)
        if kind.symbol in _BUILDABLES and kind.module in _FIDDLE:
            metadata = self._follow(metadata["items"][1][1])
        if isinstance(metadata, dict) and "items" in metadata:
            return [self._value(item, "") for _, item in metadata["items"]]
        return list(range(len(node["items"])))

    def _follow(self, node: Node) -> Node:
        seen: set[str] = set()
        while isinstance(node, dict) and node.get("type") == "ref":
            if node["key"] in seen:
                raise self._damaged(f"{node['key']!r} refers to itself")
            seen.add(node["key"])
            node = self._objects[node["key"]]
        return node

    def _type(self, node: Node) -> Reference:
        kind = node["type"]
        if not isinstance(kind, dict) or kind.get("type") != "pyref":
            raise self._damaged(f"{kind!r} is not a type")
        return Reference(str(kind["module"]), str(kind["name"]))

    def _value(self, node: Node, where: str) -> Any:
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        kind = node["type"]
        if kind == "leaf":
            if not (node["value"] is None or isinstance(node["value"], (bool, int, float, str))):
                raise self._damaged(f"{where or _ROOT} is not a plain value")
            return node["value"]
        if kind == "ref":
            return self._shared(node["key"], where)
        if kind == "pyref":
            return self._reference(Reference(str(node["module"]), str(node["name"])), where)
        return self._node(node, where)

    def _shared(self, key: str, where: str) -> Any:
        if key not in self._read:
            if key in self._open:
                raise self._damaged(f"{key!r} contains itself")
            self._open.add(key)
            self._read[key] = self._value(self._objects[key], where)
            self._open.discard(key)
        return self._read[key]

    def _reference(self, reference: Reference, where: str) -> Any:
        """The object itself, or a config that raises when it is built."""
        target = self._target(reference, where)
        return fdl.Config(target) if isinstance(target, Placeholder) else target

    def _target(self, reference: Reference, where: str) -> Any:
        try:
            return self._policy.resolve(reference.module, reference.symbol, where or _ROOT)
        except (RefusedError, ContextError) as error:
            return self._instead(reference, error)

    def _instead(self, reference: Reference, error: Exception) -> Placeholder:
        error = type(error)(f"{self._path}: {error}")
        if not self._lenient:
            raise error
        self.placeholders.append(str(error))
        return Placeholder(str(reference), error)

    def _node(self, node: Node, where: str) -> Any:
        kind = self._type(node)
        if kind.module in _FIDDLE:
            return self._fiddle(node, kind, where)
        items = node["items"]
        if kind == Reference("builtins", "dict"):
            keys = self._keys(node["metadata"], where)
            return {key: self._value(item, step(where, key)) for key, (_, item) in zip(keys, items, strict=True)}
        if kind == Reference("collections", "defaultdict"):
            factory, keys = self._defaultdict(node["metadata"], where)
            values = (self._value(item, step(where, key)) for key, (_, item) in zip(keys, items, strict=True))
            return collections.defaultdict(factory, zip(keys, values, strict=True))
        if kind.module != "builtins" and len(items) == 1 and items[0][0] == "IdentityElement()":
            return self._pickled(kind, self._value(items[0][1], where), where)
        values_ = [self._value(item, step(where, index)) for index, (_, item) in enumerate(items)]
        if kind.module == "builtins" and kind.symbol in _PLAIN:
            return _PLAIN[kind.symbol](values_)
        return self._registered(node, kind, values_, where)

    def _keys(self, node: Node, where: str) -> tuple[Any, ...]:
        return tuple(self._value(item, f"{where}.keys()") for _, item in self._follow(node)["items"])

    def _defaultdict(self, node: Node, where: str) -> tuple[Any, tuple[Any, ...]]:
        (_, factory), (_, keys) = self._follow(node)["items"]
        return self._value(factory, f"{where}.default_factory"), self._keys(keys, where)

    def _fiddle(self, node: Node, kind: Reference, where: str) -> Any:
        if kind.symbol == "NoValue":
            return fdl.NO_VALUE
        metadata = self._follow(node["metadata"])
        names = self._names(node) if kind.symbol in _BUILDABLES else self._keys(metadata["items"][1][1], where)
        if not all(isinstance(name, (str, int)) for name in names):
            raise self._damaged(f"{where or _ROOT} has arguments without a name")
        arguments = {
            name: self._value(item, step(where, name)) for name, (_, item) in zip(names, node["items"], strict=True)
        }
        if kind.symbol == "TaggedValueCls" and "value" in arguments:
            return arguments["value"]
        if kind.symbol not in _BUILDABLES:
            raise self._damaged(f"{where or _ROOT} is a {kind}, which is not known here")
        called = self._follow(metadata["items"][0][1])
        if called.get("type") != "pyref":
            raise self._damaged(f"{where or _ROOT} does not say what it calls")
        target = self._target(Reference(str(called["module"]), str(called["name"])), where)
        if not callable(target):
            raise self._damaged(f"{where or _ROOT} calls {called['module']}.{called['name']}, which cannot be called")
        return configs.make(_BUILDABLES[kind.symbol], target, arguments)

    def _registered(self, node: Node, kind: Reference, values: list[Any], where: str) -> Any:
        """A named tuple, or an object whose class the user's program has registered with fiddle."""
        cls = self._target(kind, where)
        if isinstance(cls, Placeholder):
            return configs.make(fdl.Config, cls, dict(enumerate(values)))
        if isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):
            return cls(*values)
        traverser = serialization.find_node_traverser(cls) if isinstance(cls, type) else None
        if traverser is None:
            raise self._damaged(f"{where or _ROOT} holds a {kind} in a way that is not known here")
        return traverser.unflatten(values, self._value(node["metadata"], f"{where}.<metadata>"))

    def _pickled(self, kind: Reference, name: Any, where: str) -> Any:
        """An object that NeMo could not write as JSON and pickled into a file beside it."""
        place = (self._path.parent / str(name)).resolve()
        if not self._policy.everything or place.parent != self._path.parent.resolve():
            refusal = (
                f"{where or _ROOT} is a {kind} that was pickled into the file {str(name)!r}. Reading a pickle runs the "
                "code in it. If you know who wrote it, pass trust=True; load_context(..., build=False) leaves it out."
            )
            return fdl.Config(self._instead(kind, RefusedError(refusal)))
        try:
            return pickle.loads(place.read_bytes())  # noqa: S301  the caller said trust=True
        except Exception as error:
            raise ContextError(f"{self._path}: {where or _ROOT} cannot be unpickled from {place}: {error}") from error


_PLAIN: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "slice": lambda values: slice(*values),
    "bytes": lambda values: values[0].encode("raw_unicode_escape"),
}


def _parts(subpath: str) -> list[str | int]:
    """``extra['datamodule'].layers[0]`` -> extra, datamodule, layers, 0."""
    parts: list[str | int] = []
    at = 0
    pattern = re.compile(r"\.?(?P<name>[^.\[\]]+)|\[(?P<quote>['\"])(?P<key>.*?)(?P=quote)\]|\[(?P<index>-?\d+)\]")
    while at < len(subpath):
        match = pattern.match(subpath, at)
        if match is None:
            raise ContextError(
                f"subpath {subpath!r} cannot be read from {subpath[at:]!r} on; write it as 'model.config'."
            )
        parts.append(int(match["index"]) if match["index"] else match["name"] or match["key"])
        at = match.end()
    return parts
