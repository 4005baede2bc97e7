"""All ranks log to one run directory, each to files of its own."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from processes import free_port, python

AGENT = Path(__file__).with_name("agent.py")
DATED = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?")

SCRIPT = """
    import json, logging, os, signal, sys
    from pathlib import Path
    import lightning.pytorch as pl, torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset
    from nemologger.errors import NemologgerError
    from nemologger.logger import NeMoLogger
    from nemologger.run.record import run_of

    torch.set_num_threads(1)

    class Tiny(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
        def training_step(self, batch, index):
            logging.getLogger("mine").info("rank %d trains", self.global_rank)
            if "fails" in sys.argv and self.global_rank:
                raise RuntimeError("boom")
            if "interrupts" in sys.argv and self.global_rank:
                os.kill(os.getppid(), signal.SIGINT)
            return self.layer(batch[0]).mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    def say(line):
        sys.stdout.write(line + chr(10))  # at once: the other rank writes to the same pipe
        sys.stdout.flush()

    base, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    alone = settings.pop("only rank 0 saves", False)
    runs = []
    for name in ("a", "b"):
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=settings.pop("strategy", "ddp"), max_steps=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=not alone,
        )
        ckpt = None if alone and trainer.global_rank else ModelCheckpoint()
        try:
            run = NeMoLogger(name=name, log_dir=base, ckpt=ckpt, **settings).setup(trainer)
        except NemologgerError as error:
            say(f"REFUSED {trainer.global_rank} {type(error).__name__}")
            sys.exit(3)
        trainer.fit(Tiny(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
        assert run_of(trainer) is run
        say(f"RUN {trainer.global_rank} {name} {run.log_dir}")
        if "once" in sys.argv:
            break
"""


def launch(
    directory: Path, *, torchrun: bool, settings: str = "{}", extra: tuple[str, ...] = (), restarts: int = 0
) -> tuple[int, str]:
    script = directory / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    options = ["--nproc-per-node=2", f"--max-restarts={restarts}", f"--master-port={free_port()}"]
    start = [AGENT, *options, script] if torchrun else [script]
    done = python(*start, directory / "base", settings, *extra, check=False, timeout=200)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.dist
@pytest.mark.parametrize("torchrun", [True, False])
def test_all_ranks_get_one_directory_for_each_of_two_runs(tmp_path, torchrun):
    settings = json.dumps({"files_to_copy": [str(tmp_path / "script.py")]})
    code, output = launch(tmp_path, torchrun=torchrun, settings=settings, restarts=1)
    assert code == 0, output
    found = re.findall(r"RUN (\d) (\w) (\S+)", output)
    assert sorted((rank, name) for rank, name, _ in found) == [("0", "a"), ("0", "b"), ("1", "a"), ("1", "b")]
    for name in "ab":
        (directory,) = {Path(path) for _, of, path in found if of == name}
        assert DATED.fullmatch(directory.name)
        assert [path.name for path in directory.parent.iterdir()] == [directory.name]
        for rank in (0, 1):
            text = (directory / f"nemo_log_globalrank-{rank}_localrank-{rank}.txt").read_text()
            assert f"rank {rank} trains" in text
            assert f"rank {1 - rank} trains" not in text
            # Of the kind that test_restarts.py is about.
            assert text.count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == (torchrun and rank == 0)
        assert len([*(directory / "checkpoints").iterdir()]) == 1
        assert (directory / "script.py").read_text() == (tmp_path / "script.py").read_text()


@pytest.mark.dist
def test_processes_that_lightning_forks_have_files_of_their_own(tmp_path):
    code, output = launch(tmp_path, torchrun=False, settings='{"strategy": "ddp_fork"}', extra=("once",))
    assert code == 0, output
    (directory,) = (tmp_path / "base" / "a").iterdir()
    for rank in (0, 1):
        text = (directory / f"nemo_log_globalrank-{rank}_localrank-{rank}.txt").read_text()
        assert text.count("trains") == text.count(f"rank {rank} trains") == 1


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "told"), [("fails", "by ProcessRaisedException"), ("interrupts", "by KeyboardInterrupt")]
)
def test_what_ends_processes_that_lightning_forks_is_in_the_log(tmp_path, how, told):
    """The one that waits for them, of a notebook say, is told of it, and is at no step."""
    code, output = launch(tmp_path, torchrun=False, settings='{"strategy": "ddp_fork"}', extra=("once", how))
    assert code == 1, output
    (directory,) = (tmp_path / "base" / "a").iterdir()
    errors = (directory / "nemo_error_log.txt").read_text()
    assert f"stopped {told}" in errors
    assert ("boom" in errors) == (how == "fails")
    assert "rank 0 trains" in (directory / "nemo_log_globalrank-0_localrank-0.txt").read_text()


@pytest.mark.dist
def test_what_stops_rank_0_stops_every_rank(tmp_path):
    code, output = launch(tmp_path, torchrun=True, settings='{"files_to_copy": ["gone.yaml"]}')
    assert code != 0
    assert "REFUSED 0 NotFoundError" in output
    assert "REFUSED 1 NotFoundError" in output
    assert not (tmp_path / "base").exists()


@pytest.mark.dist
def test_a_checkpoint_callback_on_rank_0_alone_is_refused_by_all(tmp_path):
    """It would wait for the others to save with it, and they for it in their next step."""
    code, output = launch(tmp_path, torchrun=True, settings='{"only rank 0 saves": true}')
    assert code != 0
    assert "REFUSED 0 ConfigurationError" in output
    assert "REFUSED 1 ConfigurationError" in output
