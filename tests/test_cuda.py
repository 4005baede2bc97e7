"""On GPUs: ``pytest -m gpu``. What is exact on the CPU is exact there, with NCCL and with half precision."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from exact import ddp
from helpers.gpu import NEEDS_GPU, SIMULATED
from processes import torchrun
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from toy import ToyDataModule, ToyModel, quiet_trainer, tensors_of

import nemologger as nl
from nemologger import callbacks
from nemologger.callbacks import compare_steps
from nemologger.checkpoint.manifest import Manifest
from nemologger.checkpoint.reading.load import load_checkpoint
from nemologger.checkpoint.state.snapshot import take
from nemologger.checkpoint.writing.arena import Arena, Copy
from nemologger.checkpoint.writing.async_saver import AsyncSaver
from nemologger.checkpoint.writing.staging import Staging
from nemologger.disk import LocalDisk
from nemologger.exact import reduction
from nemologger.exact.rng import RngState
from nemologger.ranks import ProcessGroup, SingleProcess, together

pytestmark = NEEDS_GPU

SCRIPT = Path(ddp.__file__)
WIDTH = 512 if SIMULATED else 4096


class _Deep(nn.Module):
    """64 MB a layer: its copies take a while."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.register_buffer("calls", torch.zeros(WIDTH, WIDTH // 8))  # more than what is copied at once anyhow
        self.conv = nn.Conv2d(256, 256, 5).to(memory_format=torch.channels_last)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for layer in self.layers:
            batch = layer(batch)
        return batch


# --- copies beside training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["at_once", "overlapped"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1),  # no state: not one tensor is on the CPU
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.Adam(p, capturable=True),
    ],
    ids=["SGD", "fused", "foreach", "capturable"],
)
def test_what_is_saved_is_the_moment_of_the_save(tmp_path, mode, optimizer):
    module = _Deep().cuda()
    step = optimizer(module.parameters())
    batch = torch.randn(64, WIDTH, device="cuda")
    saver = AsyncSaver(LocalDisk(), SingleProcess(), staging=mode)

    def train() -> None:
        step.zero_grad()
        module(batch).pow(2).mean().backward()
        module.conv.weight.grad = torch.ones_like(module.conv.weight)
        step.step()

    def state() -> dict:
        return {"state_dict": module.state_dict(), "optimizer_states": [step.state_dict()]}

    try:
        train()
        for number in range(3):
            expected = [t.detach().clone() for t in tensors_of(state())]
            saver.start(take(state(), frozenset(dict(module.named_parameters()))), tmp_path / "a", Manifest(1, 0))
            train()
            train()
            assert saver.finish() is not None, number
            saved = list(tensors_of(load_checkpoint(tmp_path / "a")))
            assert len(saved) == len(expected)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(saved, expected, strict=True)), number
    finally:
        saver.close()


@pytest.mark.parametrize("mode", ["at_once", "overlapped"])
def test_a_save_behind_a_busy_device(tmp_path, mode):
    """What the device has yet to do is in the checkpoint; overlapped, the host does not wait for it."""
    module = _Deep().cuda()
    state = {"state_dict": module.state_dict()}
    with closing(AsyncSaver(LocalDisk(), SingleProcess(), staging=mode)) as saver:
        for number in (1.0, 2.0):  # memory is made, and pinned, for the first
            torch.cuda._sleep(3_000_000_000 if number == 2.0 else 0)  # cycles
            with torch.no_grad():
                for tensor in tensors_of(state):
                    tensor.fill_(number)
            saver.start(take(state, frozenset(dict(module.named_parameters()))), tmp_path / "a", Manifest(1, 0))
            busy = not torch.cuda.current_stream().query()
            assert saver.finish() is not None
            assert all((t == number).all() for t in tensors_of(load_checkpoint(tmp_path / "a"))), number
        assert busy == (mode == "overlapped")


class _NoMemory:
    """A place that is copied to by way of memory that there is not."""

    def copy_(self, source, **how):
        raise torch.OutOfMemoryError


def test_what_a_copy_that_fails_has_begun_is_waited_for():
    """The next save takes the same memory."""
    sources = [torch.full((WIDTH, WIDTH), 1.0, device="cuda") for _ in range(4)]
    targets = [torch.zeros(WIDTH, WIDTH, pin_memory=True) for _ in sources]
    copies = [Copy(f"{number}", *two) for number, two in enumerate(zip(targets, sources, strict=True))]
    copies.append(Copy("fails", _NoMemory(), sources[0]))
    for may_change in (set(), {copy.key for copy in copies}):  # beside, and before training goes on
        staging = Staging(copies, may_change)
        torch.cuda._sleep(200_000_000)
        with pytest.raises(torch.OutOfMemoryError):
            staging.begin()
        assert staging.give_up(60.0)
        assert all((target == 1.0).all() for target in targets)
        for target in targets:
            target.zero_()


def test_saves_go_on_where_memory_cannot_be_pinned(tmp_path, monkeypatch, caplog):
    def refuses() -> None:
        raise RuntimeError("CUDA error: out of memory")

    module = _Deep().cuda()
    with (
        closing(AsyncSaver(LocalDisk(), SingleProcess(), staging="overlapped")) as saver,
        monkeypatch.context() as patched,
    ):
        patched.setattr(torch.cuda, "cudart", refuses)
        saver.prepare(take({"state_dict": module.state_dict()}))
        for _ in range(2):
            saver.start(take({"state_dict": module.state_dict()}), tmp_path / "a", Manifest(1, 0))
            assert saver.finish() is not None
    assert caplog.text.count("could not be pinned (RuntimeError: CUDA error: out of memory)") == 1
    saved = load_checkpoint(tmp_path / "a")["state_dict"]
    assert all(torch.equal(saved[name], value.cpu()) for name, value in module.state_dict().items())


# --- ranks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nccl(tmp_path):
    """A group of one, as Lightning makes it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def test_beside_nccl(nccl):
    ranks = ProcessGroup()
    assert together(ranks, lambda: "here") == ["here"]
    assert ranks.largest([1.5]) == [1.5]
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).cuda()
    order = [name for name, _ in module.named_parameters()][::-1]
    model = DistributedDataParallel(module, device_ids=[0])
    seen = reduction.GradientOrder(model)
    reduction.play(model, order)
    assert seen.settle() == order
    model(torch.ones(1, 3, device="cuda")).sum().backward()
    assert torch.equal(module[1].bias.grad.cpu(), torch.ones(2))


@pytest.mark.parametrize("kind", ["plain", "FSDP"])
def test_the_memory_for_saves_is_pinned(nccl, kind):
    tensor = torch.zeros(4, device="cuda")
    if kind == "FSDP":
        tensor = ShardedTensor._init_from_local_shards([Shard.from_tensor_and_offsets(tensor, [0], 0)], 4)
    with closing(Arena({}, {"w": tensor})) as arena:
        arena.copies(lambda piece: torch.empty(piece.sizes))
        assert torch.frombuffer(arena.memory, dtype=torch.uint8).is_pinned()


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["GPU", "GPU, 16-mixed", "GPU, bf16-mixed", "GPU, FSDP2", "GPU, FSDP"])
def test_a_resumed_run_repeats_the_one_that_was_not_stopped(tmp_path, ranks, name):
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices")
    torchrun(SCRIPT, ranks, tmp_path, name, timeout=900)


class _Crash(pl.Callback):
    """Ends a run behind its checkpoint, when the device has computed all."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            raise RuntimeError("crash")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_resumed_run_compares_what_it_trains_again(tmp_path, monkeypatch, caplog, deterministic):
    def life(*more: pl.Callback) -> None:
        ckpt = nl.ModelCheckpoint(monitor=None, every_n_train_steps=5, dirpath=tmp_path, verbose=False)
        trainer = quiet_trainer(callbacks=[ckpt, *more], accelerator="gpu", max_steps=12, limit_val_batches=0)
        last = tmp_path / "epoch=0-step=5-last"
        trainer.fit(ToyModel(), ToyDataModule(), ckpt_path=last if last.exists() else None)

    caplog.set_level("INFO", logger=compare_steps.__name__)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    with monkeypatch.context() as patch:
        patch.setattr(compare_steps, "_LOOK_EVERY", -1)  # it looks at each step
        with pytest.raises(RuntimeError, match="crash"):
            life(_Crash())
    life()  # it looks once in a while
    assert "3 steps that had been trained before the run ended" in caplog.text
    assert ("are the same again, to the bit" in caplog.text) == deterministic


def test_random_numbers_of_the_device():
    device = torch.device("cuda", 0)
    state = RngState.capture(device)
    first = torch.rand(1000, device=device)
    RngState.from_plain(state.to_plain()).restore(device)
    assert torch.equal(torch.rand(1000, device=device), first)
    state.for_another_rank(1, device).restore(device)
    assert not torch.equal(torch.rand(1000, device=device), first)


@pytest.mark.parametrize("offload", [False, True])
def test_callbacks(tmp_path, offload):
    ema = callbacks.EMA(0.9, cpu_offload=offload)
    by_hand = _ByHand(0.9)
    trainer = quiet_trainer(
        accelerator="gpu",
        max_steps=12,
        default_root_dir=tmp_path,
        callbacks=[
            ema,
            by_hand,
            callbacks.TimingCallback(timer_kwargs={"sync_cuda": True}),
            callbacks.FLOPsMeasurement(log_every_n_steps=1),
            callbacks.StragglerDetection(report_time_interval=0.001),
            callbacks.MemoryProfileCallback(tmp_path / "memory", start_step=2, end_step=4),
            callbacks.NsysCallback(start_step=5, end_step=7),
        ],
    )
    trainer.fit(ToyModel(), ToyDataModule())
    assert {average.device.type for average in ema.averages.values()} == {"cpu" if offload else "cuda"}
    assert all(torch.equal(average.cpu(), by_hand.averages[name]) for name, average in ema.averages.items())
    assert trainer.callback_metrics["tflops_per_sec_per_gpu"] > 0
    written = sorted(path.name.split(".", 1)[1] for path in (tmp_path / "memory").iterdir())
    assert written == ["memory.csv", "snapshot.pickle", "trace.json.gz"]
    assert "cuda:0" in next((tmp_path / "memory").glob("*.csv")).read_text()


class _ByHand(pl.Callback):
    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module):
        self.averages = {name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, parameter in pl_module.named_parameters():
            self.averages[name] = self.averages[name] * self.decay + parameter.detach().cpu() * (1 - self.decay)
