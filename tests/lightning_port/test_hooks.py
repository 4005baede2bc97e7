"""When callbacks, the module and what is put off have their turn."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import SimpleProfiler
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port


def test_a_call_at_the_end_of_backward_comes_before_the_wait_for_other_ranks():
    order = []
    weight = torch.ones(3, requires_grad=True)
    # As DistributedDataParallel does: it queues its wait when a gradient comes in.
    engine = torch.autograd.Variable._execution_engine
    weight.register_post_accumulate_grad_hook(lambda _: engine.queue_callback(lambda: order.append("wait")))
    weight.register_post_accumulate_grad_hook(lambda _: order.append("gradient"))
    for _ in range(2):
        loss = weight.sum()
        lightning_port.at_end_of_backward(loss, lambda: order.append("end"))
        loss.backward()
    assert order == ["gradient", "end", "wait"] * 2
    lightning_port.at_end_of_backward(torch.ones(1), lambda: order.append("never"))


def test_a_callback_moves_behind_the_checkpoints(tmp_path):
    class Last(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            lightning_port.move_to_end(trainer, self)

    last = Last()
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path)
    trainer = quiet_trainer(max_steps=1, callbacks=[last, checkpoint])
    assert trainer.callbacks.index(last) < trainer.callbacks.index(checkpoint)
    trainer.fit(ToyModel(), loader())
    assert trainer.callbacks[-1] is last
    assert trainer.callbacks.count(last) == 1


def test_hooks_of_a_step_that_a_callback_leaves_empty_are_not_called():
    class Counts(pl.Callback):
        steps = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.steps += 1

    callback, profiler = lightning_port.without_empty_hooks(Counts()), SimpleProfiler()
    quiet_trainer(max_steps=3, callbacks=[callback], profiler=profiler).fit(ToyModel(), loader())
    called = {name.rpartition(".")[2] for name in profiler.recorded_durations if "Counts" in name}
    assert callback.steps == 3
    assert {name for name in called if "batch" in name or "before" in name or "after" in name} == {"on_train_batch_end"}


class _Hooked(ToyModel):
    """Writes down when its own hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.order.append("module, batch")

    def on_validation_end(self):
        self.order.append("module, validation")


class _PutsOff(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.order.append("callback, batch")
        for call in ("first", "second"):
            lightning_port.behind_module(
                trainer, "on_train_batch_end", lambda call=call: pl_module.order.append(f"{call} behind batch")
            )

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.order.append("callback, validation")
            lightning_port.behind_module(
                trainer, "on_validation_end", lambda: pl_module.order.append("behind validation")
            )


def test_lightning_calls_the_modules_hooks_after_those_of_callbacks_and_what_is_put_off_behind_them():
    model = _Hooked()
    trainer = quiet_trainer(max_steps=2, val_check_interval=1, limit_val_batches=1, callbacks=[_PutsOff()])
    trainer.fit(model, loader(), loader())
    batch = ["callback, batch", "module, batch", "first behind batch", "second behind batch"]
    validation = ["callback, validation", "module, validation", "behind validation"]
    assert model.order == [*batch, *validation] * 2
    assert "on_batch_end" not in vars(trainer._logger_connector)
    assert "on_validation_end" not in vars(trainer.strategy)


def test_nothing_is_put_off_where_the_module_has_no_hook_of_its_own():
    seen = []

    class Asks(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            lightning_port.behind_module(trainer, "on_train_batch_end", lambda: seen.append("at once"))
            seen.append("callback")

    quiet_trainer(max_steps=1, callbacks=[Asks()]).fit(ToyModel(), loader())
    assert seen == ["at once", "callback"]


def test_of_the_hooks_at_the_end_of_an_epoch_those_of_checkpoints_come_behind_the_modules():
    order = []

    class Hooked(ToyModel):
        def on_train_epoch_end(self):
            order.append("module")

    class Saves(ModelCheckpoint):
        def on_train_epoch_end(self, trainer, pl_module):
            order.append("checkpoint")

    quiet_trainer(max_epochs=1, max_steps=-1, callbacks=[Saves()], enable_checkpointing=True).fit(Hooked(), loader())
    assert order == ["module", "checkpoint"]
