"""What the callback does around training: to the trainer, the loaders and the log."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from exact.loaders.test_loaders import Stream
from exact.runs import BATCH, Augmented, Case, Net, check, shuffled, train
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, random_split
from torchdata.stateful_dataloader import StatefulDataLoader

import nemologger as nl
from nemologger.callbacks.exact_resume import ExactResume
from nemologger.callbacks.not_exact import _with_dropout_of_cudnn, advice_for, advice_for_validation
from nemologger.exact.loaders.feed import described


class Looks(Callback):
    """Keeps what the trainer shows its users while it trains."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.loader = trainer.train_dataloader
        self.is_loader = isinstance(self.loader, DataLoader)
        self.shown = (len(self.loader), self.loader.batch_size, type(self.loader.dataset), self.loader.num_workers)


def test_the_loader_looks_like_itself_and_is_given_back_as_it_was(tmp_path):
    loader, looks = shuffled(), Looks()
    before = dict(vars(loader))
    train(Case(lambda: loader, callbacks=lambda: [looks]), tmp_path, 1)
    assert looks.is_loader
    assert looks.shown == (6, BATCH, Augmented, 0)
    assert dict(vars(loader)) == before
    assert type(loader.batch_sampler) is BatchSampler


def test_it_is_given_back_after_an_exception_too(tmp_path):
    loader = shuffled(num_workers=1)
    train(Case(lambda: loader), tmp_path, 1, stop_at=2)
    assert type(loader.batch_sampler) is BatchSampler
    assert loader.worker_init_fn is None


def test_one_loader_can_serve_two_runs_and_validation(tmp_path):
    loader = shuffled()
    first, _, _ = train(Case(lambda: loader), tmp_path / "a", 1)
    trainer = pl.Trainer(
        max_steps=14, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False, val_check_interval=3,
        check_val_every_n_epoch=None, limit_val_batches=2, enable_model_summary=False, callbacks=[ExactResume()],
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Net(), loader, loader)
    assert train(Case(lambda: loader), tmp_path / "b", 1)[0] == first


def test_losses_are_those_of_plain_lightning_without_workers(tmp_path):
    ours, _, _ = train(Case(shuffled, trainer={"limit_val_batches": 0}), tmp_path / "a", 1)
    plain, _, _ = train(
        Case(shuffled, trainer={"limit_val_batches": 0}, ckpt={"exact_resume": False}), tmp_path / "b", 1
    )
    assert ours == plain


def test_the_switch(tmp_path):
    case = Case(shuffled, ckpt={"exact_resume": False})
    _, _, trainer = train(case, tmp_path, 1)
    assert not [c for c in trainer.callbacks if isinstance(c, ExactResume)]
    assert "process_dataloader" not in vars(trainer.strategy)
    assert type(trainer.train_dataloader) is DataLoader


def test_it_can_be_used_without_our_checkpoints(tmp_path):
    def run(seed: int, path=None) -> Net:
        torch.manual_seed(seed)
        model = Net()
        trainer = pl.Trainer(
            max_steps=9, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[ExactResume(), pl.callbacks.ModelCheckpoint(
                tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)],
        )  # fmt: skip
        np.random.seed(seed)
        trainer.fit(model, shuffled(), ckpt_path=path)
        return model

    straight = run(1).losses
    assert run(2, tmp_path / "step=4.ckpt").losses == straight[4:]


def test_no_warning_that_the_loader_cannot_resume(tmp_path):
    train(Case(shuffled), tmp_path / "a", 1, stop_at=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Case(shuffled), tmp_path / "b", 2, tmp_path / "a" / "step=4")
    assert not [w for w in caught if "resumable" in str(w.message)]


def test_what_cannot_be_promised_is_said_once_by_name(tmp_path, caplog):
    train(Case(lambda: DataLoader(Stream(), batch_size=BATCH)), tmp_path / "a", 1)
    told = [record.getMessage() for record in caplog.records if "exact resume" in record.getMessage()]
    assert len(told) == 1
    assert "Stream" in told[0]
    assert "state_dict" in told[0]
    caplog.clear()
    train(Case(shuffled), tmp_path / "b", 1)
    assert "exact resume" not in caplog.text


def test_other_data_than_before_is_reported(tmp_path, caplog):
    def split(size: int = BATCH) -> DataLoader:
        return DataLoader(random_split(Augmented(), [18, 4])[0], batch_size=size)

    train(Case(split), tmp_path / "a", 1, stop_at=2)
    train(Case(split), tmp_path / "b", 1, tmp_path / "a" / "step=2")
    assert "training data is not what it was" not in caplog.text
    train(Case(split), tmp_path / "c", 2, tmp_path / "a" / "step=2")
    assert caplog.text.count("training data is not what it was") == 1
    assert "(other samples are chosen (Subset, random_split))" in caplog.text
    train(Case(lambda: split(BATCH // 2)), tmp_path / "d", 1, tmp_path / "a" / "step=2")
    assert caplog.text.count("training data is not what it was") == 2
    assert f"was saved (batch_size: {BATCH} -> {BATCH // 2})" in caplog.text


class Epochs(Augmented):
    """Has the number of the epoch in a tensor, as streams of Hugging Face."""

    def __init__(self):
        super().__init__()
        self.epoch = torch.zeros(())

    def __getitem__(self, index):
        self.epoch += index == self.samples - 1
        return super().__getitem__(index) + self.epoch


def test_data_that_count_epochs_are_the_same_data(tmp_path, caplog):
    check(Case(lambda: DataLoader(Epochs(), batch_size=BATCH), at=(6, 9)), tmp_path)
    assert "training data is not what it was" not in caplog.text


class Cached(Augmented):
    """Makes a sample when it is first asked for."""

    def __init__(self):
        super().__init__()
        self.there, self.made = torch.zeros(self.samples, dtype=torch.bool), torch.zeros(self.samples, 4)

    def __getitem__(self, index):
        if not self.there[index]:
            self.made[index] = torch.sin(torch.arange(4) + index)
            self.there[index] = True
        return self.made[index]


def test_data_that_fill_a_cache_are_the_same_data(tmp_path, caplog):
    check(Case(lambda: DataLoader(Cached(), batch_size=BATCH, shuffle=True), at=(2, 6, 9)), tmp_path)
    assert "training data is not what it was" not in caplog.text


def test_a_checkpoint_without_our_state_goes_on_after_as_many_batches(tmp_path, caplog):
    train(Case(shuffled, ckpt={"exact_resume": False}), tmp_path / "a", 1, stop_at=4)
    losses, _, trainer = train(Case(shuffled, steps=12), tmp_path / "b", 2, tmp_path / "a" / "step=4")
    assert "the first 4 batches of the epoch are left out" in caplog.text
    assert len(losses) == 8
    assert trainer.fit_loop.epoch_progress.current.completed == 2  # two batches of the first epoch, six of the second


def test_our_state_does_not_disturb_a_run_that_does_not_want_it(tmp_path):
    train(Case(shuffled), tmp_path / "a", 1, stop_at=4)
    with pytest.warns(UserWarning, match="not resumable"):
        losses, _, _ = train(Case(shuffled, ckpt={"exact_resume": False}), tmp_path / "b", 2, tmp_path / "a" / "step=4")
    assert losses


def test_the_samplers_type_survives(tmp_path):
    loader = StatefulDataLoader(Augmented(), batch_size=BATCH, sampler=RandomSampler(range(22)))
    train(Case(lambda: loader, steps=2), tmp_path, 1)
    assert isinstance(loader.sampler, RandomSampler)


def test_validation_does_not_shift_training(tmp_path):
    runs = [
        train(Case(shuffled, trainer={"limit_val_batches": n, "num_sanity_val_steps": n}), tmp_path / str(n), 1)[0]
        for n in (0, 1, 3)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_a_second_fit_of_the_same_trainer(tmp_path):
    ckpt = nl.ModelCheckpoint(dirpath=tmp_path, monitor=None, every_n_train_steps=1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ckpt],
    )
    model = Net()
    trainer.fit(model, shuffled())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, shuffled())
    assert len(model.losses) == 12
    assert len([c for c in trainer.callbacks if isinstance(c, ExactResume)]) == 1


def test_on_a_gpu_it_says_what_else_must_repeat(monkeypatch):
    assert advice_for(torch.device("cpu")) == ""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert "Trainer(deterministic=True, benchmark=False)" in advice_for(torch.device("cuda", 1))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert advice_for(torch.device("cuda", 1)) == ""


def test_workers_of_validation_that_stay_are_named():
    loaders = [DataLoader(range(4), num_workers=1, persistent_workers=stays) for stays in (False, True)]
    assert advice_for_validation(loaders[:1]) == advice_for_validation([]) == ""
    assert "workers of validation loader 1 stay" in advice_for_validation(loaders)


def test_on_a_gpu_it_names_layers_whose_dropout_is_not_torchs():
    parts = {"two": torch.nn.LSTM(2, 2, 2, dropout=0.1), "one": torch.nn.GRU(2, 2), "none": torch.nn.RNN(2, 2, 2)}
    model, cuda = torch.nn.ModuleDict(parts), torch.device("cuda")
    assert _with_dropout_of_cudnn(cuda, model) == ["two"]
    assert _with_dropout_of_cudnn(torch.device("cpu"), model) == []
    with torch.backends.cudnn.flags(enabled=False):
        assert _with_dropout_of_cudnn(cuda, model) == []


def test_what_is_saved_by_hand_after_a_fit_resumes_with_plain_lightning(tmp_path):
    _, _, trainer = train(Case(shuffled, steps=4), tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "by-hand.ckpt")
    plain = pl.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    model = Net()
    with pytest.warns(UserWarning, match="not resumable"):
        plain.fit(model, shuffled(), ckpt_path=tmp_path / "by-hand.ckpt")
    assert len(model.losses) == 2


class ByEpoch(BatchSampler):
    """Is told the epoch by an attribute."""

    epoch = -1

    def __iter__(self):
        return iter([[self.epoch % 22]] * 6)


def test_what_is_set_on_a_sampler_reaches_it(tmp_path):
    class Tells(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.train_dataloader.batch_sampler.epoch = trainer.current_epoch + 5

    seen = []

    class Noted(Augmented):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    sampler = ByEpoch(RandomSampler(range(22)), 1, drop_last=False)
    case = Case(
        lambda: DataLoader(Noted(), batch_sampler=sampler),
        trainer={"limit_val_batches": 0},
        callbacks=lambda: [Tells()],
        steps=12,
    )
    train(case, tmp_path, 1)
    assert seen == [5] * 6 + [6] * 6
    assert sampler.epoch == 6


class Counted(Sequence):
    """Indices that count how often they are read from first to last."""

    def __init__(self, indices):
        self.indices, self.reads = indices, 0

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        return self.indices[place]

    def __iter__(self):
        self.reads += 1
        return iter(self.indices)


def test_the_samples_of_a_part_are_looked_at_once_not_at_each_save(tmp_path):
    indices = Counted([5, 3, 8, 1, 9, 11, 2, 4])
    train(Case(lambda: DataLoader(Subset(Augmented(), indices), batch_size=2), steps=6), tmp_path, 1)
    assert indices.reads <= 1


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, Counted])
def test_a_part_of_a_dataset_is_the_same_however_its_indices_are_kept(kind):
    part = [5, 3, 8]
    assert described(Subset(Augmented(), kind(part))) == described(Subset(Augmented(), part))
    assert described(Subset(Augmented(), kind(part[::-1]))) != described(Subset(Augmented(), part))


def test_a_pruned_model_goes_on_and_what_is_not_the_same_is_said(tmp_path, caplog):
    pruned = Case(
        shuffled,
        callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.5)],
        trainer={"max_epochs": 3, "max_steps": -1},
    )
    straight, batches, _ = train(pruned, tmp_path / "straight", 1)
    losses, _, _ = train(pruned, tmp_path / "resumed", 2, tmp_path / "straight" / "step=13")
    assert len(losses) == len(straight) - batches[13]
    assert "ModelPruning keeps its masks out of checkpoints" in caplog.text
