"""Exact resume for an ordinary module, data module and DataLoader."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel

from nemologger import lightning_port
from nemologger.callbacks.before_stop import states_of_callbacks
from nemologger.callbacks.not_exact import (
    OTHER_DATA,
    OTHER_RANKS,
    RAISED,
    advice_for,
    advice_for_validation,
    differences,
    limits_of,
)
from nemologger.callbacks.packed import pack, unpack
from nemologger.callbacks.program_state import ProgramState
from nemologger.callbacks.running_fit import RunningFit
from nemologger.exact import buffers, reduction
from nemologger.exact.loaders.session import Place, Session, most_of_each
from nemologger.exact.rng import RngState
from nemologger.lightning_port import epoch_results
from nemologger.ranks import Ranks, SingleProcess, connect, decide, together_at_zero

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

log = logging.getLogger(__name__)

_FORMAT = 1
#: After so many of the first steps it is looked at what the module's lists are for.
_LOOKS = 3
_OTHER_BUFFER = "differs from rank 0's, and {}: a resumed run begins with rank 0's on this rank, too"


class ExactResume(Callback):
    """Makes a run that is stopped and resumed repeat the run that was never stopped, loss by loss.

    ``nemologger.ModelCheckpoint`` adds it to its trainer. It saves, for every rank, the state of the random number
    generators and the place of each training loader, and brings them back. The user's loaders stay as they are: Lightning
    is given wrappers around them.

    Covered are DataLoaders over datasets with and without length, with any sampler, with and without workers, several of
    them at once, and other iterables. These go on as they were:

    - generators, numbers, lists, dictionaries, arrays and tensors among the attributes of samplers and datasets, and in
      variables that code of theirs counts in; in worker processes generators of a dataset with length are seeded for each
      batch, and what else changes there is named;
    - the same of the module, of objects and functions of the program that it holds, and of a data module without
      ``state_dict()``; of callbacks generators only, and what else they count is named;
    - objects with a ``state_dict()`` that the module or a callback holds and that are no modules, averages of weights for
      example, and networks that have changed where Lightning does not see them (a teacher in a list, a copy in an object);
    - on each rank, buffers that nobody exchanges between the ranks;
    - what is logged for an epoch, and what metrics of torchmetrics have counted.

    Lists and dictionaries of the module itself that are only added to, and hold numbers and texts, are most often records
    of one life: they are named at the first save after they change, and not kept, unless the class looks into them or
    empties them while it trains. Functions and objects that a program puts in the place of others
    (``self.loss_fn = l1_loss`` in some epoch) are named. What ``on_train_start()`` makes of a value itself
    (``self.x *= 0.5``) is made in each life anew, of what was brought back. Neither validation nor a second look at the
    training loader shifts training.

    What cannot be promised for the loaders at hand is logged when training starts, with what would help, or at the first
    save after it shows. On another number of ranks a run goes on after as many samples, with new random states.

    What a GPU computes must repeat as well. Some kernels, and NCCL on some machines, add in an order that differs from run
    to run: ``Trainer(deterministic=True)`` keeps torch to those that do not, and ``Trainer(benchmark=False)``, the default,
    from choosing them by the clock. The dropout between layers of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` draws from a
    state of cuDNN that cannot be saved; ``torch.backends.cudnn.enabled = False`` takes torch's.

    Args:
        rank_timeout: How long to wait for the other ranks when their states are collected.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ExactResume()], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(self, rank_timeout: timedelta = timedelta(minutes=10)) -> None:
        self.rank_timeout = rank_timeout
        self._ranks: Ranks = SingleProcess()
        self._fit: RunningFit | None = None
        self._session: Session | None = None
        self._unwrap: Callable[[], None] | None = None
        self._validates = self._validation_is_due = False
        self._raised: bool | None = None
        self._aside: RngState | None = None
        self._before_stop: dict[str, Any] = {}
        self._reload_epoch: float | None = None
        self._data: list[dict[str, Any]] | None = None
        self._places: list[bytes | dict[str, Any]] | None = None
        self._plateau: lightning_port.PlateauSteps | None = None
        self._program: ProgramState | None = None
        self._program_then: dict[str, Any] | None = None
        self._looks_left = 0
        self._counters: epoch_results.Counters | None = None
        self._buffers_then: dict[str, Any] = {}
        self._gradient_order: list[str] = []
        self._said: set[tuple[str, str]] = set()
        self._watched: reduction.GradientOrder | None = None

    @classmethod
    def attach(cls, trainer: pl.Trainer, pl_module: pl.LightningModule, rank_timeout: timedelta) -> None:
        """Add one to ``trainer``, for use in another callback's ``setup``, unless it has one."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
        if not any(isinstance(callback, cls) for callback in callbacks):
            added = lightning_port.without_empty_hooks(cls(rank_timeout))
            # Another list: Lightning is iterating over this one. In front: it acts before others save.
            trainer.callbacks = [added, *callbacks]  # type: ignore[attr-defined]
            added.setup(trainer, pl_module, "fit")

    # --- life -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the training loaders wrapped."""
        if stage != "fit":
            return
        self._release()
        self._ranks = connect(self.rank_timeout)
        self._fit = RunningFit(trainer)
        self._session = Session(self._fit)
        self._unwrap = lightning_port.wrap_training_loaders(trainer, self._session.wrap)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave trainer and loaders as they were found."""
        if stage == "fit":
            self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was found. Loaders follow when Lightning is done with them: another callback may save."""
        lightning_port.forget_behind_module(trainer)
        self._raised = self._validation_is_due
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None

    def _release(self) -> None:
        if self._unwrap is not None:
            self._unwrap()
        if self._session is not None:
            self._session.release()
        if self._watched is not None:
            self._watched.settle()
        self._fit = self._session = self._unwrap = self._aside = self._reload_epoch = self._data = self._plateau = None
        self._program = self._program_then = self._watched = self._counters = None
        self._buffers_then, self._before_stop, self._gradient_order, self._said = {}, {}, [], set()
        self._validation_is_due, self._raised = False, None

    # --- training -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring loaders and generators to where the checkpoint left them; say what cannot be promised."""
        session = self._session
        if session is None:
            return
        self._validates = lightning_port.has_validation(trainer)
        lightning_port.close_trained_epoch(trainer)
        if self._raised:
            lightning_port.validate_first(trainer)
        self._raised = None
        if session.fetched_too_early:
            lightning_port.fetch_again(trainer)
            session.fetched_too_early = False
        session.on_train_start()
        if self._reload_epoch is not None:
            lightning_port.set_last_reload_epoch(trainer, self._reload_epoch)
            self._reload_epoch = None
        if lightning_port.will_reload(trainer):
            lightning_port.behind_module(trainer, "on_train_start", session.leave_loaders)
        if self._plateau is not None:
            lightning_port.step_plateau(trainer, self._plateau)
            # ModelCheckpoint brings back those of a validation that only a stop had.
            back = partial(lightning_port.restore_metrics, trainer, self._plateau.metrics)
            lightning_port.behind_module(trainer, "on_train_start", back)
            self._plateau = None
        buffers.restore(pl_module, self._buffers_then)
        self._program, self._looks_left = ProgramState(trainer, pl_module, self._counters), _LOOKS
        if self._program_then is not None:
            buffers.go_on_apart(trainer.strategy.model, by_hand=not pl_module.automatic_optimization)
            self._program.restore(self._program_then, self._say_once)
            self._program_then = None
        if lightning_port.goes_on_within_epoch(trainer):
            lightning_port.go_on_averaging(trainer)
        self._settle_gradient_order(trainer)
        if trainer.is_global_zero:  # the checkpoint has what rank 0 saw; others may have data of their own
            self._compare_data(session)
            self._say_limits(session)
            stay = advice_for_validation(lightning_port.validation_loaders(trainer))
            for advice in filter(None, (advice_for(trainer.strategy.root_device), stay)):
                log.info("exact resume: %s", advice)
            for limit in limits_of(trainer, pl_module):
                log.warning("exact resume: %s", limit)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch begins."""
        if self._session is None:
            return
        again = self._session.begin_epoch()
        if again:
            lightning_port.tell_samplers_the_epoch(trainer)
        if again or lightning_port.has_taken_of_new_loaders(trainer):
            lightning_port.behind_module(trainer, "on_train_epoch_start", partial(lightning_port.fetch_again, trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that was saved after the last validation of an epoch starts here."""
        if self._session is not None:
            self._session.end_epoch()
            lightning_port.count_left_out(trainer, epoch_ends=True)
            lightning_port.begin_next_epoch_anew(trainer)
            lightning_port.behind_module(
                trainer, "on_train_epoch_end", partial(lightning_port.step_plateau_at_epoch_end, trainer)
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the place of the loaders; put the generators aside if validation follows."""
        self._before_stop, self._validation_is_due = {}, False
        if self._watched is not None:
            if lightning_port.is_accumulating(trainer):
                self._watched.forget()
            else:
                self._gradient_order, self._watched = self._watched.settle(), None
        if self._looks_left and self._program is not None:
            self._looks_left -= 1
            self._program.look()
        self._aside = None  # a validation that was to follow the batch before had nothing to do
        if self._session is not None:
            lightning_port.count_left_out(trainer, epoch_ends=False)
            self._session.batch_trained()
            self.look_ahead(trainer)

    def look_ahead(self, trainer: pl.Trainer) -> None:
        """For ``on_train_batch_end``, also of a later callback: a stop asked for in between is validated first."""
        if self._session is not None and self._validates and lightning_port.validation_follows(trainer):
            self._validation_is_due = not lightning_port.validates_for_stop(trainer)
            # The module may draw in its own hook, which is part of training.
            lightning_port.behind_module(trainer, "on_train_batch_end", self._put_aside)
            lightning_port.behind_module(trainer, "on_train_batch_end", partial(self._see_stop, trainer))

    def _see_stop(self, trainer: pl.Trainer) -> None:
        """A run that is not stopped has no validation here: the next one goes on as if there had been none."""
        if lightning_port.validates_for_stop(trainer):
            self._before_stop = {self.state_key: self.state_dict(), **states_of_callbacks(trainer)}

    # --- validation -----------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the generators aside: a resumed run has no sanity check."""
        self._put_aside()
        self._counters = epoch_results.counters(trainer)

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take them back."""
        self._take_back()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the generators aside if nobody could know that validation would follow."""
        if self._aside is None:
            self._put_aside()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the generators back, before a checkpoint is saved."""
        self._validation_is_due = False
        if not trainer.sanity_checking:
            lightning_port.behind_module(trainer, "on_validation_end", self._take_back)

    def _put_aside(self) -> None:
        if self._fit is not None:
            self._aside = RngState.capture(self._fit.device)

    def _take_back(self) -> None:
        aside, self._aside = self._aside, None
        if aside is not None and self._fit is not None:
            aside.restore(self._fit.device)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Drop Lightning's own notes on the loaders; :meth:`state_dict` has better ones.

        After a fit there are none, but Lightning still has our wrappers: their state would be in the way of whoever resumes.
        """
        lightning_port.drop_loader_states(checkpoint)
        checkpoint["callbacks"].update(self._before_stop)

    def state_dict(self) -> dict[str, Any]:
        """Generators and loaders of every rank, on rank 0. Collective."""
        if self._session is None or self._fit is None:
            return {}
        session, trainer = self._session, self._fit.trainer
        ranks = self._gather() if self._places is None else self._places
        if trainer.is_global_zero:
            self._say_limits(session)
        return {
            "format": _FORMAT,
            "epoch_over": lightning_port.epoch_is_trained(trainer),
            "raised": self._raised,
            "reload_epoch": lightning_port.last_reload_epoch(trainer),
            "plateau": asdict(lightning_port.plateau_steps(trainer)),
            "data": [feed.data for feed in session.feeds],
            "gradient_order": self._gradient_order,
            "readers": lightning_port.data_reader(trainer)[1],
            "ranks": ranks,
        }

    def _gather(self) -> list[bytes | dict[str, Any]] | None:
        """The places of all ranks, on rank 0, which writes them; thousands of ranks need not know each other's."""
        session, fit = self._session, self._fit
        if session is None or fit is None:
            return None
        over = lightning_port.epoch_is_trained(fit.trainer)
        module, most = fit.trainer.lightning_module, most_of_each(fit.ranks)
        by_hand = not module.automatic_optimization
        apart = fit.ranks > 1 and not buffers.are_exchanged(fit.trainer.strategy.model, by_hand=by_hand)
        zeros = decide(self._ranks, lambda: buffers.fingerprints(module)) if apart else {}

        def here() -> bytes | dict[str, Any]:
            place = session.place(epoch_over=over, aside=self._aside).to_plain()
            program, limits = (None, {}) if self._program is None else self._program.to_plain()
            for what, limit in limits.items():
                self._say_once(what, limit)
            for what, limit in ({} if self._program is None else self._program.records).items():
                self._say_once(what, limit, logging.INFO)
            if lightning_port.is_within_step(fit.trainer):
                self._say_once(f"step {fit.trainer.global_step + 1}", RAISED)
            own, lost = buffers.differing(module, zeros, most) if apart else ({}, {})
            for name, why in lost.items():
                self._say_once(f"buffer {name}", _OTHER_BUFFER.format(why))
            place |= {"program": program, "buffers": own}
            return pack(place, self._say_once) if fit.ranks > 1 else place

        return together_at_zero(self._ranks, here)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The ranks exchange their places now; while this lasts, :meth:`state_dict` asks no other rank. Collective.

        When a checkpoint is made, hooks of the user are called, and a rank where one of them raises answers nobody.
        """
        self._places = self._gather()
        try:
            yield
        finally:
            self._places = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the place of this rank out of ``checkpoint``."""
        if self._session is None or self._fit is None:
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if not state or state.get("format") != _FORMAT:
            skip = lightning_port.saved_batches(checkpoint)
            lightning_port.drop_loader_states(checkpoint)
            self._session.skip(skip)
            log.warning(
                "the checkpoint does not say where the training loaders and random number generators were: the first %d "
                "batches of the epoch are left out, and new random numbers are drawn",
                skip,
            )
            return
        lightning_port.drop_loader_states(checkpoint)
        places, rank, ranks = state["ranks"], self._ranks.rank, self._ranks.world_size
        mine = unpack(places[rank % len(places)])
        place, self._program_then = Place.from_plain(mine), mine.get("program")
        self._buffers_then = mine.get("buffers", {})
        before, readers = state.get("readers", len(places)), lightning_port.data_reader(trainer)[1]
        if (len(places), before) != (ranks, readers):
            place = place.on_other_ranks(rank, before, readers, self._fit.device)
            self._buffers_then = {}
            if self._program_then is not None:
                self._program_then["logged"] = None
            lightning_port.rescale_saved_batches(checkpoint, before, readers)
            log.warning(OTHER_RANKS, len(places), before, ranks, readers)
        self._raised = state.get("raised")
        if self._raised is not None:
            lightning_port.close_last_batch(checkpoint, validates=self._raised)
        self._gradient_order = state.get("gradient_order", [])
        self._reload_epoch = state["reload_epoch"]
        self._data = state["data"]
        self._plateau = lightning_port.PlateauSteps(**state["plateau"])
        self._session.go_on(place, epoch_over=state["epoch_over"])

    def _say_limits(self, session: Session) -> None:
        """Say once what cannot be promised; some of it shows only while training goes on."""
        for loader, limit in session.limits:
            self._say_once(f"training loader {loader}:", limit)

    def _say_once(self, what: str, limit: str, level: int = logging.WARNING) -> None:
        if (what, limit) not in self._said:
            self._said.add((what, limit))
            log.log(level, "exact resume, %s %s", what, limit)

    def _settle_gradient_order(self, trainer: pl.Trainer) -> None:
        model = trainer.strategy.model
        if not (reduction.depends_on_order(model) and isinstance(model, DistributedDataParallel)):
            self._gradient_order = []
        elif lightning_port.has_comm_hook(trainer):
            return  # it may count the steps
        elif self._gradient_order:
            reduction.play(model, self._gradient_order)
        else:
            self._watched = reduction.GradientOrder(model)

    def _compare_data(self, session: Session) -> None:
        before, self._data = self._data, None
        now = [feed.data for feed in session.feeds]
        if before and before != now:  # none yet in what LearningRateFinder and the like put back before a fit
            log.warning(OTHER_DATA, differences(before, now))
