"""What nemologger uses of Lightning's inside is still there, and still does what it did."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.utils.data import DataLoader
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port, trackers
from nemologger.ranks import SingleProcess


class _Watch(pl.Callback):
    """Asks the port at every moment that it is used at."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []
        self.epochs: list[tuple[str, int]] = []
        self.states: list[lightning_port.TrainingState] = []

    def on_train_batch_end(self, trainer, *args):
        self.seen.append((trainer.global_step, lightning_port.validation_follows(trainer)))
        self.epochs.append(("batch", lightning_port.epochs_done(trainer)))

    def on_validation_end(self, trainer, pl_module):
        self.states.append(lightning_port.training_state(trainer, weights_only=False))
        assert lightning_port.has_validation(trainer)

    def on_train_end(self, trainer, pl_module):
        self.epochs.append(("end", lightning_port.epochs_done(trainer)))


def test_the_state_of_a_run_and_when_validation_follows():
    watch = _Watch()
    model = ToyModel()
    trainer = quiet_trainer(max_epochs=2, val_check_interval=4, check_val_every_n_epoch=1, callbacks=[watch])
    trainer.fit(model, loader(), loader())
    assert [step for step, follows in watch.seen if follows] == [4, 8, 14, 18]
    assert watch.epochs[9] == ("batch", 1)
    assert watch.epochs[8] == ("batch", 0)
    assert watch.epochs[-1] == ("end", 2)
    state = watch.states[-1]
    assert {"epoch", "global_step", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"} <= set(
        state.checkpoint
    )
    assert state.parameter_names == {name for name, _ in model.named_parameters()}
    assert state.optimizer_names == [dict(enumerate(name for name, _ in model.named_parameters()))]


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


def test_fetches_are_watched_until_the_epoch_ends():
    class Fetches(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((batch_idx, lightning_port.logged_step(trainer)))
            if batch_idx == 0:
                lightning_port.watch_fetches(
                    trainer, lambda: self.seen.append("began"), lambda: self.seen.append("ended")
                )

    fetches = Fetches()
    trainer = quiet_trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0, callbacks=[fetches])
    trainer.fit(ToyModel(), loader())
    one_fetch = ["began", "ended"]
    assert fetches.seen == [
        (0, 0), *one_fetch, (1, 1), *one_fetch, (2, 2), (0, 3), *one_fetch, (1, 4), *one_fetch, (2, 5),
    ]  # fmt: skip


def test_tied_parameters_have_the_name_that_comes_first():
    class Tied(ToyModel):
        def __init__(self):
            super().__init__()
            self.again = self.net[0]

    watch = _Watch()
    quiet_trainer(max_steps=1, val_check_interval=1, callbacks=[watch]).fit(Tied(), loader(), loader())
    assert watch.states[0].optimizer_names[0][0] == "net.0.weight"
    assert "again.weight" in watch.states[0].parameter_names


def test_sigterm_reaches_the_receiver_instead_of_lightning_and_the_handler_that_was_there():
    class Sends(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            self.undo = lightning_port.on_sigterm(trainer, lambda number, frame: received.append(number))

        def on_train_start(self, trainer, pl_module):
            os.kill(os.getpid(), signal.SIGTERM)

        def teardown(self, trainer, pl_module, stage):
            self.undo()

    received, earlier = [], []
    before = signal.signal(signal.SIGTERM, lambda number, frame: earlier.append(number))
    try:
        trainer = quiet_trainer(max_steps=1, callbacks=[Sends()], enable_checkpointing=False)
        trainer.fit(ToyModel(), loader())
        assert received == earlier == [signal.SIGTERM]
        assert trainer.state.finished
        assert not trainer.received_sigterm
        trainer._signal_connector.register_signal_handlers()
        os.kill(os.getpid(), signal.SIGTERM)
        assert trainer.received_sigterm, "Lightning's own is back"
        assert received == [signal.SIGTERM]
        trainer._signal_connector.teardown()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_is_as_patient_as_its_strategy_was_told():
    for kind in (DDPStrategy, FSDPStrategy, ModelParallelStrategy):
        trainer = SimpleNamespace(strategy=kind(timeout=timedelta(hours=3)))
        assert lightning_port.patience(trainer) == timedelta(hours=3)
    assert lightning_port.patience(quiet_trainer()) == timedelta(minutes=30)


@pytest.mark.parametrize("let", [True, False])
def test_processes_that_end_together_are_not_killed_for_it(let):
    main = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(143)"])
    observer = _ChildProcessObserver(main_pid=main.pid, child_processes=[other], sleep_period=1)
    try:
        observer.start()
        if let:
            lightning_port.let_processes_end()
        other.wait()
        observer.join(timeout=20)
        assert not observer.is_alive()
        if not let:
            main.wait(timeout=60)
        assert main.poll() == (None if let else -signal.SIGKILL)
    finally:
        main.kill()
        main.wait()


@pytest.mark.parametrize("overrides", [False, True])
def test_whether_other_keys_may_be_loaded(overrides):
    class Migrates(ToyModel):
        def on_load_checkpoint(self, checkpoint):
            pass

    module = Migrates() if overrides else ToyModel()
    assert lightning_port.will_rewrite_state(module) is overrides
    module.strict_loading = False
    assert lightning_port.will_rewrite_state(module)


class _LooksAtCheckpoints(pl.Callback):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        pass


class _Ours(ModelCheckpoint):
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        pass


_Ours.on_load_checkpoint.__module__ = "nemologger.somewhere"


class _OwnStrategy(SingleDeviceStrategy):
    def load_model_state_dict(self, checkpoint, strict=True):
        super().load_model_state_dict(checkpoint, strict)


class _OwnPrecision(Precision):
    def on_load_checkpoint(self, checkpoint):
        pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"strategy": "ddp", "devices": 2}, True),
        ({"callbacks": [pl.Callback(), ModelCheckpoint(), _Ours()]}, True),
        ({"callbacks": [_LooksAtCheckpoints()]}, False),
        ({"callbacks": [WeightAveraging()]}, False),
        ({"strategy": _OwnStrategy(device="cpu")}, False),
        ({"strategy": ModelParallelStrategy(), "devices": 2}, False),
        ({"plugins": [_OwnPrecision()]}, False),
    ],
)
def test_whether_somebody_else_sees_what_is_loaded(options, expected):
    trainer = quiet_trainer(**options)
    assert lightning_port.loads_as_is(trainer, None) is expected
    assert lightning_port.loads_as_is(trainer, ToyModel()) is expected
    model = ToyModel()
    model.strict_loading = False
    assert not lightning_port.loads_as_is(trainer, model)


def test_a_hook_that_was_put_on_an_object_counts():
    trainer = quiet_trainer(callbacks=[pl.Callback()])
    assert lightning_port.loads_as_is(trainer, None)
    trainer.strategy.load_model_state_dict = lambda checkpoint, strict=True: None
    assert not lightning_port.loads_as_is(trainer, None)


def test_one_process_needs_nobody():
    assert lightning_port.ranks_before_fit(quiet_trainer()) == SingleProcess()


def test_rank_zeros_decisions_travel_by_environment(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    trainer = quiet_trainer(devices=2, strategy="ddp")
    assert isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)
    ranks = lightning_port.ranks_before_fit(trainer)
    assert ranks.broadcast({"a": 1}) == {"a": 1}
    assert ranks.broadcast("second") == "second"
    monkeypatch.setenv("LOCAL_RANK", "1")  # as in the process that Lightning starts now
    launched = lightning_port.ranks_before_fit(trainer)
    assert launched.world_size == 2
    assert launched.broadcast(None) == {"a": 1}
    assert launched.broadcast(None) == "second"
    lightning_port.forget_decisions()


def test_tensorboard_moves_and_keeps_its_settings(tmp_path):
    logger = TensorBoardLogger("x", name="n", prefix="p", default_hp_metric=False, sub_dir="s", max_queue=3)
    assert not lightning_port.is_open(logger)
    lightning_port.move_tensorboard(logger, tmp_path, "name", "v1")
    assert logger.log_dir == str(tmp_path / "name" / "v1" / "s")
    assert (logger._prefix, logger._default_hp_metric, logger._kwargs) == ("p", False, {"max_queue": 3})
    logger.log_metrics({"a": 1.0}, 0)
    assert lightning_port.is_open(logger)
    logger.finalize("success")


def test_wandb_moves_and_keeps_its_settings(tmp_path):
    logger = WandbLogger(name="n", project="p", offline=True, prefix="x", tags=["t"], save_dir="y", log_model=False)
    assert lightning_port.wandb_run_id(logger) is None
    lightning_port.move_wandb(logger, tmp_path, "abc")
    assert lightning_port.wandb_run_id(logger) == "abc"
    assert logger.save_dir == str(tmp_path)
    assert (logger._wandb_init["tags"], logger._wandb_init["name"], logger._offline) == (["t"], "n", True)


def test_who_logs_wandbs_checkpoints_can_be_said():
    asked = []
    logger = WandbLogger(log_model="all", checkpoint_name="mine")
    lightning_port.log_wandb_checkpoints_by(logger, asked.append)
    callback = ModelCheckpoint()
    logger.after_save_checkpoint(callback)
    assert asked == [callback]
    lightning_port.log_wandb_files(logger, callback)  # there are none, and nothing is opened
    assert lightning_port.wandb_artifact(logger) == "mine"
    assert not lightning_port.is_open(logger)


def test_wandb_writes_to_its_file_soon_unless_it_was_told_when(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    interval = "x_transaction_log_flush_interval"
    assert interval in wandb.Settings.model_fields
    mine = wandb.Settings(**{interval: 7.0})
    for given, expected in [
        ({}, {interval: 1.0}),
        ({"settings": {"silent": True}}, {"silent": True, interval: 1.0}),
        ({"settings": {interval: 5.0}}, {interval: 5.0}),
        ({"settings": mine}, mine),
    ]:
        logger = WandbLogger(offline=True, **given)
        lightning_port.move_wandb(logger, tmp_path, "abc")
        assert logger._wandb_init["settings"] == expected
    logger = WandbLogger(offline=True, settings=wandb.Settings(silent=True))
    lightning_port.move_wandb(logger, tmp_path, "abc")
    settings = logger._wandb_init["settings"]
    assert (settings.silent, getattr(settings, interval)) == (True, 1.0)
    assert {"silent", interval} <= settings.model_fields_set  # only those count for wandb.init
    monkeypatch.setenv("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "3")
    logger = WandbLogger(offline=True)
    lightning_port.move_wandb(logger, tmp_path, "abc")
    assert logger._wandb_init["settings"] is None


def test_what_wandb_calls_a_metric():
    assert lightning_port.wandb_metric(WandbLogger(offline=True), "loss") == "loss"
    assert lightning_port.wandb_metric(WandbLogger(offline=True, prefix="p"), "loss") == "p-loss"


def test_hyperparameters_without_nesting():
    params = {"a": {"b": 1, "c": [2, 3]}, "act": torch.nn.functional.relu, "model": ToyModel}
    assert lightning_port.flat_params(params) == {"a/b": 1, "a/c": [2, 3], "act": "relu", "model": "ToyModel"}


def test_which_arguments_lightnings_loggers_have():
    """A new argument would be lost when a logger is moved."""
    tensorboard = set(inspect.signature(TensorBoardLogger.__init__).parameters)
    assert tensorboard == {
        "self", "save_dir", "name", "version", "log_graph", "default_hp_metric", "prefix", "sub_dir", "kwargs",
    }  # fmt: skip
    wandb = set(inspect.signature(WandbLogger.__init__).parameters)
    assert wandb == {
        "self", "name", "save_dir", "version", "offline", "dir", "id", "anonymous", "project", "log_model", "experiment",
        "prefix", "checkpoint_name", "add_file_policy", "kwargs",
    }  # fmt: skip
    assert set(inspect.signature(MLFlowLogger.__init__).parameters) == set(
        inspect.signature(trackers.MLFlowLogger.__init__).parameters
    )
    assert set(inspect.signature(CometLogger.__init__).parameters) == set(
        inspect.signature(trackers.CometLogger.__init__).parameters
    )


def test_the_default_logger_is_recognised(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path)
    assert lightning_port.is_default_logger(trainer, trainer.loggers[0])
    assert not lightning_port.is_default_logger(trainer, TensorBoardLogger(tmp_path, name="mine"))
    assert lightning_port.is_default_logger(trainer, CSVLogger(tmp_path))


def test_torch_is_a_version_that_was_tried():
    major, minor = map(int, torch.__version__.split(".")[:2])
    assert (2, 10) <= (major, minor) < (2, 14)


class _Keeps(lightning_port.KeepsWeights):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["kept"] = checkpoint.get("kept", 0) + 1


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_callback_with_weights_is_asked_once_whatever_is_saved(weights_only):
    class Takes(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.checkpoint = lightning_port.training_state(trainer, weights_only=weights_only).checkpoint

    takes = Takes()
    quiet_trainer(max_steps=1, callbacks=[_Keeps(), takes], limit_val_batches=0).fit(ToyModel(), loader())
    assert takes.checkpoint["kept"] == 1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_logged_with_its_last_batch(accumulate):
    class Asks(pl.Callback):
        due: list[tuple[int, int]] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if lightning_port.log_is_due(trainer, 2):
                self.due.append((batch_idx + 1, trainer.global_step))

    asks = Asks()
    asks.due = []
    quiet_trainer(
        max_steps=3,
        callbacks=[asks],
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
    ).fit(ToyModel(), loader())
    assert asks.due == [(2 * accumulate, 2)]


def test_which_batch_ends_training_and_which_is_logged():
    class Looks(pl.Callback):
        def __init__(self):
            self.over, self.logged = [], []

        def on_train_batch_end(self, trainer, *args):
            self.over.append(lightning_port.is_over(trainer))
            self.logged.append(lightning_port.logs_this_batch(trainer))

    for limits, batches in (({"max_steps": 6}, 6), ({"max_epochs": 2, "limit_train_batches": 4}, 8)):
        looks = Looks()
        trainer = quiet_trainer(**limits, callbacks=[looks], enable_checkpointing=False, log_every_n_steps=3)
        trainer.fit(ToyModel(), loader())
        assert looks.over == [False] * (batches - 1) + [True]
        assert looks.logged == [(batch + 1) % 3 == 0 for batch in range(batches)]


def test_a_run_that_stops_early_is_over():
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 2
            self.over = lightning_port.is_over(trainer)

    stops = Stops()
    quiet_trainer(max_steps=6, callbacks=[stops], enable_checkpointing=False).fit(ToyModel(), loader())
    assert stops.over


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


def test_fit_can_be_left_without_an_end():
    class Leaves(pl.Callback):
        seen: tuple[str, ...] = ()

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                lightning_port.leave_fit()

        def on_train_end(self, trainer, pl_module):
            self.seen += ("end",)

        def teardown(self, trainer, pl_module, stage):
            self.seen += ("teardown",)

    leaves = Leaves()
    trainer = quiet_trainer(max_steps=6, callbacks=[leaves], enable_checkpointing=False)
    trainer.fit(ToyModel(), loader())
    assert trainer.global_step == 2
    assert leaves.seen == ("teardown",)


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


def test_the_fit_loops_iterators_are_told_from_those_of_others():
    class Iterated:
        def __init__(self, loader):
            self.loader, self.made = loader, []

        def __iter__(self):
            self.made.append(iter(self.loader))
            return self.made[-1]

    class Asks(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            for each in loaders:
                other = iter(each)
                assert lightning_port.trains_from(trainer, each.made[-2])
                assert not lightning_port.trains_from(trainer, other)
                each.made.pop()

    class Both(ToyModel):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    short = DataLoader(loader().dataset, batch_size=12)  # begins again within an epoch
    loaders = [Iterated(loader()), Iterated(short)]
    trainer = quiet_trainer(max_epochs=2, max_steps=-1, callbacks=[Asks()])
    assert not lightning_port.trains_from(trainer, None)
    trainer.fit(Both(), loaders)
    assert len(loaders[1].made) > len(loaders[0].made) >= 2
