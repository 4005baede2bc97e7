"""Lightning's door to checkpoints: what ``fit(ckpt_path=...)`` loads, whoever wrote it."""

from __future__ import annotations

import logging
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import CheckpointIO
from torch.serialization import safe_globals

from nemologger import lightning_port, names, sharded_state
from nemologger.checkpoint import manifest as manifests
from nemologger.checkpoint.find import settled
from nemologger.checkpoint.reading.in_place import fill_special, loads_plainly
from nemologger.checkpoint.reading.load import (
    Opened,
    averages_of,
    is_of_model,
    open_checkpoint,
)
from nemologger.checkpoint.state.plain import fill_in, without_left_out
from nemologger.disk.there import exists, is_dir
from nemologger.errors import CheckpointError, DamagedCheckpointError, NotFoundError, RefusedError
from nemologger.loading.callback_states import settle
from nemologger.loading.compare import check_model
from nemologger.loading.optimizer_states import align_to, check
from nemologger.stores.client import before_training
from nemologger.stores.path import in_store, storage_path

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)


class DirectoryCheckpointIO(CheckpointIO):
    """Reads checkpoint directories; leaves files, and all writing, to the plugin it replaces.

    Args:
        trainer: Whose checkpoints. Its model is compared with a checkpoint before anything is loaded into it.
        inner: The plugin for everything else.
    """

    def __init__(self, trainer: pl.Trainer, inner: CheckpointIO) -> None:
        self._trainer = trainer
        self._inner = inner
        self._loaded: tuple[Path, Opened, list[dict[str, Any]]] | None = None  # optimizers' states
        self._loaded_file: tuple[str | Path, dict[str, Any]] | None = None
        self._kept: tuple[str, Opened | None] | None = None
        self._asked: tuple[str | Path | None, bool | None] = None, None  # of the fit that is beginning
        self._begins = False
        self._options: dict[str, Mapping[str, Any]] = {}

    def keep(self, path: str | Path, checkpoint: Opened | None) -> None:
        """What :meth:`load_checkpoint` is to read for ``path``, once: part of it has been read already, to verify it.

        None if nothing of it was kept: it has been verified all the same.
        """
        self._kept = (str(path), checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint file, as Lightning does for ``trainer.save_checkpoint``."""
        self._inner.save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint file."""
        self._inner.remove_checkpoint(path)

    @before_training("What the checkpoint holds")
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint at ``path`` as Lightning's dictionary.

        Where nobody but Lightning sees it, the model in it is the live one, which has been read there: a second copy of
        all parameters would need memory, and copying them time. It is checked before whether all of them fit.

        Args:
            path: A checkpoint directory, or a file that Lightning wrote.
            map_location: Only for files; tensors of a directory are on the CPU, and move to the model's device later.
            weights_only: Only for files; reading a directory never unpickles.

        Raises:
            NotFoundError: If there is nothing at ``path``.
            DamagedCheckpointError: If it is not as it was written.
            ModelMismatchError: If it belongs to a model with other parameters.
            CheckpointError: If a fit is to go on from a checkpoint that has no optimizer state.
        """
        kept, self._kept = self._kept, None
        if self._is_asked_for(path) and not lightning_port.is_in_hook(self._trainer):
            self._asked, self._begins = (path, weights_only), True
        lightning_port.settle_precision(self._trainer)
        directory = settled(self.place_of(path))
        if not is_dir(directory):
            if not exists(directory):
                raise NotFoundError(f"there is no checkpoint at {path}")
            return self._load_file(path, map_location, weights_only)
        strategy, module = self._trainer.strategy, self._trainer.lightning_module
        is_verified = kept is not None and kept[0] == str(path)
        opened = (kept[1] if kept is not None and is_verified else None) or open_checkpoint(
            directory, verified=is_verified
        )
        opened = self._with_own_objects(opened, path)
        if module is not None and not lightning_port.will_rewrite_state(module):
            check_model(directory, sharded_state.model_state(strategy), module, opened=opened)
        is_fit = self._trainer.state.fn == "fit"
        if is_fit and not opened.has_optimizer and not self._is_finished(directory):
            raise CheckpointError(
                f"{path} holds a model but no optimizer state, so training cannot go on from it. Resume from a "
                "checkpoint that has one, or start a new run from its weights: "
                f"AutoResume(restore_config=RestoreConfig(path={str(path)!r}))"
            )
        if strategy.checkpoint_io is self and lightning_port.loads_as_is(self._trainer, module):
            checkpoint = opened.read(into=module, optimizer=is_fit)
        else:
            sharded = sharded_state.shards_state(strategy)
            checkpoint = opened.read(*([sharded_state.templates(strategy)] if sharded else []))
        if module is not None:
            fill_special(module, checkpoint["state_dict"])
        if isinstance(states := checkpoint.get("callbacks"), dict):
            checkpoint["callbacks"] = settle(self._trainer, states, is_fit=is_fit)
        if is_fit and not opened.has_optimizer:
            checkpoint.update(optimizer_states=[], lr_schedulers=[])  # fit will return at once
        most = self._trainer.max_epochs
        # AutoResume, which has had it verified, has said that nothing is left to train.
        if is_verified and is_fit and lightning_port.has_more_epochs(checkpoint, most) and self._is_finished(directory):
            lightning_port.count_no_more_epochs(checkpoint, most)
        rest = replace(opened, tensors={})  # the optimizers have theirs, and the model is not to be kept for them
        self._loaded = (directory, rest, checkpoint["optimizer_states"]) if is_fit else None
        if is_fit and self._trainer.is_global_zero:
            self._say_what_nobody_keeps(directory)
        return checkpoint

    def _with_own_objects(self, opened: Opened, path: str | Path) -> Opened:
        """``opened``, with objects of the program where its hooks had put such into the checkpoint."""
        common = dict(opened.common)
        schedules = common.get("lr_schedulers")  # they are not made yet, and take as attributes what their state has
        if isinstance(schedules, list):
            common["lr_schedulers"] = [without_left_out(one) if isinstance(one, dict) else one for one in schedules]
        common, missing = fill_in(common, lambda place: lightning_port.at(self._trainer, place))
        missing = [name for name in missing if not name.startswith("hyper_parameters.")]  # nobody asks for them
        if missing and self._trainer.is_global_zero:
            log.warning("%s does not hold %s: None takes its place", path, ", ".join(missing))
        return replace(opened, common=common)

    def _say_what_nobody_keeps(self, directory: Path) -> None:
        keeps = any(
            isinstance(callback, lightning_port.KeepsWeights) for callback in lightning_port.callbacks(self._trainer)
        )
        if not keeps and averages_of(directory) is not None:
            log.warning(
                "%s holds averages of the weights, and this run has no EMA callback: its own checkpoints will have none",
                directory,
            )

    def _say_other_dtypes(self, directory: Path, opened: Opened) -> None:
        """A run that goes on in another precision does so with other values: nobody is to learn that from the curves."""
        module = self._trainer.lightning_module
        now = {} if module is None else {name: one.dtype for name, one in module.named_parameters()}
        stored = {
            key.removeprefix("state_dict."): dtype for key, (_, dtype) in opened.shapes.items() if is_of_model(key)
        }
        changes = [(stored[name], dtype) for name, dtype in now.items() if stored.get(name, dtype) != dtype]
        if changes:
            log.warning(
                "%s: %d of %d parameters are converted from %s to %s, this run's precision: its losses are not those of a "
                "run that was never stopped",
                directory,
                len(changes),
                len(now),
                *changes[0],
            )

    @before_training("What the checkpoint holds")
    def load_sharded(self, path: str | Path) -> dict[str, Any] | None:
        """As :meth:`load_checkpoint`, and load model and optimizers; None if ``path`` is not one of ours or NeMo's."""
        directory = settled(self.place_of(path))
        if not any(exists(part / names.DCP_METADATA) for part in (directory, directory / names.WEIGHTS)):
            return None
        if not any(exists(part / names.COMMON) for part in (directory, directory / names.WEIGHTS)):
            return None  # Lightning's own
        trainer = self._trainer
        checkpoint = self.load_checkpoint(directory)
        self.align_optimizers()
        strategy, strict = trainer.strategy, trainer.lightning_module.strict_loading
        sharded_state.load_model(strategy, checkpoint["state_dict"], strict=strict)
        if trainer.state.fn == "fit":
            by_number = lightning_port.optimizer_names(trainer)
            sharded_state.load_optimizers(
                strategy, checkpoint.get("optimizer_states", []), trainer.optimizers, by_number
            )
        return checkpoint

    def remember(self, place: Path) -> None:
        """Reach checkpoints below ``place`` with its options, if it is in a store: their paths come as texts."""
        remote = in_store(place)
        if remote is not None:
            self._options[str(remote)] = remote.store.options

    def place_of(self, path: str | Path) -> Path:
        """Where ``path`` is, with the options of what was remembered."""
        known = max((place for place in self._options if f"{path}/".startswith(f"{place}/")), key=len, default="")
        return storage_path(path, self._options.get(known))

    def begin(self) -> None:
        """Another fit, validation or test begins."""
        self._asked, self._begins = (None, None), True

    def restore_again(self) -> None:
        """For ``on_fit_start``: bring back what the fit is to go on from, where a callback has put other state over it."""
        if self._begins and self._trainer.state.fn == "fit":
            lightning_port.restore_again(self._trainer, *self._asked)
        self._begins = False

    def align_optimizers(self) -> None:
        """Bring the optimizer states that were loaded into the order of the trainer's optimizers."""
        file, self._loaded_file = self._loaded_file, None
        if file is not None:
            check(self._trainer, file[0], file[1].get("optimizer_states", ()))
        if self._loaded is None:
            return
        loaded, self._loaded = self._loaded, None
        if self._trainer.is_global_zero:
            self._say_other_dtypes(*loaded[:2])
        align_to(self._trainer, *loaded)

    def align_at_last(self) -> None:
        """As :meth:`align_optimizers`, where no callback of ours has done so. Who renames parameters has the order alone."""
        module = self._trainer.lightning_module
        # LearningRateFinder puts back what was there before it tried, from a file of its own.
        puts_back = lightning_port.is_in_hook(self._trainer)
        if module is not None and not (lightning_port.will_rewrite_state(module) or puts_back):
            self.align_optimizers()

    def _is_asked_for(self, path: str | Path) -> bool:
        """Whether it is what ``fit`` or the like was asked to go on from. Lightning also reads files of its own."""
        return str(self._trainer.ckpt_path) == str(path)

    def _load_file(self, path: str | Path, map_location: Any, weights_only: bool | None) -> dict[str, Any]:
        options = {} if map_location is None else {"map_location": map_location}
        try:
            with safe_globals(_omegaconf_types()):
                loaded: dict[str, Any] = self._inner.load_checkpoint(path, weights_only=weights_only, **options)
        except OSError:
            raise
        except Exception as error:
            if not self._is_of_torch(path):  # torch often says of a file of anything that it wants to be trusted
                raise DamagedCheckpointError(
                    f"{path} is no file of torch.save, or damaged: it begins otherwise. Give a *.ckpt file of Lightning, "
                    "or a checkpoint directory"
                ) from error
            if not isinstance(error, pickle.UnpicklingError):
                raise DamagedCheckpointError(
                    f"{path} cannot be read as a checkpoint of Lightning: {type(error).__name__}: {error}"
                ) from error
            raise RefusedError(
                f"{path} holds more than plain types, and loading it would run code: {error}\nIf you trust it, pass "
                "trainer.fit(..., weights_only=False). NeMoLogger(ckpt=nemologger.ModelCheckpoint()) writes checkpoints "
                "that need no trust."
            ) from error
        if self._is_asked_for(path) and (not isinstance(loaded, dict) or "pytorch-lightning_version" not in loaded):
            raise CheckpointError(
                f"{path} is no checkpoint of a Lightning run, from which training could go on: it holds "
                f"{_shown(loaded)}. If these are weights, load them into the model in your program"
            )
        if self._is_asked_for(path) and self._trainer.state.fn == "fit":
            self._loaded_file = (path, loaded)
        return loaded

    def _is_of_torch(self, path: str | Path) -> bool:
        """Whether a file begins as an archive, or as the pickle that torch wrote before 1.6."""
        with self.place_of(path).open("rb") as file:
            return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))

    def _is_finished(self, checkpoint: Path) -> bool:
        if not exists(checkpoint / names.MANIFEST):
            return False
        manifest = manifests.read(checkpoint)
        return manifest.is_finished(max_steps=self._trainer.max_steps, max_epochs=self._trainer.max_epochs)

    def teardown(self) -> None:
        """Pass it on."""
        self._inner.teardown()


def _shown(loaded: Any) -> str:
    """What a file of somebody else's holds, in a few words."""
    if not isinstance(loaded, dict):
        return f"a {type(loaded).__name__}"
    return f"a dictionary with {', '.join(map(repr, list(loaded)[:5])) or 'nothing in it'}"


def _omegaconf_types() -> list[Any]:
    """What a configuration object of OmegaConf is made of: NeMo 1's models have one among their hyperparameters.

    Making one from its state runs nothing: its values are plain, and an interpolation is resolved when somebody asks for it.
    """
    from omegaconf import DictConfig, ListConfig, nodes
    from omegaconf.base import ContainerMetadata, Metadata

    leaves = [nodes.AnyNode, nodes.BooleanNode, nodes.FloatNode, nodes.IntegerNode, nodes.StringNode]
    plain = [Any, bool, dict, float, int, list, str, tuple, defaultdict]
    return [DictConfig, ListConfig, ContainerMetadata, Metadata, *leaves, *plain]


def install(trainer: pl.Trainer, place: Path | None = None) -> None:
    """Let ``trainer`` read checkpoint directories, also those at ``place`` in a store. Calling it again changes nothing."""
    current = trainer.strategy.checkpoint_io
    plugin = current if isinstance(current, DirectoryCheckpointIO) else DirectoryCheckpointIO(trainer, current)
    if plugin is not current:
        lightning_port.use_checkpoint_io(trainer, plugin, plugin.load_sharded, plugin.align_at_last)
    if place is not None:
        plugin.remember(place)
    plugin.begin()


def place_of(trainer: pl.Trainer, path: str | Path) -> Path:
    """Where the checkpoint ``path`` of ``trainer`` is; in a store, with the options that are known for it."""
    plugin = trainer.strategy.checkpoint_io
    return plugin.place_of(path) if isinstance(plugin, DirectoryCheckpointIO) else storage_path(path)


def keeps(
    trainer: pl.Trainer, module: pl.LightningModule | None, *, optimizer: bool
) -> Callable[[Path], Callable[[str], bool]] | None:
    """What to keep of a checkpoint that is read in this process, before the fit, so that the fit need not read it again.

    Args:
        trainer: Whose checkpoint it will be.
        module: The model, if it is known.
        optimizer: Whether optimizers' states will be needed.

    Returns:
        For a checkpoint, which flat keys. Not those of a model in files that is to be read into place. None if nothing can
        be kept, because another process trains, or reads only parts.
    """
    strategy = trainer.strategy
    if lightning_port.forks_later(trainer) or strategy.restore_checkpoint_after_setup:
        return None
    in_place = lightning_port.loads_as_is(trainer, module) and (module is None or loads_plainly(module))

    def keep(checkpoint: Path) -> Callable[[str], bool]:
        again = in_place and in_store(checkpoint) is None
        return lambda key: not again if is_of_model(key) else optimizer or not in_place

    return keep


def keep(trainer: pl.Trainer, path: str | Path, checkpoint: Opened | None) -> None:
    """As :meth:`DirectoryCheckpointIO.keep`, if ``trainer`` has one."""
    plugin = trainer.strategy.checkpoint_io
    if isinstance(plugin, DirectoryCheckpointIO):
        plugin.keep(path, checkpoint)


def get_ready(trainer: pl.Trainer) -> None:
    """For ``on_fit_start``: what was loaded is what the fit is to go on from, and in the order of its optimizers."""
    plugin = trainer.strategy.checkpoint_io
    if isinstance(plugin, DirectoryCheckpointIO):
        plugin.restore_again()
        plugin.align_optimizers()
