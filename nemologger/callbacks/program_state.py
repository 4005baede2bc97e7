"""What a program changes beside weights, as ExactResume saves it of every rank."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port, sharded_state
from nemologger.callbacks import not_exact
from nemologger.exact.loaders.session import most_of_each
from nemologger.exact.program.acting import acts_by
from nemologger.exact.program.apart import Apart
from nemologger.exact.program.attributes import Attributes
from nemologger.exact.program.functions import holders_of_schedule
from nemologger.exact.program.gradients import keep_gradients, put_back_gradients
from nemologger.exact.program.inner_optimizers import InnerOptimizers
from nemologger.exact.program.made import Made, made
from nemologger.exact.program.metrics import metrics_apart
from nemologger.exact.program.own_states import OwnStates
from nemologger.exact.program.settings import Settings
from nemologger.exact.program.strangers import Strangers
from nemologger.exact.program.swapped import Swapped
from nemologger.exact.reach.code import is_class_of_the_program
from nemologger.exact.reach.configs import Entries, is_config
from nemologger.exact.reach.hooks import HOOKED, registered
from nemologger.exact.reach.objects import is_of_the_program
from nemologger.exact.reach.paths import root_of
from nemologger.exact.values.plain_contents import CannotBeKeptError
from nemologger.lightning_port import epoch_results

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl
    from torchmetrics import Metric

#: After so many of the first steps it is looked at what the module's lists are for.
_LOOKS = 3
#: Iterators, and what learns: of the module they are there for what it takes of them while it trains.
_DECIDING = ("builtins.generator", "itertools.", "torch.utils.data.dataloader._", "sklearn.")


class ProgramState:
    """Attributes and settings of the module, and what has been logged, from ``on_train_start`` on.

    Args:
        trainer: The trainer, about to train.
        module: What it trains, as the program made it.
        counters: What metrics had counted before the sanity check, if there was one: a resumed run has none.
    """

    def __init__(
        self, trainer: pl.Trainer, module: pl.LightningModule, counters: epoch_results.Counters | None = None
    ) -> None:
        self._trainer = trainer
        self._most = most_of_each(int(trainer.world_size))
        self._accumulate, self._clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val
        self._settings = Settings(module, trainer.lr_scheduler_configs)
        self._counters = epoch_results.counters(trainer) if counters is None else counters
        roots, drawing = _roots_of(trainer, module)
        theirs = self._theirs = lightning_port.names_of_lightning()
        self._attributes = Attributes(roots, drawing, {"module"}, theirs, self._most, trainer.optimizers)
        callbacks = {path: one for path, one in drawing.items() if isinstance(one, Callback)}
        self._save_themselves = {p for p, one in callbacks.items() if lightning_port.callback_saves_itself(one)}
        self._counting = {path: one for path, one in callbacks.items() if _saves_nothing(one)}
        self._of_callbacks = Attributes(self._counting, {}, self._counting, theirs, 0)
        lightning_port.behind_module(trainer, "on_train_start", self._attributes.begin)
        self._named: set[str] = set()
        #: Of callbacks the attributes by which they change nothing.
        self._telling: dict[str, set[str]] = {}
        self._looks_left = _LOOKS
        self._strangers = Strangers(self._may_hold_states, theirs)
        self._own_states = OwnStates(self._may_hold_states, self._of_trainer, theirs, self._most)
        self._apart = Apart(self._may_hold_networks, module, theirs, self._most)
        lightning_port.behind_module(trainer, "on_train_start", self._apart.begin)
        self._inner_optimizers = InnerOptimizers(trainer.optimizers, self._most)
        self._gradients_lost: str | None = None
        self._swapped = Swapped(self._may_swap, module, theirs)
        self._members: dict[str, str] = {}
        self._say_hooks: Callable[[], None] = lambda: None
        lightning_port.behind_module(trainer, "on_train_start", lambda: self._swapped.begin(self._members))

    def _may_hold_states(self) -> dict[str, object]:
        """Parts of the module, and callbacks that save nothing themselves; what data have is kept with the loaders."""
        found = {
            path: holder
            for path, holder in self._attributes.holders().items()
            if root_of(path) == "module"
            or HOOKED in path
            or (isinstance(holder, Callback) and not lightning_port.callback_saves_itself(holder))
        }
        return found | {path: one for path, one in self._of_callbacks.holders().items() if ":" not in path}

    def _may_hold_networks(self) -> dict[str, object]:
        """Also global variables, and callbacks whose state may leave theirs out."""
        more = self._attributes.holders().items()
        return self._may_hold_states() | {p: one for p, one in more if ":" in p or p in self._save_themselves}

    def _metrics_apart(self) -> dict[str, Metric]:
        """Also those of callbacks with a state, which is rank 0's."""
        return metrics_apart(self._may_hold_networks(), self._trainer.lightning_module, self._theirs)

    def _may_swap(self) -> dict[str, object]:
        """Also datasets, where they stay from epoch to epoch."""
        loaders = [] if lightning_port.reloads(self._trainer) else lightning_port.training_loaders(self._trainer)
        datasets = {f"dataset {i}": getattr(loader, "dataset", None) for i, loader in enumerate(loaders)}
        return self._attributes.holders() | {name: one for name, one in datasets.items() if hasattr(one, "__dict__")}

    def _of_trainer(self) -> list[object]:
        """What Lightning saves, or who saves it."""
        trainer = self._trainer
        return [
            *trainer.optimizers,
            *(config.scheduler for config in trainer.lr_scheduler_configs),
            trainer.precision_plugin,
        ]

    @property
    def records(self) -> dict[str, str]:
        """What most often is a record of one life, has changed and is not kept.

        That are lists and dictionaries of the module that have only been added to, when it was last saved, what callbacks
        without a state keep, and what is in objects of libraries. Of these what was not named before.
        """
        within = tuple(f"{path}." for path in self._own_states.paths)  # they say themselves what is to be kept
        records = self._attributes.records.items()
        told = {
            f"attribute {path}": not_exact.RECORD.format(kind) for path, kind in records if not path.startswith(within)
        }
        told |= {f"attribute {path}": not_exact.SET_ANEW for path in self._attributes.set_anew}
        told |= {f"attribute {path}": why for path, why in self._changed_strangers(deciding=False).items()}
        told |= {} if self._gradients_lost is None else {"gradients": not_exact.GRADIENTS.format(self._gradients_lost)}
        callbacks = self._changed_of_callbacks()
        self._named |= {f"{callback}.{name}" for callback, names in callbacks.items() for name in names}
        return told | {name: not_exact.OF_CALLBACK.format(", ".join(kept)) for name, kept in callbacks.items()}

    def _changed_of_callbacks(self) -> dict[str, list[str]]:
        """What callbacks without a state keep and has changed, and was not named before."""
        within = tuple(f"{path}." for path in self._own_states.paths)
        found: dict[str, list[str]] = {}
        for path in self._of_callbacks.changed():
            if path not in self._named and ":" not in path and not path.startswith(within):
                callback, _, name = path.partition(".")
                found.setdefault(callback, []).append(name)
        return found

    def _acting_callbacks(self) -> dict[str, str]:
        """Those that change training by what they keep."""
        told: dict[str, str] = {}
        if not any(self._may_act(path, callback) for path, callback in self._counting.items()):
            return told  # to look for what has changed takes its time where callbacks keep much
        for callback, names in self._changed_of_callbacks().items():
            acting = acts_by(self._counting[callback], self._trainer.lightning_module, names)
            self._named |= {f"{callback}.{name}" for name in acting}
            if acting:
                told[callback] = not_exact.CALLBACK_ACTS.format(", ".join(acting))
        return told

    def _may_act(self, path: str, callback: Callback) -> bool:
        """Whether it does so by something that was not named before."""
        names = {*vars(callback)} - self._telling.setdefault(path, set())
        acting = set(acts_by(callback, self._trainer.lightning_module, names)) if names else set()
        self._telling[path] |= names - acting
        return any(f"{path}.{name}" not in self._named for name in acting)

    def _changed_strangers(self, *, deciding: bool) -> dict[str, str]:
        """Those that were not named before: those of the module that decide about training, or the others."""
        told = {}
        for path, (kind, names) in self._strangers.changed().items():
            decides = path.startswith("module") and kind.startswith(_DECIDING)
            if decides == deciding and path not in self._named and not self._is_saved_by_hand(path):
                self._named.add(path)
                told[path] = not_exact.STRANGER.format(kind, ", ".join(names))
        return told

    def _is_saved_by_hand(self, path: str) -> bool:
        """Whether it may be."""
        return root_of(path) == "module" and lightning_port.saves_more(self._trainer.lightning_module)

    def _is_of_callback_with_state(self, path: str) -> bool:
        """Which may save the network at ``path``, too, and may make it later, of what it has saved."""
        return root_of(path) in self._save_themselves

    def look(self) -> None:
        """After a step, for the first ones: how lists and dictionaries of the module change, and which objects stay."""
        if self._looks_left:
            self._looks_left -= 1
            self._attributes.look()
            self._strangers.look()
            self._apart.look()

    def _hooks(self) -> dict[str, list[str]]:
        return registered("module", self._trainer.lightning_module, self._trainer.optimizers)

    def begin_batch(self) -> None:
        """Before anybody sets or registers something for a batch alone: nothing of that is there at a save either."""
        self._settings.begin_batch()
        if self._looks_left < _LOOKS:  # behind the first one: a program may register them in that, as in each life
            self._say_hooks()

    def _compare_hooks(self, then: dict[str, list[str]], say: Callable[[str, str], None]) -> None:
        now = self._hooks()
        for path in sorted({*now, *then}):
            if (there := now.get(path, [])) != (before := then.get(path, [])):
                say(path, not_exact.HOOKS.format(", ".join(there) or "none", ", ".join(before) or "none"))
        self._say_hooks = lambda: None

    def to_plain(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What has changed, as plain types, and of what has not been kept, why."""
        with self._attributes.at_rest(), self._of_callbacks.at_rest():
            return self._to_plain()

    def _to_plain(self) -> tuple[dict[str, Any], dict[str, str]]:
        trainer = self._trainer
        logged, too_large = epoch_results.take(trainer, self._most, self._counters, self._metrics_apart())
        limits = {f"metric {name}": not_exact.TOO_MUCH_LOGGED for name in too_large}
        attributes, lost = self._attributes.to_plain()
        own_states, own_lost = self._own_states.to_plain()
        within = tuple(f"{path}." for path in self._own_states.paths)
        named = {path: not_exact.NOT_SAVED.format(why) for path, why in lost.items() if not path.startswith(within)}
        named |= {path: not_exact.OWN_STATE_LOST.format(why) for path, why in own_lost.items()}
        apart, apart_lost = self._apart.to_plain()
        apart_lost = {path: why for path, why in apart_lost.items() if not self._is_of_callback_with_state(path)}
        named |= {path: not_exact.APART_LOST.format(why) for path, why in apart_lost.items()}
        named |= self._changed_strangers(deciding=True)
        members, others = self._swapped.changed()
        named |= {path: not_exact.SWAPPED.format(now, then) for path, (then, now) in others.items()}
        limits |= {f"attribute {path}": why for path, why in named.items() if not self._is_saved_by_hand(path)}
        limits |= self._acting_callbacks()
        if lightning_port.reloads(trainer):
            of_data = [path for path in attributes["attributes"] if path.startswith("data module.")]
            limits |= {f"attribute {path}": not_exact.BEHIND_LOADERS for path in of_data}
        inner, inner_lost = self._inner_optimizers.to_plain()
        limits |= {path: not_exact.INNER_LOST.format(why) for path, why in inner_lost.items()}
        changed = trainer.accumulate_grad_batches != self._accumulate
        plain = {
            "logged": logged,
            "attributes": attributes,
            "lost": sorted(lost),
            "own_states": own_states,
            "apart": apart,
            "inner_optimizers": inner,
            "gradients": self._gradients(),
            "members": members,
            "hooks": self._hooks(),
            "settings": self._settings.to_plain(
                lightning_port.modes_of_training(trainer), within_step=lightning_port.is_within_step(trainer)
            ),
            "accumulate": trainer.accumulate_grad_batches if changed else None,
            "clip": [] if trainer.gradient_clip_val == self._clip else [_plain_number(trainer.gradient_clip_val)],
        }
        return plain, limits

    def _gradients(self) -> Any:
        """Those that a later step may want; None if none does, or they are not kept."""
        module = self._trainer.lightning_module
        if not lightning_port.zeroes_by_hand(module):
            return None
        try:
            return keep_gradients(module, self._most, sharded=sharded_state.shards_state(self._trainer.strategy))
        except CannotBeKeptError as error:
            self._gradients_lost = str(error)
            return None

    def restore(self, plain: dict[str, Any], say: Callable[[str, str], None]) -> None:
        """For ``on_train_start``: go on from what :meth:`to_plain` returned; without what was logged if that is None.

        Args:
            plain: That.
            say: Called with what could not be brought back, and why.
        """
        trainer = self._trainer
        if plain["logged"] is not None:
            epoch_results.restore(trainer, plain["logged"], self._metrics_apart())
        self._attributes.restore(plain["attributes"], trainer.strategy.root_device)
        self._settings.restore(plain["settings"])
        self._members = plain.get("members", {})
        self._say_hooks = partial(self._compare_hooks, plain.get("hooks", self._hooks()), say)
        if plain.get("gradients") is not None:
            put_back_gradients(trainer.lightning_module, plain["gradients"])
        for path, why in self._inner_optimizers.restore(plain.get("inner_optimizers", {})).items():
            say(path, not_exact.OWN_STATE_NOT_BACK.format(why))
        if plain["accumulate"] is not None:
            lightning_port.go_on_accumulating(trainer, plain["accumulate"])
        for clip in plain.get("clip", ()):
            lightning_port.go_on_clipping(trainer, clip)

        def load_own_states() -> None:
            failed = self._own_states.restore(plain.get("own_states", {}), trainer.strategy.root_device)
            for path, why in failed.items():
                say(f"attribute {path}", not_exact.OWN_STATE_NOT_BACK.format(why))
            for path, why in self._apart.restore(plain.get("apart", {}), trainer.strategy.root_device).items():
                if not self._is_of_callback_with_state(path):
                    say(f"attribute {path}", why)

        # Averages are often made in the module's or a callback's own on_train_start, of weights that are there by then.
        lightning_port.behind_module(trainer, "on_train_start", load_own_states)


def _roots_of(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[dict[str, object], dict[str, object]]:
    """Where to begin to look, by name; and where only for generators."""
    roots: dict[str, object] = {"module": module}
    # A val_dataloader() may return [], which Lightning takes for a loader without batches.
    loaders = [loader for loader in lightning_port.validation_loaders(trainer) if hasattr(loader, "__dict__")]
    drawing = lightning_port.callbacks_of_the_program(trainer)
    drawing |= {f"validation loader {i}": loader for i, loader in enumerate(loaders)}
    data = lightning_port.data_module(trainer)
    if data is not None:
        (drawing if lightning_port.saves_itself(data) else roots)["data module"] = data
    for name, root in list(roots.items()):
        hyperparameters = lightning_port.hyperparameters(root)
        if isinstance(hyperparameters, dict):
            roots[f"{name}.hparams"] = Entries(hyperparameters)
        elif is_config(hyperparameters):
            roots[f"{name}.hparams"] = hyperparameters
    for i, optimizer in enumerate(trainer.optimizers):
        plain = is_of_the_program(optimizer) or type(optimizer).__module__.startswith("torch.optim.")
        roots |= {f"optimizer {i}": optimizer} if plain else {}
    for i, config in enumerate(trainer.lr_scheduler_configs):
        roots |= holders_of_schedule(f"schedule {i}", config.scheduler)
    return roots, drawing


def made_by(trainer: pl.Trainer) -> Made:
    """What module, data module and callbacks have made before training, unless they save it themselves."""
    module, data = trainer.lightning_module, lightning_port.data_module(trainer)
    roots: dict[str, object] = {} if lightning_port.saves_more(module) else {"module": module}
    if data is not None and not lightning_port.saves_itself(data):
        roots["data module"] = data
    callbacks = lightning_port.callbacks_of_the_program(trainer).items()
    roots |= {path: one for path, one in callbacks if isinstance(one, Callback) and _saves_nothing(one)}
    return made(roots, lightning_port.names_of_lightning())


def _plain_number(value: Any) -> float | None:
    """A callback may have set a tensor, or a number of numpy's."""
    return None if value is None else float(value)


def _saves_nothing(callback: Callback) -> bool:
    return is_class_of_the_program(type(callback)) and not lightning_port.callback_saves_itself(callback)
