"""The random number generators of a process: their state as a value, and streams set apart from them."""

from __future__ import annotations

import array
import random
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch import device as Device

from nemologger.errors import DamagedCheckpointError
from nemologger.exact import unchanged

_TORCH = torch.default_generator
#: The generators of the newest streams: another thread may be in the middle of a number of one that nobody else has.
_NEWEST: deque[np.random.MT19937] = deque(maxlen=32)


@dataclass(frozen=True)
class RngState:
    """The state of python's, numpy's and torch's global generators, and of one device's."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    device: Tensor | None = None

    @staticmethod
    def capture(device: Device | None = None) -> RngState:
        """The state of this moment, with that of ``device`` if it has generators of its own."""
        return RngState(
            python=unchanged.python_state(),
            numpy=unchanged.numpy_state(),
            torch=_TORCH.get_state(),
            device=_device_state(device),
        )

    def restore(self, device: Device | None = None) -> None:
        """Set the generators to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        _TORCH.set_state(self.torch)
        if self.device is not None and _has_generator(device):
            torch.get_device_module(device).set_rng_state(self.device, device)

    def seed(self, *salt: int) -> int:
        """A number below 2**63 that depends on this state and ``salt``; nothing is drawn for it."""
        digest = xxhash.xxh3_64(self.torch.numpy().tobytes())
        digest.update(array.array("L", self.python[1]).tobytes())
        for part in self.numpy["state"].values():
            digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(repr(salt).encode())
        return digest.intdigest() >> 1

    def for_another_rank(self, rank: int, device: Device | None = None) -> RngState:
        """A new state that follows from this one and ``rank``, for when a rank has none of its own."""
        seed = self.seed(rank)
        own = Streams(seed)
        numpy_state = {"bit_generator": "MT19937", "state": own.numpy.state["state"], "has_gauss": 0, "gauss": 0.0}
        on_device = torch.Generator(device).manual_seed(seed).get_state() if _has_generator(device) else None
        return RngState(own.python, numpy_state, own.torch, on_device)

    def to_plain(self) -> dict[str, Any]:
        """As tensors, numbers and strings."""
        version, words, gauss = self.python
        return {
            "python": {"version": version, "words": _packed(np.array(words, dtype=np.uint32)), "gauss": gauss},
            "numpy": _plain(self.numpy),
            "torch": self.torch,
            "device": self.device,
        }

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> RngState:
        """What :meth:`to_plain` was made of."""
        python = plain["python"]
        words = tuple(int(word) for word in _unpacked(python["words"]))
        return RngState(
            python=(python["version"], words, python["gauss"]),
            numpy=_numpy_state(plain["numpy"]),
            torch=plain["torch"].cpu(),
            device=None if plain["device"] is None else plain["device"].cpu(),
        )


class Streams:
    """Random streams of one's own: within ``with streams:`` the global generators are these, and go on where they were.

    Whoever draws inside does not shift those outside, and the other way round. It takes some 15 microseconds,
    and 8 more each time that something was drawn from ``random``.

    Args:
        seed: What the streams start from.
    """

    def __init__(self, seed: int) -> None:
        self.python: tuple[Any, ...] = random.Random(seed).getstate()
        self.torch = torch.Generator().manual_seed(seed).get_state()
        self.numpy: Any = np.random.MT19937(seed)
        _NEWEST.append(self.numpy)
        self._outside: tuple[Any, Any, Any] | None = None

    def __enter__(self) -> None:
        numpy = np.random.mtrand.get_bit_generator()
        self._outside = unchanged.python_state(), numpy, _TORCH.get_state()
        random.setstate(self.python)
        _draw_from(self.numpy, instead_of=numpy)
        _TORCH.set_state(self.torch)

    def __exit__(self, *exception: object) -> None:
        if self._outside is None:
            return
        self.python, self.torch = unchanged.python_state(), _TORCH.get_state()
        python, numpy, state = self._outside
        self._outside = None
        random.setstate(python)
        _draw_from(numpy, instead_of=self.numpy)
        _TORCH.set_state(state)


def _draw_from(generator: Any, instead_of: Any) -> None:
    """Let numpy's functions draw from ``generator``, those too that fill an array in another thread at the moment."""
    if type(generator) is type(instead_of):
        np.random.mtrand.set_bit_generator(generator)
        return
    # One of another kind has its state in less memory, perhaps: who draws as from the one before is waited for.
    with generator.lock, instead_of.lock:
        np.random.mtrand.set_bit_generator(generator)


def _has_generator(device: Device | None) -> bool:
    return device is not None and device.type not in ("cpu", "meta")


def _device_state(device: Device | None) -> torch.Tensor | None:
    if not _has_generator(device):
        return None
    module = torch.get_device_module(device)
    return module.get_rng_state(device) if hasattr(module, "get_rng_state") else None


def _packed(values: Any) -> dict[str, Any]:
    return {"dtype": values.dtype.str, "bytes": torch.from_numpy(np.frombuffer(values.tobytes(), np.uint8).copy())}


def _unpacked(plain: dict[str, Any]) -> Any:
    return np.frombuffer(plain["bytes"].cpu().numpy().tobytes(), dtype=plain["dtype"]).copy()


def _plain(value: Any) -> Any:
    """A generator's state as its library gives it, with arrays as tensors of bytes."""
    if isinstance(value, np.ndarray):
        return {"array": _packed(value)}
    if isinstance(value, np.integer):
        return int(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _unplain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return _unpacked(value["array"]) if "array" in value else {key: _unplain(item) for key, item in value.items()}


def _numpy_state(plain: Any) -> Any:
    """What a numpy generator is set to, of what :func:`_plain` made.

    Raises:
        DamagedCheckpointError: It is at a place that it does not have: numpy would read memory there that is not its own.
    """
    state = _unplain(plain)
    kind = state.get("bit_generator")
    places: dict[str, tuple[Any, int]] = {}  # those of other libraries have states of other forms
    if kind == "MT19937":
        places["pos"] = state["state"].get("pos", 0), 624
    elif kind == "Philox":
        places["buffer_pos"] = state.get("buffer_pos", 0), 4
    for name, (place, last) in places.items():
        if type(place) is not int or not 0 <= place <= last:
            raise DamagedCheckpointError(
                f"a state of numpy's {kind} in the checkpoint is damaged: it has {name}={place!r}, expected 0 to {last}"
            )
    return state


_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def generator_state(generator: Any) -> Any:
    """The state, as plain types, of a ``torch.Generator``, ``random.Random`` or one of numpy's generators."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, words, gauss = generator.getstate()
        return {"version": version, "words": _packed(np.array(words, dtype=np.uint32)), "gauss": gauss}
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def set_generator_state(generator: Any, state: Any) -> None:
    """Set ``generator`` to what :func:`generator_state` returned."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        words = tuple(int(word) for word in _unpacked(state["words"]))
        generator.setstate((state["version"], words, state["gauss"]))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_numpy_state(state))
    else:
        generator.bit_generator.state = _numpy_state(state)


def reseed(generator: Any, seed: int) -> None:
    """Let ``generator`` begin anew from ``seed``, a number below 2**64."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed >> 1)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        bits = getattr(np.random, generator.get_state(legacy=False)["bit_generator"])
        generator.set_state(np.random.RandomState(bits(seed)).get_state(legacy=False))
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def generator_from(state: Any, device: Device | None = None) -> Any:
    """A new generator in the state that :func:`generator_state` returned; None if it is of no known kind.

    Args:
        state: The state.
        device: Where one is that is not the CPU's; a state does not say so.
    """
    made: Any = None
    if isinstance(state, torch.Tensor):
        made = torch.Generator()
        if made.get_state().numel() != state.numel():
            made = torch.Generator(device) if _has_generator(device) else None
    elif "words" in state:
        made = random.Random()
    elif state.get("bit_generator") in _BIT_GENERATORS:
        bits = getattr(np.random, state["bit_generator"])()
        made = np.random.RandomState(bits) if "has_gauss" in state else np.random.Generator(bits)
    if made is not None:
        set_generator_state(made, state)
    return made


GENERATORS: tuple[type, ...] = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
