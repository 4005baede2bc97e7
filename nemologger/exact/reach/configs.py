"""Configurations of OmegaConf, and hyperparameters: their entries are used as attributes are, ``self.cfg.weight *= 0.9``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nemologger.exact.reach.kinds import is_ordinary, module_of
from nemologger.exact.reach.views import View

_KINDS = {("omegaconf.dictconfig", "DictConfig"), ("omegaconf.listconfig", "ListConfig")}
_LENGTH = "length"


def is_config(value: Any) -> bool:
    """Whether ``value`` is one, without an import of what the program may not use."""
    kind = type(value)
    return is_ordinary(kind) and (module_of(kind), kind.__name__) in _KINDS


class Entries(View):
    """The entries of a dictionary: hyperparameters, ``self.hparams.alpha *= 0.9``."""

    __slots__ = ("_there",)
    _there: dict[str, Any]

    def __init__(self, there: dict[str, Any]) -> None:
        super().__init__(_there=there)

    def _entries(self) -> dict[str, Any]:
        return {name: value for name, value in self._there.items() if type(name) is str}

    def _set(self, name: str, value: Any) -> None:
        self._there[name] = value


class Config(View):
    """The entries of a configuration, and of a list how many there are; what stands elsewhere as ``"${other.entry}"``."""

    __slots__ = ("_there",)
    _there: Any

    def __init__(self, there: Any) -> None:
        super().__init__(_there=there)

    def _entries(self) -> dict[str, Any]:
        with suppress(Exception):  # it may be of a later OmegaConf
            content = self._there._value()  # noqa: SLF001  to_container() takes some hundred times as long
            if isinstance(content, list):
                return {_LENGTH: len(content)} | {str(place): _plain(node) for place, node in enumerate(content)}
            if isinstance(content, dict):  # else it stands elsewhere as a whole, or is None
                return {name: _plain(node) for name, node in content.items() if type(name) is str}
        return {}

    def _set(self, name: str, value: Any) -> None:
        from omegaconf import ListConfig, flag_override

        there = self._there
        with suppress(Exception), flag_override(there, ["readonly", "struct"], values=False):  # it may be another today
            if not isinstance(there, ListConfig):
                there[name] = value
            elif name == _LENGTH:
                del there[value:]
            elif int(name) < len(there):
                there[int(name)] = value
            else:
                there.append(value)


def _plain(node: Any) -> Any:
    """What an entry is; a configuration within is looked at for itself."""
    value = node._value()  # noqa: SLF001
    if isinstance(value, dict | list):
        return node
    return _plain(value) if hasattr(type(value), "_value") else value  # where several types are allowed
