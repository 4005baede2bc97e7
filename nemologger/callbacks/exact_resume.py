"""Exact resume for an ordinary module, data module and DataLoader."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from nemologger import lightning_port
from nemologger.callbacks.before_stop import states_of_callbacks
from nemologger.callbacks.begins_with import say_built_otherwise, say_made_otherwise, say_other_data
from nemologger.callbacks.fit_state import FitState, RankState
from nemologger.callbacks.gradient_order import GradientOrder
from nemologger.callbacks.not_exact import (
    OTHER_BUFFER,
    RAISED,
    VALIDATED_FOR_STOP,
    Notices,
    say_before_training,
    say_other_ranks,
)
from nemologger.callbacks.packed import pack, unpack
from nemologger.callbacks.program_state import ProgramState, made_by
from nemologger.callbacks.running_fit import RunningFit
from nemologger.exact import buffers
from nemologger.exact.loaders.session import Session, most_of_each
from nemologger.exact.program.apart import sign_of
from nemologger.exact.program.built import Built, built, in_effect
from nemologger.exact.program.made import Made
from nemologger.exact.rng import RngState
from nemologger.lightning_port import epoch_results
from nemologger.ranks import Ranks, SingleProcess, connect, decide, together_at_zero

if TYPE_CHECKING:
    from collections.abc import Callable

    import lightning.pytorch as pl

log = logging.getLogger(__name__)


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
        self._states: list[bytes | dict[str, Any]] | None = None
        self._begin_fit()

    def _begin_fit(self) -> None:
        """Nothing of an earlier fit counts in the next one."""
        self._fit: RunningFit | None = None
        self._session: Session | None = None
        self._unwrap: Callable[[], None] | None = None
        self._then: FitState | None = None  # until training starts
        self._mine_then: RankState | None = None
        self._validates = self._validation_is_due = False
        self._raised: bool | None = None
        self._aside: RngState | None = None
        self._before_stop: dict[str, Any] = {}
        self._trained = ""
        self._made: Made | None = None
        self._built: Built = {}
        self._program: ProgramState | None = None
        self._counters: epoch_results.Counters | None = None
        self._gradients = GradientOrder()
        self._notices = Notices()

    @classmethod
    def attach(cls, trainer: pl.Trainer, pl_module: pl.LightningModule, rank_timeout: timedelta) -> None:
        """Add one to ``trainer``, for use in another callback's ``setup``, unless it has one."""
        callbacks = lightning_port.callbacks(trainer)
        if not any(isinstance(callback, cls) for callback in callbacks):
            added = lightning_port.without_empty_hooks(cls(rank_timeout))
            lightning_port.set_callbacks(trainer, [added, *callbacks])  # in front: it acts before others save
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
        self._gradients.close()
        self._begin_fit()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note what optimizers and schedules are made with, before a checkpoint takes its place."""
        self._built = built(trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])

    # --- training -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring loaders and generators to where the checkpoint left them; say what cannot be promised."""
        session = self._session
        if session is None:
            return
        self._made = made_by(trainer) if self._made is None else self._made
        self._validates = lightning_port.has_validation(trainer)
        lightning_port.forget_begun_batch(trainer)
        lightning_port.close_trained_epoch(trainer)
        if self._raised:
            lightning_port.validate_first(trainer)
        self._raised = None
        if session.fetched_too_early:
            lightning_port.fetch_again(trainer)
            session.fetched_too_early = False
        session.on_train_start()
        then, self._then = self._then, None
        if then is not None:
            lightning_port.set_last_reload_epoch(trainer, then.reload_epoch)
        if lightning_port.will_reload(trainer):
            lightning_port.behind_module(trainer, "on_train_start", session.leave_loaders)
        if then is not None:
            lightning_port.step_plateau(trainer, then.plateau)
            # ModelCheckpoint brings back those of a validation that only a stop had.
            back = partial(lightning_port.restore_metrics, trainer, then.plateau.metrics)
            lightning_port.behind_module(trainer, "on_train_start", back)
        mine, self._mine_then = self._mine_then, None
        self._program = self._begin_program(trainer, pl_module, mine)
        if lightning_port.goes_on_within_epoch(trainer):
            lightning_port.go_on_averaging(trainer)
        self._gradients.begin(trainer)
        if trainer.is_global_zero:  # the checkpoint has what rank 0 saw; others may have data of their own
            if then is not None and mine is not None and not lightning_port.is_over(trainer):
                say_other_data(session, then, mine.place, self._notices)
            if then is not None:
                say_built_otherwise(then.built, self._built, self._notices)
                self._built = in_effect(then.built, self._built)
            self._say_limits(session)
            say_before_training(trainer, pl_module)

    def _begin_program(self, trainer: pl.Trainer, module: pl.LightningModule, mine: RankState | None) -> ProgramState:
        """Look at the program as it is now, and bring back what this rank had added to the checkpoint of it."""
        if mine is not None:
            say_made_otherwise(mine.made_once(), self._made or {}, self._notices)
            buffers.restore(module, mine.buffers)
        program = ProgramState(trainer, module, self._counters)
        if mine is not None and mine.program is not None:
            buffers.go_on_apart(trainer.strategy.model, by_hand=not module.automatic_optimization)
            program.restore(mine.program, self._notices.say)
        return program

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

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at what the program has set, before it sets something for this batch alone."""
        if self._program is not None:
            self._program.begin_batch()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the place of the loaders; put the generators aside if validation follows."""
        self._before_stop, self._validation_is_due = {}, False
        self._gradients.batch_trained(trainer)
        if self._program is not None:
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
            self._trained = _trained(trainer)

    # --- validation -----------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the generators aside: a resumed run has no sanity check."""
        self._put_aside()
        self._made = made_by(trainer)
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
        if self._before_stop:
            lightning_port.behind_module(trainer, "on_validation_end", partial(self._compare_with_stop, trainer))

    def _compare_with_stop(self, trainer: pl.Trainer) -> None:
        """What is put aside before a stop is validated is not all: weights are saved behind it."""
        if self._trained != _trained(trainer):
            self._notices.say("module", VALIDATED_FOR_STOP)

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
        ranks = self._gather() if self._states is None else self._states
        if trainer.is_global_zero:
            self._say_limits(session)
        return FitState(
            epoch_over=lightning_port.epoch_is_trained(trainer),
            raised=self._raised,
            reload_epoch=lightning_port.last_reload_epoch(trainer),
            plateau=lightning_port.plateau_steps(trainer),
            data=[feed.data for feed in session.feeds],
            names=[feed.names for feed in session.feeds],
            workers=[feed.has_workers for feed in session.feeds],
            gradient_order=self._gradients.names,
            readers=lightning_port.data_reader(trainer)[1],
            built=self._built,
            ranks=ranks,
        ).to_plain()

    def _gather(self) -> list[bytes | dict[str, Any]] | None:
        """The states of all ranks, on rank 0, which writes them; thousands of ranks need not know each other's."""
        session, fit = self._session, self._fit
        if session is None or fit is None:
            return None
        over = lightning_port.epoch_is_trained(fit.trainer)
        module = fit.trainer.lightning_module
        by_hand = not module.automatic_optimization
        apart = fit.ranks > 1 and not buffers.are_exchanged(fit.trainer.strategy.model, by_hand=by_hand)
        zeros = decide(self._ranks, lambda: buffers.fingerprints(module)) if apart else None

        def here() -> bytes | dict[str, Any]:
            place = session.place(epoch_over=over, aside=self._aside)
            program = self._take_program()
            if lightning_port.has_begun_batch(fit.trainer):
                self._notices.say(f"step {fit.trainer.global_step + 1}", RAISED)
            own = {} if zeros is None else self._take_buffers(module, zeros, most_of_each(fit.ranks))
            state = RankState(place, program, own, self._made or {}).to_plain()
            return pack(state, self._notices.say) if fit.ranks > 1 else state

        return together_at_zero(self._ranks, here)

    def _take_program(self) -> dict[str, Any] | None:
        """What the program has changed; what of it is not kept is said."""
        if self._program is None:
            return None
        plain, limits = self._program.to_plain()
        for what, limit in limits.items():
            self._notices.say(what, limit)
        for what, limit in self._program.records.items():
            self._notices.say(what, limit, logging.INFO)
        return plain

    def _take_buffers(self, module: pl.LightningModule, zeros: dict[str, int], most: int) -> dict[str, Any]:
        """Those that are not rank 0's, ``zeros``; what of them is not kept is said."""
        own, lost = buffers.differing(module, zeros, most)
        for name, why in lost.items():
            self._notices.say(f"buffer {name}", OTHER_BUFFER.format(why))
        return own

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The ranks exchange their states now; while this lasts, :meth:`state_dict` asks no other rank. Collective.

        When a checkpoint is made, hooks of the user are called, and a rank where one of them raises answers nobody.
        """
        self._states = self._gather()
        try:
            yield
        finally:
            self._states = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the place of this rank out of ``checkpoint``."""
        if self._session is None or self._fit is None:
            return
        then = FitState.from_plain(checkpoint.get("callbacks", {}).get(self.state_key))
        if then is None or then.ranks is None:
            self._skip(self._session, checkpoint)
            return
        lightning_port.drop_loader_states(checkpoint)
        rank, ranks, before = self._ranks.rank, self._ranks.world_size, len(then.ranks)
        readers = lightning_port.data_reader(trainer)[1]
        mine = RankState.from_plain(unpack(then.ranks[rank % before]))
        if (before, then.readers) != (ranks, readers):
            if rank == 0:
                batches = 0 if then.epoch_over else max((at.mark.batches for at in mine.place.positions), default=0)
                say_other_ranks(before, then.readers, ranks, readers, batches)
            mine = mine.on_other_ranks(rank, then.readers, readers, self._fit.device)
            lightning_port.rescale_saved_batches(checkpoint, then.readers, readers)
        self._raised = then.raised
        if self._raised is not None:
            lightning_port.close_last_batch(checkpoint, validates=self._raised)
        self._gradients.names = then.gradient_order
        self._then, self._mine_then = then, mine
        self._session.go_on(mine.place, epoch_over=then.epoch_over)

    def _skip(self, session: Session, checkpoint: dict[str, Any]) -> None:
        """Of a checkpoint that is not ours, or of a format to come, it is known only how many batches had been trained."""
        skip = lightning_port.saved_batches(checkpoint)
        lightning_port.drop_loader_states(checkpoint)
        session.skip(skip)
        log.warning(
            "the checkpoint does not say where the training loaders and random number generators were: %snew random "
            "numbers are drawn",
            f"the first {skip} batches of the epoch are left out, and " if skip else "",
        )

    def _say_limits(self, session: Session) -> None:
        """What shows of the loaders, some of it only while training goes on."""
        for loader, limit in session.limits:
            self._notices.say(f"training loader {loader}:", limit)


def _trained(trainer: pl.Trainer) -> str:
    """Some numbers of each parameter, and those of the optimizers."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    numbers = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    return f"{sign_of(dict(trainer.lightning_module.named_parameters()))} {numbers}"
