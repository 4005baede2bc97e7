"""``model.yaml``: a configuration for people to read, with its defaults. It is never read back."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import pathlib
from typing import Any

import fiddle as fdl
import yaml

from nemologger.context import configs
from nemologger.context.references import is_reference_like, reference_to

_SCALARS = (bool, int, float, str, type(None))


class _Dumper(yaml.SafeDumper):
    """Writes a value that is used twice in full, both times."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(value: Any) -> str:
    """``value`` as YAML: ``_target_`` names what is called, with all its arguments; ``_partial_`` that it is not called yet.

    A class, function or constant is ``{_call_: false, _target_: name}``, any other object ``{_call_: true, _target_: its
    class}``.

    Example:
        >>> print(to_yaml(fdl.Config(dict, a=1)), end="")
        _target_: builtins.dict
        a: 1
    """
    text: str = yaml.dump(_plain(value), Dumper=_Dumper, default_flow_style=False, allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, fdl.Buildable):
        return _call(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if type(value) in _SCALARS:
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {k if type(k) in _SCALARS else _key(k): _plain(v) for k, v in value.items()}
    if is_reference_like(value):
        return {"_call_": False, "_target_": _name(value)}
    return {"_call_": True, "_target_": _name(type(value))}


def _call(value: Any) -> Any:
    target = value.__fn_or_cls__
    arguments = configs.arguments(value)
    if target in (pathlib.Path, pathlib.PosixPath, pathlib.PurePath, pathlib.PurePosixPath):
        return str(arguments.get(0, ""))
    plain: dict[str, Any] = {"_target_": _name(target)}
    if isinstance(value, fdl.Partial):
        plain["_partial_"] = True
    positional = [_plain(argument) for key, argument in arguments.items() if isinstance(key, int)]
    if positional:
        plain["_args_"] = positional
    plain.update({name: _default(target, name, default) for name, default in _defaults(target).items()})
    plain.update({key: _plain(argument) for key, argument in arguments.items() if isinstance(key, str)})
    return plain


def _defaults(target: Any) -> dict[str, Any]:
    try:
        parameters = configs.signature(target).parameters
    except (TypeError, ValueError):  # written in C, and does not tell
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p.default for n, p in parameters.items() if p.kind in kinds and p.default is not p.empty}


def _default(target: Any, name: str, default: Any) -> Any:
    """A default of the signature. That of a dataclass's ``default_factory`` shows what the factory makes."""
    if dataclasses.is_dataclass(target):
        for field in dataclasses.fields(target):
            if field.name == name and field.default_factory is not dataclasses.MISSING:
                return _plain(field.default_factory())
    return _plain(default)


def _name(value: Any) -> str:
    reference = reference_to(value)
    if reference is not None:
        return str(reference.public())
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if name else repr(value)


def _key(key: Any) -> str:
    return _name(key) if is_reference_like(key) else str(key)
