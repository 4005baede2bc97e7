"""Prove that a recipe resumes exactly: ``python -m nemologger.check_resume RECIPE --steps 40 --at 17``.

Trains straight through, then again with a kill after step ``--at`` and a restart, in processes and directories of their
own, and compares every step of every rank. Exit code 0: none differs; 1: one does; 2: a run failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fiddle as fdl
import numpy as np
import torch
import xxhash
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from nemologger import lightning_port
from nemologger.disk.there import exists
from nemologger.errors import ConfigurationError
from nemologger.logger import NeMoLogger
from nemologger.model_checkpoint import ModelCheckpoint
from nemologger.resume import AutoResume

if TYPE_CHECKING:
    import lightning.pytorch as pl

_SUFFIX = "_recipe"
_SHOWN = 2000  # characters of a failed run's output
_NAMED = "exact resume, "  # how a line of the log begins that names what does not go on


class Recorder(Callback):
    """Writes down what each step came to, and kills its process when it is time.

    Args:
        directory: Where to write; a file for each rank.
        end_at: The last step. Lightning ends a run there itself, if it counts its steps.
        kill_at: The step to kill the process after, once it is saved.
    """

    def __init__(self, directory: Path, end_at: int, kill_at: int | None = None) -> None:
        self.directory = directory
        self.end_at = end_at
        self.kill_at = kill_at

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Kill."""
        if self.kill_at is not None and lightning_port.steps_taken(trainer) >= self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write: the loss, or where a module returns none, a checksum of its parameters."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        found = f"loss {loss.item()!r}" if isinstance(loss, torch.Tensor) else f"parameters {_checksum(pl_module)}"
        with (self.directory / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([lightning_port.steps_taken(trainer), found]) + "\n")
        if trainer.global_step == 0 and lightning_port.steps_taken(trainer) >= self.end_at:
            trainer.should_stop = True


def load_recipe(where: str) -> Any:
    """The recipe at ``where``.

    Args:
        where: ``file.py`` with one function called ``…_recipe``, ``file.py:function`` or ``module:function``; the function
            takes no arguments and returns a ``fdl.Partial`` of ``nemologger.train``.

    Raises:
        ConfigurationError: If there is no such function, or it returns something else.
    """
    name, _, function = where.partition(":")
    if name.endswith(".py"):
        path = Path(name).absolute()
        if not exists(path):
            raise ConfigurationError(f"there is no file {path}")
        sys.path.insert(0, str(path.parent))
        name = path.stem
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # what the recipe itself imports
        raise ConfigurationError(f"{where}: there is no module {error.name}; a file's name ends in .py") from error
    if not function:
        functions = [key for key, value in vars(module).items() if key.endswith(_SUFFIX) and callable(value)]
        if not functions:
            raise ConfigurationError(
                f"{where} has no function called ...{_SUFFIX}: it takes no arguments and returns a fdl.Partial of "
                "nemologger.train, as in nemologger's recipes/byte_gpt.py"
            )
        if len(functions) != 1:
            raise ConfigurationError(
                f"{where} has {len(functions)} functions called ...{_SUFFIX} {sorted(functions)}: name one, as in "
                f"{where}:{functions[0]}"
            )
        function = functions[0]
    if not hasattr(module, function):
        raise ConfigurationError(f"{name} has no function {function}")
    recipe = getattr(module, function)()
    if not isinstance(recipe, fdl.Partial):
        raise ConfigurationError(
            f"{where} returned a {type(recipe).__name__}: a fdl.Partial of nemologger.train is needed"
        )
    return recipe


def live(recipe: Any, directory: Path, steps: int, at: int, kill: bool, seed: int) -> None:
    """One life of a run: in this process, and those that Lightning starts from it.

    Args:
        recipe: What to train. Its directories, loggers and intervals of saving are replaced.
        directory: Where the run writes.
        steps: Optimizer steps in all.
        at: Save every so many steps.
        kill: End with SIGKILL after step ``at``.
        seed: Of this process's generators.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    recipe.trainer.max_steps, recipe.trainer.max_epochs, recipe.trainer.logger = steps, -1, False
    recipe.trainer.enable_progress_bar = False
    ckpt = fdl.Config(ModelCheckpoint, monitor=None, every_n_train_steps=at, save_top_k=0, filename="{step}")
    recipe.log = fdl.Config(NeMoLogger, name="run", log_dir=str(directory), ckpt=ckpt)
    recipe.resume = fdl.Config(AutoResume, resume_if_exists=True, resume_ignore_no_checkpoint=True)
    run = fdl.build(recipe)
    run.keywords["trainer"].callbacks.append(Recorder(directory, steps, at if kill else None))
    run()


def first_difference(straight: Path, resumed: Path) -> tuple[int, str] | None:
    """The first step at which two runs differ, and how they do; None if none differs."""
    files = sorted(path.name for path in straight.glob("rank-*.jsonl"))
    if not files:
        return 0, "step 0: the run took no step"
    found: list[tuple[int, str]] = []
    for name in files:
        lives = [[json.loads(line) for line in (run / name).read_text().splitlines()] for run in (straight, resumed)]
        for a, b in zip_longest(*lives):
            if a != b:
                (step, one), (_, other) = a or b, b or [0, "nothing"]
                found.append((step, f"step {step}, {name[:-6]}: {one if a else 'nothing'} straight, {other} resumed"))
                break
    return min(found) if found else None


def _named(run: Path) -> list[str]:
    """What the logs of ``run`` say does not go on, or may not; each once."""
    logs = [path.read_text(errors="replace") for path in sorted(run.rglob("nemo_log_globalrank-*"))]
    return list(
        dict.fromkeys(_NAMED + line.partition(_NAMED)[2] for line in "".join(logs).splitlines() if _NAMED in line)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nemologger.check_resume", description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", help="file.py, file.py:function or module:function")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--at", type=int, default=17, help="the step to stop after (default: %(default)s)")
    parser.add_argument("--life", nargs=3, metavar=("DIRECTORY", "KILL", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console = Console(stderr=False, width=None if sys.stdout.isatty() else 160)
    try:
        if not 0 < options.at < options.steps:
            raise ConfigurationError(f"--at {options.at}: must be between 1 and --steps {options.steps} less 1")
        if options.life is not None:
            directory, kill, seed = options.life
            live(load_recipe(options.recipe), Path(directory), options.steps, options.at, bool(int(kill)), int(seed))
            return 0
        load_recipe(options.recipe)
        return _compare(console, options)
    except ConfigurationError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2


def _compare(console: Console, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="check_resume-") as scratch:
        straight, resumed = Path(scratch) / "straight", Path(scratch) / "resumed"
        # The second life starts from another seed: what it draws must come from the checkpoint.
        for directory, kill, seed in ((straight, 0, 0), (resumed, 1, 0), (resumed, 0, 1)):
            directory.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "nemologger.check_resume", options.recipe]
            command += ["--steps", str(options.steps), "--at", str(options.at)]
            done = subprocess.run(
                [*command, "--life", str(directory), str(kill), str(seed)], capture_output=True, text=True, check=False
            )
            if done.returncode != (-signal.SIGKILL if kill else 0):
                console.print(f"a run failed with {done.returncode}:", style="red")
                console.print((done.stdout + done.stderr)[-_SHOWN:], markup=False, soft_wrap=True)
                return 2
        difference, named = first_difference(straight, resumed), _named(resumed)
    if difference is not None:
        step, how = difference
        console.print(f"the runs differ first at {how}", style="red", markup=False, soft_wrap=True)
        if 0 < step <= options.at:
            console.print(
                f"that is before the kill after step {options.at}: two starts of this program differ without any resume. "
                "Look for what it draws without a seed, as random.Random() and numpy.random.default_rng() do, or in the "
                "order of a set()",
                soft_wrap=True,
            )
        for line in named:
            console.print(line, markup=False, soft_wrap=True)
        if torch.cuda.is_available():
            console.print(
                "on a GPU, two runs are only alike with Trainer(deterministic=True, benchmark=False)", soft_wrap=True
            )
        return 1
    console.print(
        f"no step differs: {options.steps} steps straight through, and with a kill after step {options.at}",
        style="green",
    )
    return 0


def _checksum(module: torch.nn.Module) -> str:
    digest = xxhash.xxh3_64()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
