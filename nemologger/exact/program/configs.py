"""Configurations of OmegaConf, whose entries are used as attributes are: ``self.cfg.weight *= 0.9``."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nemologger.exact.program.reach import is_ordinary, module_of

_KINDS = {("omegaconf.dictconfig", "DictConfig"), ("omegaconf.listconfig", "ListConfig")}
_LENGTH = "length"


def is_config(value: Any) -> bool:
    """Whether ``value`` is one, without an import of what the program may not use."""
    kind = type(value)
    return is_ordinary(kind) and (module_of(kind), kind.__name__) in _KINDS


class Config:
    """The entries of a configuration, and of a list how many there are; what stands elsewhere as ``"${other.entry}"``."""

    __slots__ = ("_there",)
    _there: Any

    def __init__(self, there: Any) -> None:
        object.__setattr__(self, "_there", there)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # vars() of it are the entries
        from omegaconf import OmegaConf

        with suppress(Exception):  # it may refuse, as a part of it is not there
            plain = OmegaConf.to_container(self._there, resolve=False)
            if isinstance(plain, list):
                return {_LENGTH: len(plain)} | {str(place): self._part(place, item) for place, item in enumerate(plain)}
            if isinstance(plain, dict):  # else it stands elsewhere as a whole, or is None
                return {name: self._part(name, item) for name, item in plain.items() if type(name) is str}
        return {}

    def __setattr__(self, name: str, value: Any) -> None:
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

    def _part(self, name: str | int, plain: Any) -> Any:
        """A configuration within is looked at for itself."""
        return self._there[name] if isinstance(plain, dict | list) else plain
