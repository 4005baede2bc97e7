"""A script of NeMo 1 that searches hyperparameters: ``sweep_section.py --config-path=DIR --config-name=sweep -m``.

The environment says what a test wants of it beside that.
"""

from __future__ import annotations

import os

from nemologger import hydra_runner, sweep_job


def train(cfg):
    """What the script is for. Lightning is imported only now: where the sweep is started, nobody needs it."""
    import lightning.pytorch as pl
    import torch
    from sweep_model import SteppedModel
    from toy import ToyDataModule

    from nemologger.exp_manager import clean_exp_ckpt, exp_manager

    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 3 and os.environ.get("CRASH_IN") == str(sweep_job() and sweep_job().name):
                raise RuntimeError("the third step was too much")

    torch.set_num_threads(1)
    model = SteppedModel(cfg.model.optim.lr, cfg.model.encoder.dim)
    model.net.insert(2, torch.nn.Dropout(cfg.model.decoder.dropout))
    trainer = pl.Trainer(**cfg.trainer, callbacks=[Crash()], enable_progress_bar=False, enable_model_summary=False)
    exp_log_dir = exp_manager(trainer, cfg.get("exp_manager", None))
    trainer.fit(model, datamodule=ToyDataModule())
    clean_exp_ckpt(exp_log_dir, remove_ckpt="CLEAN" in os.environ, remove_nemo=False)
    return f"{trainer.global_step} steps on GPU {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"


@hydra_runner(config_path="../fixtures/exp_manager", config_name="sweep")
def main(cfg):
    if "DIARY" in os.environ:
        with open(os.environ["DIARY"], "a") as file:
            file.write(f"{sweep_job().name} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getppid()}\n")
        return cfg.exp_manager.name
    return train(cfg)


if __name__ == "__main__":
    main()
