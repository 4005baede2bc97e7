"""What a file of NeMo 1 has beside the section and is about the same run: its scripts, or Hydra, read that themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemologger.exp_manager.checkpoints import PARAMS
from nemologger.exp_manager.notes import Note
from nemologger.stores.store import PART, WHOLE

S3, HYDRA, DEFAULTS = SECTIONS = ("s3_checkpointing", "hydra", "defaults")
_ASYNC = "enable_async_checkpointing"
_READER = "for Hydra, and read by what nl.hydra_runner decorates, not by this file"


def spoken_of(content: DictConfig) -> list[str]:
    """The sections that :func:`notes` has something on, if it is given ``content``."""
    sections = [key for key in (S3, HYDRA) if _plain(content, key)]
    return [*sections, DEFAULTS] if content.get(DEFAULTS) and OmegaConf.is_list(content[DEFAULTS]) else sections


def saves_beside_training(content: DictConfig, dirpath: Any) -> bool:
    """Whether the plugin for S3 is to save beside training; the section has a field of its own for that.

    Args:
        content: The file's.
        dirpath: Where the section's checkpoints go.
    """
    wanted = _plain(content, S3, resolve=True).get(_ASYNC)
    return _is_url(dirpath) and str(wanted).lower() == "true"  # text, if the environment says it


def notes(content: DictConfig, dirpath: Any, interpolations: Mapping[str, str]) -> list[Note]:
    """What the author of the file should know.

    Args:
        content: The file's.
        dirpath: Where the section's checkpoints go.
        interpolations: The values of the section with an interpolation in them.
    """
    return [*_on_s3(_plain(content, S3, resolve=True), dirpath), *_on_hydra(content, interpolations)]


def _on_s3(settings: Mapping[Any, Any], dirpath: Any) -> Iterator[Note]:
    if settings and not _is_url(dirpath):
        yield Note(S3, f"has no effect: {PARAMS}.dirpath is no URL of an object store", "warned")
        return
    if _ASYNC in settings:
        yield Note(f"{S3}.{_ASYNC}", f"(it was {settings[_ASYNC]!r}) is ModelCheckpoint(async_save=)", "told")
    others = [f"{key} ({value!r})" for key, value in settings.items() if key != _ASYNC]
    if others:
        yield Note(
            S3,
            f"has settings without a counterpart: {', '.join(others)}. Files of more than {WHOLE >> 20} MiB are written in "
            f"parts of {PART >> 20} MiB, and large ranges are read in parts, several at a time",
            "warned",
        )


def _on_hydra(content: DictConfig, interpolations: Mapping[str, str]) -> Iterator[Note]:
    hydra = _plain(content, HYDRA)
    sweeper = hydra.get("sweeper")
    params = sweeper.get("params") if isinstance(sweeper, dict) else None
    swept = params if isinstance(params, dict) else {}
    if swept:
        yield Note(
            "hydra.sweeper.params",
            f"({', '.join(map(str, swept))}) is not here: this file is one run, with the values of the configuration. To "
            "search with it, call run() in a main(cfg) of yours that nl.hydra_runner decorates, and start that with -m: it "
            "reads the YAML file as it is, and each combination gets a version, and so a directory, of its own",
            "warned",
        )
    for key, value in interpolations.items():
        varied = [str(name) for name in swept if f"${{{name}}}" in value]
        if varied:
            yield Note(key, f"is a constant here, whatever the values of {', '.join(varied)}", "warned")
    settings = [f"hydra.{key}" for key in hydra if not (key == "sweeper" and swept)]
    if settings:
        yield Note(", ".join(settings), f"{'is' if len(settings) == 1 else 'are'} {_READER}", "told")
    defaults = content.get(DEFAULTS)
    entries = OmegaConf.to_container(defaults, resolve=False) if OmegaConf.is_list(defaults) else []
    others = [_entry(one) for one in entries if not _is_about_hydra(one)]  # type: ignore[union-attr]
    if others:
        yield Note(
            DEFAULTS,
            f"names other files, which are not read here: {', '.join(others)}. What your script prints with --cfg job has "
            "all that is in them",
            "warned",
        )
    elif entries:
        yield Note(DEFAULTS, f"is {_READER}", "told")


def _is_about_hydra(entry: Any) -> bool:
    return entry == "_self_" or (isinstance(entry, dict) and all("hydra/" in str(key) for key in entry))


def _entry(entry: Any) -> str:
    return ", ".join(f"{key}: {value}" for key, value in entry.items()) if isinstance(entry, dict) else str(entry)


def _plain(content: DictConfig, key: str, *, resolve: bool = False) -> dict[Any, Any]:
    found = content.get(key)
    plain = OmegaConf.to_container(found, resolve=resolve) if OmegaConf.is_dict(found) else found
    return plain if isinstance(plain, dict) else {}


def _is_url(path: Any) -> bool:
    return "://" in str(path)
