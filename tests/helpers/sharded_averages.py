"""Averaged weights of models that two ranks share, in all that happens to them. Run by ``torchrun`` with 2 ranks.

``sharded_averages.py DIRECTORY``: what each scenario saw goes to ``DIRECTORY/rank<n>.json``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.utils.data import DataLoader
from toy import ToyData, quiet_trainer

from helpers.sharded import FSDPOnCPU, Model, averages_of, strategy_of, whole
from nemologger import ModelCheckpoint, exp_manager, sharded_state
from nemologger.callbacks import EMA
from nemologger.checkpoint.reading.load import load_model
from nemologger.checkpoint.state.shards import is_sharded, local
from nemologger.loading.checkpoint_io import install
from nemologger.strategies import FSDP2Strategy

DECAY = 0.9


class Watched(Model):
    """Remembers its losses, and what it answered in validation and test."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.answers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        answer = self.forward(batch).detach()  # not self(batch): after that, FSDP2 drops what it gathered
        self.answers[self.global_step] = batch, answer.clone()
        self.log("val_loss", answer.float().mean(), sync_dist=True)

    test_step = validation_step


class ByHand(pl.Callback):
    """The formula as it is written, applied to whole parameters."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.history: dict[int, dict[str, torch.Tensor]] = {}
        self.kept: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module):
        names = {sharded_state.plain_name(name) for name, _ in pl_module.named_parameters()}
        self.averages = {name: tensor.float() for name, tensor in state_of(trainer).items() if name in names}
        self.began_with = averages_of(trainer)

    def on_train_batch_end(self, trainer, pl_module, *args):
        step = trainer.global_step
        self.weights[step] = state_of(trainer)
        if step % self.every == 0:
            weights = self.weights[step]
            self.averages = {n: DECAY * a + (1 - DECAY) * weights[n].float() for n, a in self.averages.items()}
        self.history[step] = self.averages

    def on_train_end(self, trainer, pl_module):
        self.kept = averages_of(trainer)


def state_of(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in sharded_state.model_state(trainer.strategy).items()}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    names = one.keys() | other.keys()
    return sorted(n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n]))


def loader() -> DataLoader[torch.Tensor]:
    return DataLoader(ToyData(), batch_size=4)


class FSDP(FSDPOnCPU):
    """With FSDP's own options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(state_dict_type="sharded")
        self.options = options

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), **{"use_orig_params": True, **self.options}
        )


def made(kind: str) -> Any:
    if kind in ShardingStrategy.__members__:
        return FSDP(sharding_strategy=ShardingStrategy[kind])
    return FSDP() if kind == "fsdp" else strategy_of(kind, 2)


def fit(kind: str, *callbacks: pl.Callback, steps: int = 6, model: Any = None, load: Any = None, **more: Any) -> Any:
    options = {"val_check_interval": 2, "limit_val_batches": 1, "enable_checkpointing": False, **more}
    strategy = options.pop("strategy", None) or made(kind)
    if any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        options["enable_checkpointing"] = True
    trainer = quiet_trainer(max_steps=steps, devices=2, strategy=strategy, callbacks=list(callbacks), **options)
    trainer.fit(model or Watched(), loader(), loader(), ckpt_path=load)
    return trainer


def checkpoint(directory: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        monitor=None, dirpath=directory, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=False,
        verbose=False, **options,
    )  # fmt: skip


def in_place(by_hand: ByHand, step: int) -> dict[str, torch.Tensor]:
    """The state of a model that has the averages of ``step``."""
    weights = by_hand.weights[step]
    return weights | {name: average.to(weights[name].dtype) for name, average in by_hand.history[step].items()}


def answered(model: Watched, step: int, state: dict[str, torch.Tensor]) -> float:
    """How far its answer was from the one that a whole model gives with ``state``."""
    reference = Model().to(next(iter(state.values())).dtype)
    reference.load_state_dict(state)
    batch, answer = model.answers[step]
    with torch.no_grad():
        return float((reference(batch) - answer).abs().max())


def averaged(directory: Path, kind: str, every: int, offload: bool, beside: bool, **options: Any) -> dict[str, Any]:
    """Everything about a run with averages, and about one that goes on from it."""
    plain, model = Watched(), Watched()
    without = fit(kind, model=plain, num_sanity_val_steps=1, **options)
    ema, by_hand = EMA(DECAY, every_n_steps=every, cpu_offload=offload), ByHand(every)
    saving = checkpoint(directory, async_save=beside)
    trainer = fit(kind, ema, by_hand, saving, model=model, num_sanity_val_steps=1, **options)
    seen = {
        "formula": differences(by_hand.kept, by_hand.averages),
        "not moved": sorted(n for n, t in by_hand.kept.items() if torch.equal(t, by_hand.weights[6][n].float())),
        "training": differences(state_of(trainer), state_of(without)),
        "losses": model.losses == plain.losses,
        "here": sum(local(average).numel() for average in ema.averages.values()),
        "sharded": sorted(name for name, average in ema.averages.items() if is_sharded(average)),
        "validation": max(answered(model, s, in_place(by_hand, s)) for s in (2, 4, 6)),
        "not as trained": min(answered(model, s, by_hand.weights[s]) for s in (2, 4, 6)),
        "saved": [
            differences(load_model(directory / f"step={s}"), by_hand.weights[s])
            + differences(load_model(directory / f"step={s}" / "ema_weights"), by_hand.weights[s] | by_hand.history[s])
            for s in (2, 4, 6)
        ],
    }
    if kind in ("fsdp2", "tp2"):  # Lightning wraps a model once more for each stage, and FSDP cannot have that
        model.answers.clear()
        trainer.test(model, loader(), verbose=False)
        seen["test"] = answered(model, 6, in_place(by_hand, 6))
        seen["weights after test"] = differences(state_of(trainer), by_hand.weights[6])
    rest, resumed = EMA(DECAY, every_n_steps=every, cpu_offload=offload), ByHand(every)
    again = fit(kind, rest, resumed, checkpoint(directory / "again"), load=directory / "step=4", **options)
    seen["resumed"] = differences(resumed.began_with, by_hand.history[4]) + differences(resumed.kept, by_hand.kept)
    seen["resumed training"] = differences(state_of(again), by_hand.weights[6])
    tested, tests = (
        Watched(),
        quiet_trainer(devices=2, strategy=made(kind), callbacks=[EMA(DECAY)], **options),
    )
    install(tests)
    tests.test(tested, loader(), ckpt_path=directory / "step=4", verbose=False)
    ((step, _),) = tested.answers.items()
    seen["tested"] = answered(tested, step, in_place(by_hand, 4))
    return seen


class Fails(Watched):
    """In its second validation, after a forward."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.global_step == 4:
            raise ZeroDivisionError


def stopped(directory: Path, kind: str) -> list[str]:
    """Validation raises: what was trained is back, and saved, and the averages beside it."""
    by_hand, model = ByHand(1), Fails()
    kept = quiet_trainer(
        max_steps=6, devices=2, strategy=made(kind), val_check_interval=2,
        callbacks=[EMA(DECAY), by_hand, checkpoint(directory, save_on_exception=True)],
    )  # fmt: skip
    with suppress(ZeroDivisionError):
        kept.fit(model, loader(), loader())
    saved = directory / "step=4"
    return [
        *differences(state_of(kept), by_hand.weights[4]),
        *differences(load_model(saved), by_hand.weights[4]),
        *differences(load_model(saved / "ema_weights"), by_hand.weights[4] | by_hand.history[4]),
    ]


class SavesByLightning(pl.Callback):
    """In the middle of validation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_validation_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.directory / str(trainer.global_step))


def by_lightning(directory: Path, kind: str) -> dict[str, Any]:
    """A checkpoint of Lightning's own has what is trained; a warning says that it has no averages."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("nemologger.callbacks.ema")
    log.addHandler(handler)
    by_hand = ByHand(1)
    fit(kind, EMA(DECAY), by_hand, SavesByLightning(directory), steps=4)
    log.removeHandler(handler)
    key = "model" if kind == "fsdp" else "state_dict"
    state = {key: {name: torch.zeros_like(tensor) for name, tensor in by_hand.weights[4].items()}}
    dcp.load(state, checkpoint_id=str(directory / "4"), no_dist=True)
    rest = torch.load(directory / "4" / "meta.pt", weights_only=True)
    return {"said": said, "wrong": differences(state[key], by_hand.weights[4]), "averages": "ema_state_dict" in rest}


def from_file(directory: Path, kind: str) -> list[str]:
    """A checkpoint file of Lightning's, that one process wrote: the averages begin with those in it."""
    by_hand = ByHand(1)
    fit(kind, EMA(DECAY), by_hand, steps=5, load=directory / "one.ckpt", limit_val_batches=0)
    saved = torch.load(directory / "one.ckpt", weights_only=True)["ema_state_dict"]
    return differences(by_hand.began_with, {name: tensor for name, tensor in saved.items() if name != "seen"})


def weights_only(directory: Path) -> list[str]:
    by_hand = ByHand(1)
    fit("fsdp2", EMA(DECAY), by_hand, checkpoint(directory, save_weights_only=True), steps=2)
    return differences(load_model(directory / "step=2" / "ema_weights"), by_hand.weights[2] | by_hand.history[2])


def managed(directory: Path) -> list[str]:
    """By NeMo 1's section."""
    by_hand = ByHand(1)
    trainer = quiet_trainer(
        max_steps=2, devices=2, strategy=FSDP2Strategy(), val_check_interval=2, logger=False,
        enable_checkpointing=False, callbacks=[by_hand],
    )  # fmt: skip
    section = {
        "explicit_log_dir": str(directory),
        "create_tensorboard_logger": False,
        "ema": {"enable": True, "decay": DECAY, "cpu_offload": True},
        "checkpoint_callback_params": {"monitor": "val_loss", "save_top_k": 0, "save_last": True},
    }
    exp_manager.exp_manager(trainer, section)
    model = Watched()
    trainer.fit(model, loader(), loader())
    (last,) = directory.rglob("*-last")
    return differences(load_model(last / "ema_weights"), by_hand.weights[2] | by_hand.history[2])


def refused(strategy: Any, **options: Any) -> str:
    trainer = quiet_trainer(
        max_steps=1, devices=2, strategy=strategy, callbacks=[EMA()], limit_val_batches=0, enable_checkpointing=False,
        **options,
    )  # fmt: skip
    trainer.fit(Watched(), loader())
    return "not refused"


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    runs: dict[str, Any] = {
        "fsdp2": {"kind": "fsdp2", "every": 1, "offload": False, "beside": False},
        "fsdp2, offloaded": {"kind": "fsdp2", "every": 2, "offload": True, "beside": True},
        "fsdp2, bf16": {"kind": "fsdp2", "every": 1, "offload": True, "beside": False, "precision": "bf16-true"},
        "tp2": {"kind": "tp2", "every": 1, "offload": False, "beside": True, "use_distributed_sampler": False},
        "fsdp": {"kind": "fsdp", "every": 2, "offload": False, "beside": False},
        "fsdp, offloaded": {"kind": "SHARD_GRAD_OP", "every": 1, "offload": True, "beside": True},
        "fsdp, not sharded": {"kind": "NO_SHARD", "every": 1, "offload": False, "beside": False},
    }
    scenarios: dict[str, Callable[[], Any]] = {
        **{name: partial(averaged, directory / name, **options) for name, options in runs.items()},
        "stopped": partial(stopped, directory / "stopped", "fsdp2"),
        **{f"lightning {k}": partial(by_lightning, directory / f"lightning-{k}", k) for k in ("fsdp2", "fsdp")},
        **{f"file {kind}": partial(from_file, directory, kind) for kind in ("fsdp2", "fsdp")},
        "weights only": partial(weights_only, directory / "weights-only"),
        "managed": partial(managed, directory / "managed"),
        "flat": partial(refused, FSDP(use_orig_params=False)),
        "half": partial(refused, FSDP(), precision="bf16-true"),
    }
    wanted = sys.argv[2:] or list(scenarios)
    seen: dict[str, Any] = {}
    for name in wanted:
        try:
            seen[name] = scenarios[name]()
        except Exception as error:  # the test looks at it
            seen[name] = f"{type(error).__name__}: {error}"
            logging.getLogger(__name__).exception(name)
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
