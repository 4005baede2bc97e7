"""What a checkpoint is made of."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
from toy import ToyModel, loader, quiet_trainer

from nemologger import lightning_port


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


def test_tied_parameters_have_the_name_that_comes_first():
    class Tied(ToyModel):
        def __init__(self):
            super().__init__()
            self.again = self.net[0]

    watch = _Watch()
    quiet_trainer(max_steps=1, val_check_interval=1, callbacks=[watch]).fit(Tied(), loader(), loader())
    assert watch.states[0].optimizer_names[0][0] == "net.0.weight"
    assert "again.weight" in watch.states[0].parameter_names


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
