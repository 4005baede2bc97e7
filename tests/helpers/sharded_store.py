"""A sharded model that saves to a store, and goes on from there. Run by ``torchrun`` with 2 ranks.

``sharded_store.py DIRECTORY URL``, with ``--beside`` for saves beside training. What was trained or loaded, in full and by
name, goes to ``DIRECTORY/<what>.pt``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from toy import BATCH, ToyData

import nemologger as nl
from helpers.sharded import Keep, Model, strategy_of
from nemologger.callbacks import EMA
from nemologger.strategies import FSDP2Strategy


def fit(
    directory: str, steps: int, keep: list[Keep], load: str = "", kind: str = "fsdp2", beside: bool = False
) -> None:
    trainer = pl.Trainer(
        max_steps=steps,
        devices=2,
        accelerator="cpu",
        strategy=FSDP2Strategy(ckpt_async_save=beside) if kind == "fsdp2" else strategy_of(kind, 2),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            nl.ModelCheckpoint(
                monitor=None,
                dirpath=directory,
                filename="{step}",
                every_n_train_steps=2,
                save_last=False,
                verbose=False,
            ),
            EMA(0.5),
            *keep,
        ],
    )
    nl.AutoResume(resume_from_path=load or None).setup(trainer)
    trainer.fit(Model(), DataLoader(ToyData(), batch_size=BATCH, shuffle=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("url")
    parser.add_argument("--beside", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    out, url, beside = options.directory, options.url, options.beside

    def kept(name: str, at: str) -> Keep:
        return Keep(out / f"{name}.pt", at)

    fit(str(out / "local"), 2, [kept("two-steps", "end")])
    fit(f"{url}/a", 3, [kept("three-steps", "end")], beside=beside)
    fit(f"{url}/b", 3, [kept("resumed", "start"), kept("went-on", "end")], f"{url}/a/step=2", beside=beside)
    fit(f"{url}/c", 4, [kept("tensor-parallel", "start")], f"{url}/a/step=3", kind="tp2", beside=beside)


if __name__ == "__main__":
    main()
