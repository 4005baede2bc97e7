"""Turn the ``exp_manager`` section of a NeMo 1 configuration into Python: ``python -m nemologger.migrate config.yaml``.

The file that is written sets a run up with the objects that ``exp_manager`` makes from the section. Exit code 0: written;
2: the section cannot be read, or the file not written.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml import YAMLError

from nemologger.disk import LocalDisk
from nemologger.disk.there import is_dir, is_file
from nemologger.errors import ConfigurationError, NemologgerError, NotFoundError
from nemologger.exp_manager import beside
from nemologger.exp_manager.calls import Call, Name
from nemologger.exp_manager.checkpoints import PARAMS
from nemologger.exp_manager.config import NESTED, ExpManagerConfig, read
from nemologger.exp_manager.notes import Note
from nemologger.exp_manager.plan import Plan, translate
from nemologger.exp_manager.source import expression, imports, text
from nemologger.exp_manager.table import new_home
from nemologger.resolvers import register_resolvers

_SECTION = "exp_manager"
_OF_A_WHOLE_FILE = ("trainer", "model", *beside.SECTIONS)  # what stands beside the section, and is no key of it
_WIDTH = 88
# How Hydra is to make what a _target_ names, and what it does when it is not told; _convert_ is about configurations that
# are handed over as such, and here they are plain values anyway.
_HYDRAS = {"_partial_": False, "_recursive_": True, "_args_": []}


@dataclass(frozen=True)
class _Document:
    """A configuration file.

    Attributes:
        name: Of the file.
        section: The section itself.
        resolved: What each key with an interpolation was, before it was replaced by its value.
        trainer: The trainer's section; empty if there is none.
        others: The other sections of the file, but for those that there are notes on.
        notes: What there is to say on these.
    """

    name: str
    section: DictConfig
    resolved: Mapping[str, str]
    trainer: Mapping[str, Any]
    others: Sequence[str]
    notes: Sequence[Note]


def migrate(path: str | Path) -> str:
    """The Python file for the configuration at ``path``.

    Args:
        path: A YAML file with a section ``exp_manager``, or with that section's keys alone.

    Raises:
        NotFoundError: There is no such file.
        ConfigurationError: It has no such section, or the section cannot work.
        OmegaConfBaseException: A key is unknown, of the wrong type, or cannot be resolved; the message names it.

    Example:
        >>> migrate("conf/gone.yaml")
        Traceback (most recent call last):
        nemologger.errors.NotFoundError: there is no file conf/gone.yaml
    """
    document = _load(Path(path))
    section = read(document.section)
    plan = translate(section)
    settings, notes = _trainer_settings(document.trainer)
    notes = [*plan.notes.notes, *notes, *document.notes]
    return "\n".join(
        [
            f'"""What the exp_manager section of {document.name} says, as objects of nemologger.',
            "",
            "Written by python -m nemologger.migrate. Run it with what makes your model and your data:",
            "python THIS_FILE my_module:Model my_module:Data",
            '"""',
            "",
            *_head(document, sorted(section.given), notes),
            *_imports(plan, settings),
            "",
            "",
            *_functions(plan, settings),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nemologger.migrate", description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="a YAML file with an exp_manager section, or the section alone")
    parser.add_argument("--out", type=Path, help="the Python file to write; default: standard output")
    options = parser.parse_args(arguments)
    try:
        code = migrate(options.config)
    except (NemologgerError, OmegaConfBaseException, YAMLError) as error:
        sys.stderr.write(f"{options.config}: {error}\n")
        if isinstance(error, UnsupportedInterpolationType):
            sys.stderr.write("Your script knows what that is: give what it prints with --cfg job --resolve.\n")
        return 2
    if options.out is None:
        sys.stdout.write(code)
        return 0
    disk, out = LocalDisk(), options.out.absolute()
    try:
        if is_dir(out):
            raise IsADirectoryError(f"it is a directory; give a file in it: {options.out / 'recipe.py'}")
        disk.make_directory(out.parent)
        disk.write(out, [code.encode()])
    except OSError as error:
        sys.stderr.write(f"--out {options.out} cannot be written: {error}\n")
        return 2
    return 0


# --- reading ----------------------------------------------------------------------------------------------------------


def _load(path: Path) -> _Document:
    if not is_file(path):
        raise NotFoundError(f"there is no file {path}")
    register_resolvers()
    try:
        content = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:  # OmegaConf has an OSError for a mere number, too
        raise ConfigurationError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigurationError(f"{path} is no mapping: expected keys, among them {_SECTION}")
    known = {one.name for one in fields(ExpManagerConfig)}
    if _SECTION in content:
        spoken_of = [_SECTION, *beside.spoken_of(content)]
        if isinstance(content.get("trainer"), DictConfig):
            spoken_of.append("trainer")
        section, others = content[_SECTION], [str(key) for key in content if key not in spoken_of]
    elif any(key in known for key in content) and not any(key in content for key in _OF_A_WHOLE_FILE):
        section, others = content, []
    else:
        raise ConfigurationError(
            f"{path} has no section {_SECTION} (found: {', '.join(map(str, content)) or 'nothing'}). If Hydra puts the "
            "configuration together from several files, give what your script prints with --cfg job."
        )
    if not isinstance(section, DictConfig):
        raise ConfigurationError(f"{path}: {_SECTION} is {section!r}, expected its keys below it")
    trainer = content.get("trainer") if section is not content else None
    settings, notes = _values(trainer) if isinstance(trainer, DictConfig) else ({}, [])
    resolved = dict(_interpolations(section))
    if section is not content:
        dirpath = OmegaConf.select(section, f"{PARAMS}.dirpath")
        notes += beside.notes(content, dirpath, resolved)
        if beside.saves_beside_training(content, dirpath):
            OmegaConf.update(section, f"{PARAMS}.async_save", True)
    return _Document(path.name, section, resolved, settings, others, notes)


def _values(trainer: DictConfig) -> tuple[dict[str, Any], list[Note]]:
    """The trainer's settings; what the file leaves to the command line is not among them."""
    settings, notes = {}, []
    for key in map(str, trainer):
        try:
            value = trainer[key]
            settings[key] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        except (MissingMandatoryValue, InterpolationToMissingValueError):
            why = f"has no value in the file (???): give it as run(model, data, {key}=...)"
            notes.append(Note(f"trainer.{key}", why, "warned"))
    return settings, notes


def _interpolations(section: DictConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def look(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(inner, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                look(inner, f"{path}[{i}]")
        elif isinstance(value, str) and "${" in value:
            found.append((path, value))

    look(OmegaConf.to_container(section, resolve=False), "")
    return found


def _trainer_settings(trainer: Mapping[str, Any]) -> tuple[dict[str, Any], list[Note]]:
    """Arguments for the Trainer, and what cannot be one."""
    parameters = inspect.signature(pl.Trainer).parameters
    settings, notes = {}, []
    for key, value in trainer.items():
        if key in ("logger", "enable_checkpointing"):
            if value not in (False, None):
                notes.append(
                    Note(f"trainer.{key}", f"was {value!r}; with exp_manager it has to be False, and is", "told")
                )
        elif key == "callbacks" and value:
            notes.append(
                Note("trainer.callbacks", "is not translated: add your own callbacks to make_callbacks()", "warned")
            )
        elif key not in parameters:
            notes.append(
                Note(f"trainer.{key}", f"(it was {value!r}) is no argument of this Lightning's Trainer", "warned")
            )
        elif key != "callbacks":
            try:
                settings[str(key)] = _made(value)
            except (ImportError, AttributeError, ValueError) as error:
                notes.append(Note(f"trainer.{key}", f"(it was {value!r}) is not translated: {error}", "warned"))
    return settings, notes


def _made(value: Any) -> Any:
    """``value`` with a call in the place of each ``_target_`` that Hydra would make something of."""
    if isinstance(value, list):
        return [_made(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {str(key): _made(one) for key, one in value.items()}
    for key, usual in _HYDRAS.items():
        if value.get(key, usual) != usual:
            raise ValueError(f"{key} is for Hydra, and asks for more than a call of {value['_target_']}")
    arguments = {str(key): _made(one) for key, one in value.items() if key not in ("_target_", "_convert_", *_HYDRAS)}
    # A strategy of the package pytorch_lightning is none for a trainer of lightning.pytorch.
    path = re.sub(r"^pytorch_lightning\b", "lightning.pytorch", str(value["_target_"]))
    module, _, name = path.rpartition(".")
    call = Call(Name(module, name), arguments)
    call.target.get()
    return call


# --- writing ----------------------------------------------------------------------------------------------------------


def _head(document: _Document, given: Sequence[str], notes: Sequence[Note]) -> list[str]:
    lines = ["# What became of each key:"]
    for key in given:
        lines += _comment(f"{key}: {new_home(key)}")
    empty = [str(key) for key, value in document.section.items() if key in NESTED and not value]
    for key in empty:
        lines += _comment(f"{key}: nothing is below it, so it has NeMo 1's defaults")
    if not given and not empty:
        lines.append("#   none was set: these are NeMo 1's defaults.")
    for title, kinds in (
        ("What works otherwise than in NeMo 1:", ("told",)),
        ("What does not do what the section asks for:", ("warned",)),
        ("What is NOT in this file, because it is not possible:", ("refused",)),
    ):
        chosen = [note for note in notes if note.kind in kinds]
        lines += ["#", f"# {title}"] if chosen else []
        for note in chosen:
            lines += _comment(f"{note.key} {note.text}.")
    if document.resolved:
        lines += ["#", "# Interpolations, whose values at the time of writing are below:"]
        for key, value in document.resolved.items():
            lines += _comment(f"{key}: {value}")
    if document.others:
        lines += ["#"]
        lines += _comment(
            f"Other sections of the file are not used here: {', '.join(document.others)}. Model and data are yours.",
            "# ",
        )
    return [*lines, ""]


def _comment(content: str, start: str = "#   ") -> list[str]:
    return textwrap.wrap(
        " ".join(content.splitlines()),
        _WIDTH,
        initial_indent=start,
        subsequent_indent=start + "  ",
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [start.rstrip()]


def _imports(plan: Plan, settings: Mapping[str, Any]) -> list[str]:
    needed = imports([*plan.first, *plan.callbacks, plan.log, plan.resume, dict(settings)])
    standard = {"datetime", "signal"}
    froms = {module: names for module, names in needed.items() if names}
    froms.setdefault("pkgutil", set()).add("resolve_name")
    froms.setdefault("pathlib", set()).add("Path")
    froms.setdefault("typing", set()).add("Any")

    def lines(modules: Sequence[str]) -> list[str]:
        return [_from(module, sorted(froms[module], key=_isort_key)) for module in sorted(modules)]

    ours = standard | {"pkgutil", "pathlib", "typing"}
    return [
        "from __future__ import annotations",
        "",
        "import sys",
        *lines([module for module in froms if module in ours]),
        "",
        "import lightning.pytorch as pl",
        "import nemologger as nl",
        *lines([module for module in froms if module not in ours]),
    ]


def _isort_key(name: str) -> tuple[int, str]:
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name.lower()


def _from(module: str, names: Sequence[str]) -> str:
    flat = f"from {module} import {', '.join(names)}"
    if len(flat) <= _WIDTH:
        return flat
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _functions(plan: Plan, settings: Mapping[str, Any]) -> list[str]:
    callbacks = [*plan.first, *plan.callbacks]
    options = "".join(
        f"        {text(key)}: {expression(value, 2, 12 + len(key))},\n" for key, value in settings.items()
    )
    return [
        "def make_callbacks() -> list[pl.Callback]:",
        '    """What the trainer does besides training."""',
        f"    return {expression(callbacks, 1, 11)}",
        "",
        "",
        "def make_log() -> nl.NeMoLogger:",
        '    """Where the run writes, and what it saves."""',
        f"    return {expression(plan.log, 1, 11)}",
        "",
        "",
        "def make_resume() -> nl.AutoResume:",
        '    """What the run goes on from."""',
        f"    return {expression(plan.resume, 1, 11)}",
        "",
        "",
        "def make_trainer(**settings: Any) -> nl.Trainer:",
        '    """The trainer; ``settings`` take the place of those below."""',
        f"    options: dict[str, Any] = {{\n{options}        **settings,\n    }}"
        if options
        else "    options: dict[str, Any] = {**settings}",
        "    return nl.Trainer(",
        "        callbacks=make_callbacks(),",
        "        logger=False,",
        "        enable_checkpointing=False,",
        "        **options,",
        "    )",
        "",
        "",
        "def run(model: pl.LightningModule, data: Any, **trainer_settings: Any) -> Path:",
        '    """Train, or go on training; returns the directory of the experiments."""',
        "    trainer = make_trainer(**trainer_settings)",
        "    return nl.train(model, data, trainer, make_log(), make_resume())",
        "",
        "",
        'if __name__ == "__main__":',
        "    if len(sys.argv) != 3:",
        '        sys.exit(f"usage: python {sys.argv[0]} my_module:Model my_module:Data")',
        "    run(resolve_name(sys.argv[1])(), resolve_name(sys.argv[2])())",
    ]


if __name__ == "__main__":
    sys.exit(main())
