"""The averages are what the formula says, and they are in the checkpoint with everything else."""

from __future__ import annotations

import logging
import pickle
from copy import deepcopy
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from processes import torchrun
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load
from toy import ToyDataModule, ToyModel, loader, manifests, names, quiet_trainer

import nemologger as nl
from nemologger import ConfigurationError, ModelCheckpoint, NotFoundError
from nemologger.callbacks import EMA
from nemologger.checkpoint.reading.load import load_checkpoint, load_model
from nemologger.checkpoint.weights import described
from nemologger.context.uncaptured import Uncaptured

DECAY = 0.9
SCRIPT = Path(__file__).parent.parent / "train_ema.py"


class ByHand(pl.Callback):
    """Averages as the formula is written, from the weights that it sees."""

    def __init__(self, decay: float = DECAY, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self.averages: dict[str, torch.Tensor] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.history: dict[int, dict[str, torch.Tensor]] = {}
        self.step = 0

    def on_train_start(self, trainer, pl_module):
        self.averages = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.weights[self.step] = {k: v.clone() for k, v in pl_module.state_dict().items()}
        if self.step % self.every == 0:
            weights = {n: p.detach() for n, p in pl_module.named_parameters()}
            self.averages = {n: self.decay * a + (1 - self.decay) * weights[n] for n, a in self.averages.items()}
        self.history[self.step] = self.averages


class Seen(pl.Callback):
    """The state that validation and test see; it may raise."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.states[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}
        if self.fail:
            raise ZeroDivisionError

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start


class Order(pl.Callback):
    """What the weights are when a checkpoint callback, which comes last, is told that validation begins."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_validation_start(self, trainer, pl_module):
        self.states[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}


class Testable(ToyModel):
    def test_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self.net(batch)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def run(directory: Path | None, ema: EMA, *more: pl.Callback, steps: int = 6, model=None, resume=None, **options):
    saving = (
        [] if directory is None else [ModelCheckpoint(dirpath=directory, filename="{step}", **checkpointing(options))]
    )
    settings = {"val_check_interval": 2, "enable_checkpointing": bool(saving), **options}
    trainer = quiet_trainer(max_steps=steps, callbacks=[*more, ema, *saving], **settings)
    model = model or Testable()
    trainer.fit(model, loader(), loader(), ckpt_path=resume)
    return trainer, model


def checkpointing(options) -> dict:
    known = ("async_save", "save_weights_only", "save_last", "monitor", "save_on_exception", "every_n_train_steps")
    given = {key: options.pop(key) for key in known if key in options}
    return {"every_n_train_steps": 2, "save_top_k": -1, **given}


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("offload", [False, True])
def test_it_is_the_formula_to_the_bit(every, accumulate, offload):
    ema, by_hand = EMA(DECAY, every_n_steps=every, cpu_offload=offload), ByHand(every=every)
    run(None, ema, by_hand, steps=7, accumulate_grad_batches=accumulate)
    assert same(ema.averages, by_hand.averages)
    assert not same(ema.averages, {k: by_hand.weights[7][k] for k in ema.averages})


def test_training_does_not_notice():
    _, plain = run(None, EMA(0.5))
    trainer = quiet_trainer(max_steps=6, val_check_interval=2, enable_checkpointing=False)
    model = Testable()
    trainer.fit(model, loader(), loader())
    assert model.losses == plain.losses
    assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("original", [False, True])
def test_validation_test_and_prediction_see_the_averages(original):
    ema, by_hand, seen = EMA(DECAY, validate_original_weights=original), ByHand(), Seen()
    trainer, model = run(None, ema, by_hand, seen, num_sanity_val_steps=1)
    for step in (2, 4, 6):
        expected = by_hand.weights[step] | ({} if original else by_hand.history[step])  # buffers are the model's
        assert same(seen.states[step], expected)
    assert same(model.state_dict(), by_hand.weights[6])
    for use in (partial(trainer.test, verbose=False), trainer.predict):
        seen.states.clear()
        use(model, loader())
        assert same(seen.states[6], by_hand.weights[6] | ({} if original else by_hand.history[6]))
        assert same(model.state_dict(), by_hand.weights[6])


def test_nothing_changes_before_checkpoint_callbacks_know_of_validation():
    """They may still be copying the weights of a save beside training."""
    by_hand, order = ByHand(), Order()
    trainer = quiet_trainer(max_steps=4, val_check_interval=2, enable_checkpointing=False)
    trainer.callbacks += [by_hand, EMA(DECAY), order]
    trainer.fit(ToyModel(), loader(), loader())
    assert same(order.states[2], by_hand.weights[2])
    assert same(order.states[4], by_hand.weights[4])


def test_the_weights_are_back_when_validation_raises(tmp_path):
    ema, by_hand = EMA(DECAY), ByHand()
    model = Testable()
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, ema, by_hand, Seen(fail=True), model=model, save_on_exception=True)
    assert same(model.state_dict(), by_hand.weights[2])
    (saved,) = tmp_path.iterdir()
    assert same(load_model(saved), by_hand.weights[2])
    assert same(load_model(saved / "ema_weights"), by_hand.weights[2] | by_hand.history[2])


@pytest.mark.parametrize("beside", [False, True])
def test_they_are_in_the_same_checkpoint(tmp_path, beside):
    ema, by_hand = EMA(DECAY), ByHand()
    run(tmp_path, ema, by_hand, async_save=beside)
    assert names(tmp_path) == ["step=2", "step=4", "step=6", "step=6-last"]
    for name, manifest in manifests(tmp_path).items():
        checkpoint, expected = tmp_path / name, by_hand.weights[manifest.step] | by_hand.history[manifest.step]
        assert {f for f in manifest.files if f.startswith("ema_weights/")} == {
            f"ema_weights/{f}" for f in (".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json")
        }
        assert nl.verify_checkpoint(checkpoint).ok
        assert same(load_checkpoint(checkpoint)["state_dict"], by_hand.weights[manifest.step])
        assert not any("ema" in key for key in described(checkpoint / "weights"))
        # torch itself reads them
        state = {"state_dict": {k: torch.zeros_like(v) for k, v in expected.items()}}
        dcp_load(state, storage_reader=FileSystemReader(checkpoint / "ema_weights"), no_dist=True)
        assert same(state["state_dict"], expected)
        for path in (checkpoint, checkpoint / "weights", checkpoint / "ema_weights"):
            model = ToyModel()
            nl.load_weights(path, model, ema=True)
            assert same(model.state_dict(), expected)
        nl.export_weights(checkpoint, tmp_path.parent / "out.pt", ema=True)
        assert same(torch.load(tmp_path.parent / "out.pt", weights_only=True), expected)


def test_a_save_in_the_middle_of_validation_has_what_is_trained(tmp_path):
    class Saves(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt", weights_only=False)

    by_hand = ByHand()
    run(None, EMA(DECAY), by_hand, Saves(), steps=4)
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert same(saved["state_dict"], by_hand.weights[4])
    assert same(saved["ema_state_dict"], by_hand.weights[4] | by_hand.history[4])


def test_it_acts_before_the_checkpoint_wherever_it_stands(tmp_path):
    by_hand = ByHand()
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, monitor=None
    )
    trainer = quiet_trainer(max_steps=3, callbacks=[by_hand, checkpoint], val_check_interval=3)
    trainer.callbacks.append(EMA(DECAY))
    trainer.fit(ToyModel(), loader(), loader())
    for step in (1, 2, 3):
        assert same(load_model(tmp_path / f"step={step}"), by_hand.weights[step])
        assert same(load_model(tmp_path / f"step={step}/ema_weights"), by_hand.weights[step] | by_hand.history[step])


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_a_resumed_run_has_the_averages_of_the_uninterrupted_one(tmp_path, beside, offload):
    options = {"async_save": beside, "accumulate_grad_batches": 2}
    whole = EMA(DECAY, every_n_steps=3, cpu_offload=offload)
    _, model = run(tmp_path / "a", whole, steps=8, **options)
    run(tmp_path / "b", EMA(DECAY, every_n_steps=3), steps=4, **options)
    rest = EMA(DECAY, every_n_steps=3, cpu_offload=offload)
    _, resumed = run(tmp_path / "b", rest, steps=8, resume=tmp_path / "b" / "step=4-last", **options)
    assert same(rest.averages, whole.averages)
    assert same(resumed.state_dict(), model.state_dict())
    assert same(
        load_model(tmp_path / "a" / "step=8" / "ema_weights"), load_model(tmp_path / "b" / "step=8" / "ema_weights")
    )


def test_a_checkpoint_file_of_lightning_resumes_too(tmp_path):
    class Begins(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            self.step, self.averages = trainer.global_step, {k: v.clone() for k, v in rest.averages.items()}
            trainer.should_stop = True

    half, rest, begins = EMA(DECAY), EMA(DECAY), Begins()
    trainer, _ = run(None, half, steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    run(None, rest, begins, resume=tmp_path / "half.ckpt")
    assert begins.step == 4
    assert same(begins.averages, half.averages)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_is_tested_with_its_own_averages(tmp_path, weights_only):
    by_hand = ByHand()
    run(tmp_path, EMA(DECAY), by_hand, save_weights_only=weights_only)
    seen, model = Seen(), Testable()
    trainer = quiet_trainer(callbacks=[EMA(DECAY), seen], enable_checkpointing=False)
    nl.loading.checkpoint_io.install(trainer)
    trainer.test(model, loader(), ckpt_path=tmp_path / "step=4", verbose=False)
    (state,) = seen.states.values()
    assert same(state, by_hand.weights[4] | by_hand.history[4])
    assert same(model.state_dict(), by_hand.weights[4])


def test_averages_begin_where_a_checkpoint_has_none(tmp_path, caplog):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    trainer = quiet_trainer(max_steps=4, val_check_interval=2, callbacks=[checkpoint])
    trainer.fit(ToyModel(), loader(), loader())
    ema, by_hand = EMA(DECAY), ByHand()
    with caplog.at_level(logging.WARNING):
        run(tmp_path, ema, by_hand, resume=tmp_path / "step=4")
    assert same(ema.averages, by_hand.averages)
    assert "holds no averaged weights: the averages begin with its weights at step 4" in caplog.text
    with pytest.raises(NotFoundError, match="holds no averaged weights"):
        nl.load_weights(tmp_path / "step=4", ToyModel(), ema=True)


def test_a_run_that_goes_on_without_the_callback_is_told_that_averages_end(tmp_path, caplog):
    run(tmp_path, EMA(DECAY), steps=4, model=ToyModel())
    with caplog.at_level(logging.WARNING):
        quiet_trainer(max_steps=6).fit(ToyModel(), loader(), loader(), ckpt_path=str(tmp_path / "step=4-last"))
    assert "step=4-last holds averages of the weights, and this run has no EMA callback" in caplog.text


class Own(pl.Callback):
    """Keeps something under the key that EMA uses."""

    loaded: object = None

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["ema_state_dict"] = {"net.0.bias": torch.ones(8), "decay": 0.5}

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.loaded = checkpoint.get("ema_state_dict")


def test_the_averages_of_somebody_elses_callback_are_its_own(tmp_path, caplog):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    quiet_trainer(max_steps=2, val_check_interval=2, callbacks=[Own(), checkpoint]).fit(ToyModel(), loader(), loader())
    ema, by_hand, own = EMA(DECAY), ByHand(), Own()
    run(tmp_path / "more", ema, by_hand, own, steps=4, resume=tmp_path / "step=2")
    assert torch.equal(own.loaded["net.0.bias"], torch.ones(8))
    assert own.loaded["decay"] == 0.5
    assert same(ema.averages, by_hand.averages)
    assert "'ema_state_dict' is lost: EMA saves its averages under it" in caplog.text


def test_what_the_models_state_lacks_is_said_once(tmp_path, caplog):
    class Lacks(ToyModel):
        def state_dict(self, *args, **kwargs):
            return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name != "net.0.bias"}

    ckpt = ModelCheckpoint(dirpath=tmp_path, monitor=None, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet_trainer(max_steps=3, callbacks=[EMA(), ckpt]).fit(Lacks(), loader())
    assert caplog.text.count("lacks net.0.bias, so their averages are not saved") == 1


def test_damage_is_found(tmp_path):
    run(tmp_path, EMA(DECAY), steps=2, save_last=False)
    checkpoint = tmp_path / "step=2"
    file = checkpoint / "ema_weights" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (problem,) = nl.verify_checkpoint(checkpoint / "ema_weights").problems
    assert problem.file == "ema_weights/__0_0.distcp"
    file.unlink()
    (problem,) = nl.verify_checkpoint(checkpoint, deep=False).problems
    assert problem.what == "is missing"


class Unfreezes(ToyModel):
    """Its last layer is another name for itself, and the first is trained from step 3 on."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.net[2]
        self.net[0].requires_grad_(False)
        self.small = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.number = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step >= 3:
            self.net[0].requires_grad_(True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.small.float().pow(2).sum()


def test_shared_frozen_and_small_parameters(tmp_path):
    ema, by_hand, model = EMA(0.999), ByHand(), Unfreezes()
    run(tmp_path, ema, by_hand, model=model)
    frozen = {k: v for k, v in by_hand.weights[2].items() if k.startswith("net.0.")}
    saved = load_model(tmp_path / "step=2" / "ema_weights")
    assert all(torch.equal(saved[k], v) for k, v in frozen.items())
    assert {"net.0.weight", "net.0.bias"} <= ema.averages.keys()
    first = frozen["net.0.bias"]
    for step in (4, 5, 6):
        first = 0.999 * first + (1 - 0.999) * by_hand.weights[step]["net.0.bias"]
    assert torch.equal(ema.averages["net.0.bias"], first)
    last = load_model(tmp_path / "step=6" / "ema_weights")
    assert torch.equal(last["again.weight"], last["net.2.weight"])
    assert torch.equal(last["again.weight"], ema.averages["net.2.weight"])
    assert last["small"].dtype == torch.float32  # in bfloat16 it would not have moved
    assert 0 < (last["small"] - 1).abs().max() < 1e-2
    assert torch.equal(last["number"], torch.ones(3, dtype=torch.int64))
    rest = EMA(0.999)
    run(tmp_path, rest, model=Unfreezes(), resume=tmp_path / "step=4", steps=6)
    assert same(rest.averages, ema.averages)


def test_it_works_in_a_run_of_ours(tmp_path):
    def go(name, steps):
        ema = EMA(DECAY)
        trainer = quiet_trainer(max_steps=steps, callbacks=[ema])
        ckpt = ModelCheckpoint(filename="{step}", every_n_train_steps=2, save_top_k=1, monitor=None)
        resume = nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True)
        nl.train(ToyModel(), ToyDataModule(), trainer, nl.NeMoLogger(name=name, log_dir=tmp_path, ckpt=ckpt), resume)
        return ema

    whole = go("a", 6)
    go("b", 4)
    assert same(go("b", 6).averages, whole.averages)
    (last,) = (tmp_path / "b").rglob("step=6-last")
    assert same(nl.load_model(last, ema=True).state_dict(), load_model(last / "ema_weights"))
    assert not isinstance(nl.io.load_context(last, subpath="trainer"), Uncaptured)


@pytest.mark.dist
def test_two_ranks(tmp_path):
    """Each rank writes its share; a resumed run that saves beside training has the averages of one that does neither."""
    torchrun(SCRIPT, 2, tmp_path / "a", 8)
    torchrun(SCRIPT, 2, tmp_path / "b", 4, "--beside")
    torchrun(SCRIPT, 2, tmp_path / "b", 8, "--beside")
    for rank in (0, 1):
        whole, rest = (torch.load(tmp_path / d / f"averages-{rank}.pt", weights_only=True) for d in "ab")
        assert same(whole, rest)
    (last,) = (tmp_path / "b").rglob("step=8-last")
    assert nl.verify_checkpoint(last).ok
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(names(last / "ema_weights"))
    model = ToyModel()
    nl.load_weights(last, model, ema=True)
    assert same({k: v.detach() for k, v in model.named_parameters()}, whole)


@pytest.mark.parametrize("wrong", [{"decay": 1.5}, {"decay": -0.1}, {"every_n_steps": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        EMA(**wrong)


def test_deepspeed_is_refused():
    trainer = quiet_trainer(callbacks=[ema := EMA()], enable_checkpointing=False)
    trainer.strategy.__class__ = type("Spread", (pl.strategies.DeepSpeedStrategy,), {})
    with pytest.raises(ConfigurationError, match="EMA does not work with Spread"):
        ema.setup(trainer, ToyModel(), "fit")


def test_one_that_has_trained_can_be_copied_and_sent_to_another_process():
    ema = EMA(DECAY)
    run(None, ema)
    for copied in (deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        by_hand = ByHand()
        run(None, copied, by_hand)
        assert same(copied.averages, by_hand.averages)
