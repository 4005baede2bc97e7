"""Write a context: everything is prepared in memory, then ``io.json`` goes first and comes last."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl

from nemologger.context import configs
from nemologger.context.artifacts import Copies
from nemologger.context.model_yaml import to_yaml
from nemologger.context.serialized import encode
from nemologger.context.uncaptured import Uncaptured, log_once, warn_once
from nemologger.context.values import Writable
from nemologger.disk import Disk, LocalDisk
from nemologger.errors import ContextError
from nemologger.names import IO_JSON
from nemologger.stores.path import storage_path


def dump_context(
    config: Any,
    output: str | Path,
    yaml_attrs: Sequence[str] = (),
    *,
    disk: Disk | None = None,
    strict: bool = True,
    owner: object | None = None,
    minor: tuple[str, ...] = (),
) -> None:
    """Write ``config`` into the directory ``output``: ``io.json``, a YAML file per attribute, and the artifacts.

    While the directory is written it has no ``io.json``, and so is no context. A context that was there is replaced; other
    files there are left alone.

    Args:
        config: An ``fdl.Config`` whose arguments may be any objects.
        output: The directory, made if need be.
        yaml_attrs: Arguments of ``config`` to write as ``<name>.yaml`` too.
        disk: Where to write; the local file system by default.
        strict: Raise for an artifact that is required and not there. False: warn, and keep everything else.
        owner: The object that the warnings are about; each is given once for it.
        minor: Of values whose path begins like this, what could not be kept is logged in one line.

    Raises:
        ContextError: If the class of ``config`` cannot be found by its name, a required artifact is missing, or ``config``
            has no argument of a name in ``yaml_attrs``. Nothing has been written or removed then.
        OSError: If the disk fails. ``output`` is no context then.
    """
    disk = disk if disk is not None else LocalDisk()
    output = storage_path(output)
    writable = Writable()
    converted = writable.convert(config)
    if converted.__fn_or_cls__ is Uncaptured:
        raise ContextError(f"the context {output} cannot be written: {writable.losses[0]}.")
    copies = Copies({IO_JSON, *(f"{attr}.yaml".lower() for attr in yaml_attrs)}, strict=strict)
    copies.plan(converted)
    files = {f"{attr}.yaml": to_yaml(_argument(converted, attr)) for attr in yaml_attrs}
    files[IO_JSON] = encode(converted)

    disk.make_directory(output)
    disk.remove(output / IO_JSON)
    disk.sync(output)
    copies.write(output, disk)
    for name, text in files.items():
        if name == IO_JSON:
            disk.sync(output)  # all it refers to is durable before it appears
        disk.write(output / name, [text.encode()])
    disk.sync(output)
    disk.sync(output.absolute().parent)

    owner = owner if owner is not None else config
    less = [loss for loss in writable.losses if minor and loss.startswith(minor)]
    more = [loss for loss in writable.losses if loss not in less]
    heading = f"the context {output} does not hold everything that was passed:"
    warn_once(owner, itertools.chain(more, copies.missing), heading)
    log_once(owner, less, f"the context {output} leaves out")


def _argument(config: Any, name: str) -> Any:
    arguments = configs.arguments(config) if isinstance(config, fdl.Buildable) else {}
    if name not in arguments:
        known = ", ".join(map(str, arguments)) or "none"
        raise ContextError(f"yaml_attrs names {name!r}, but the arguments that were passed are: {known}.")
    return arguments[name]
