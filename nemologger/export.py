"""Weights without a Trainer: into a module, or into one file. Needs nothing of ``context/``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from nemologger import names
from nemologger.checkpoint.reading import load
from nemologger.checkpoint.reading.in_place import fill_special, places_of
from nemologger.checkpoint.state.snapshot import is_stored
from nemologger.checkpoint.state.stage import payload
from nemologger.condition import kind_of
from nemologger.context.io_json import load_context
from nemologger.disk import LocalDisk
from nemologger.disk.there import exists, is_dir
from nemologger.errors import ConfigurationError, ModelMismatchError, NotFoundError
from nemologger.loading.compare import check_model
from nemologger.stores.path import in_store, storage_path
from nemologger.stores.remote_disk import disk_of

# How the name of a file that export_weights writes may end.
FORMATS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

_READ_SIZE = 16 << 20


def load_weights(
    checkpoint: str | Path,
    module: nn.Module,
    strict: bool = True,
    *,
    ema: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> None:
    """Load the model of a checkpoint into ``module``, for inference or for training something else.

    Where it can be, it is read straight into the memory of parameters and buffers: there is no second copy of it.

    Args:
        checkpoint: A checkpoint's directory, or its ``weights/``; also a URL.
        module: Gets the parameters and buffers, in place and on the device that it is on.
        strict: Require the same names and shapes. False loads the names that both have; their shapes must agree.
        ema: Load the averages that :class:`nemologger.callbacks.ema.EMA` kept instead of the weights that were trained.
        storage_options: For a URL, what the fsspec file system takes beyond the usual environment.

    Raises:
        ConfigurationError: If ``module`` is none.
        NotFoundError: If there is no checkpoint, or no averages in it.
        ModelMismatchError: If it belongs to a model with other parameters; nothing was loaded then.
        DamagedCheckpointError: If it cannot be read, or is not as it was written. Nothing was loaded if a file is missing or
            too short; else ``module`` may hold parts of the checkpoint.

    Example:
        >>> load_weights("runs/demo/checkpoints/gone", nn.Linear(2, 2))
        Traceback (most recent call last):
        nemologger.errors.NotFoundError: there is no checkpoint at runs/demo/checkpoints/gone
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"load_weights(checkpoint, module): module is {kind_of(module)}, expected a torch.nn.Module"
        )
    path = _existing(checkpoint, storage_options, ema=ema)
    load.recorded(load.weights_of(path))  # damage must not look like another model
    state = module.state_dict()
    check_model(path, state, module, strict=strict, advice="or load what fits: strict=False.")
    wanted = (lambda name: True) if strict else state.__contains__
    loaded = load.load_model(path, into=places_of(module), wanted=wanted)
    fill_special(module, loaded)
    module.load_state_dict(loaded, strict=strict)


def load_model(
    checkpoint: str | Path,
    trust: bool | Sequence[str] = False,
    *,
    ema: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> LightningModule:
    """The model of a checkpoint: built as it was, with its weights, on the CPU and in evaluation mode.

    Lightning's ``load_from_checkpoint`` reads files; this is its counterpart for directories. As there,
    ``configure_model()`` and ``on_load_checkpoint()`` make the layers that ``__init__()`` has not made: they are called
    where the weights do not fit without.

    Args:
        checkpoint: A checkpoint's directory; also a URL.
        trust: Modules besides your own, torch and Lightning whose code may run; True allows all. See
            :func:`nemologger.io.load_context`.
        ema: Load the averages that :class:`nemologger.callbacks.ema.EMA` kept instead of the weights that were trained.
        storage_options: For a URL, what the fsspec file system takes beyond the usual environment.

    Raises:
        NotFoundError: If there is no checkpoint, or no averages in it.
        ContextError: If it has no context, or the context does not hold the model.
        RefusedError: If building the model would run code that nobody allowed.
        ModelMismatchError: If the weights do not fit the model.
        DamagedCheckpointError: If they are not as they were written.

    Example:
        >>> load_model("runs/demo/checkpoints/gone")
        Traceback (most recent call last):
        nemologger.errors.NotFoundError: there is no checkpoint at runs/demo/checkpoints/gone
    """
    path = _existing(checkpoint, storage_options)
    model: LightningModule = load_context(path, subpath="model", trust=trust)
    # A configure_model() that only shards what __init__() has made is not called: there are no ranks here.
    if is_overridden("configure_model", model) and not _fits(path, model):
        model.configure_model()
    if is_overridden("on_load_checkpoint", model) and not _fits(path, model):
        model.on_load_checkpoint(load.open_checkpoint(path).read(optimizer=False))
    load_weights(path, model, ema=ema)
    return model.eval()


def export_weights(
    checkpoint: str | Path,
    output: str | Path,
    *,
    ema: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model of a checkpoint into one file that other programs read. The model is in memory once meanwhile.

    Args:
        checkpoint: A checkpoint's directory, or its ``weights/``; also a URL.
        output: A name that ends in ``.safetensors`` (needs the package of that name), or in ``.pt``, ``.pth``, ``.bin`` or
            ``.ckpt`` for ``torch.load(weights_only=True)``. An existing file is replaced. Also a URL.
        ema: Write the averages that :class:`nemologger.callbacks.ema.EMA` kept instead of the weights that were trained.
        storage_options: For URLs, what the fsspec file system takes beyond the usual environment.

    Returns:
        ``output``.

    Raises:
        ConfigurationError: If the ending says nothing, the package is missing, or safetensors does not know such tensors.
        NotFoundError: If there is no checkpoint, or no averages in it.
        DamagedCheckpointError: If the weights are not as they were written; ``output`` stays as it was.

    Example:
        >>> export_weights("runs/demo/checkpoints/gone", "model.txt")
        Traceback (most recent call last):
        nemologger.errors.ConfigurationError: output='model.txt': end it in .safetensors or .pt
    """
    target = storage_path(output, storage_options, "output")
    if target.suffix not in FORMATS:
        raise ConfigurationError(f"output={str(output)!r}: end it in .safetensors or .pt")
    if is_dir(target):
        raise ConfigurationError(f"output={str(output)!r} is a directory: give the name of a file")
    state = load.load_model(_existing(checkpoint, storage_options, ema=ema))
    disk = disk_of(target) or LocalDisk()
    disk.make_directory(target.absolute().parent)
    if target.suffix == ".safetensors":
        disk.write(target, _safetensors(state))
    elif isinstance(disk, LocalDisk):
        with disk.open(target) as file:
            torch.save(state, file)
    else:
        with tempfile.TemporaryFile() as file:
            torch.save(state, file)
            file.seek(0)
            disk.write(target, iter(lambda: file.read(_READ_SIZE), b""))
    return target


def _fits(checkpoint: Path, model: LightningModule) -> bool:
    try:
        check_model(checkpoint, model.state_dict(), model)
    except ModelMismatchError:
        return False
    return True


def _safetensors(state: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """The parts of the file: the length of a description in JSON, that, and the tensors one after the other.

    The library would make copies, or a file that only its owner may read. Format: the README of safetensors.
    """
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    kinds = {dtype: _kind(dtype) for dtype in {tensor.dtype for tensor in tensors.values()}}
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    keys = sorted(
        tensors, key=lambda key: (-tensors[key].dtype.itemsize, key)
    )  # each at a multiple of its elements' size
    end = 0
    for key in keys:
        tensor = tensors[key]
        if not is_stored(tensor):
            raise ConfigurationError(
                f"{key} is sparse, nested or quantized, and safetensors knows no such: end it in .pt"
            )
        kind, per_element = kinds[tensor.dtype]
        shape = [*tensor.shape[:-1], *(size * per_element for size in tensor.shape[-1:])]
        start, end = end, end + tensor.nbytes
        described[key] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return chain([len(text).to_bytes(8, "little") + text], (payload(tensors[key]) for key in keys))


def _kind(dtype: torch.dtype) -> tuple[str, int]:
    """What safetensors calls ``dtype``, and how many of its own are in one element: torch packs those of four bits."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ConfigurationError(
            "writing .safetensors needs the package safetensors: python -m pip install 'nemologger[safetensors]'"
        ) from error
    try:
        sample = save({"": torch.zeros(dtype.itemsize, dtype=torch.uint8).view(dtype)})
    except KeyError as error:
        raise ConfigurationError(f"safetensors has no {dtype}, which the model has: end the output in .pt") from error
    described = json.loads(sample[8 : 8 + int.from_bytes(sample[:8], "little")])[""]
    return described["dtype"], described["shape"][0]


def _existing(checkpoint: str | Path, options: Mapping[str, Any] | None, *, ema: bool = False) -> Path:
    path = storage_path(checkpoint, options, "checkpoint")
    path = path.resolve() if in_store(path) else path
    if not is_dir(path):
        if exists(path):
            read = "safetensors.torch.load_model(module, path)" if path.suffix == ".safetensors" else "torch.load(path)"
            hint = f": {read} reads it" if path.suffix in FORMATS else ""
            raise NotFoundError(f"{checkpoint} is a file, and no checkpoint's directory{hint}")
        raise NotFoundError(f"there is no checkpoint at {checkpoint}")
    if not ema:
        return path
    averages = load.averages_of(path)
    if averages is None:
        raise NotFoundError(f"{path} holds no averaged weights ({names.EMA_WEIGHTS}/): its run had no EMA callback")
    return averages
