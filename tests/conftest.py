"""What every test gets: quiet threads, and a check that it leaves nothing behind."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
import warnings

import pytest
import torch
from helpers.s3 import s3, s3_client, s3_server  # noqa: F401  fixtures
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Machines that test are slow and busy; and the same commit gets the same answer.
settings.register_profile("ours", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ours")

# By itself W&B gives up when its process has not started within 30 s.
os.environ.setdefault("WANDB__SERVICE_WAIT", "240")
os.environ.setdefault("WANDB_INIT_TIMEOUT", "240")

# Lightning and torch set these when processes start; they are theirs, and harmless to the next test.
_NOT_OURS = {
    "PYTEST_CURRENT_TEST",
    "CUDA_DEVICE_ORDER",
    "CUDA_MODULE_LOADING",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "WANDB_SERVICE",
    "WANDB__SERVICE_WAIT",
    "_WANDB_STARTUP_DEBUG",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TF_CPP_MIN_LOG_LEVEL",
}

#: Files that take long, the longest first: begun last, one of them keeps the run waiting when all others are done.
_LONG = (
    "test_object_stores", "test_kill", "test_resumed_run", "test_simulated_cuda", "test_failing_rank",
    "test_states_in_stores", "test_sweeps", "test_preemption", "test_fault_tolerance", "test_ddp", "test_byte_gpt",
    "test_loaders", "test_training", "test_check_resume", "test_nemo_sweep", "test_migrate", "test_sharded",
    "test_workers", "test_straggler_detection", "test_trackers", "test_ema", "test_max_time", "test_sharded_averages",
    "test_async_save", "test_module_hooks", "test_logger_ranks", "test_profiles", "test_clearml", "test_staging",
    "test_sharded_models", "test_outages", "test_uploads", "test_two_ranks", "test_digits", "test_recipe_sweep",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist begin files in our order, and not those with the most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file alone, so that each stays in one piece."""
    places = {f"{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="session")
def what_nobody_removes_goes_at_the_end(tmp_path_factory):
    """The temporary directory of all processes is ours: torchrun, trackers, and who is killed, leave things there.

    Its name is short: there are sockets among them, whose paths may not be long.
    """
    tmp_path_factory.getbasetemp()  # pytest's stays where it is, for who looks at a test that failed
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="tests-", ignore_cleanup_errors=True) as directory,
    ):
        os.chmod(directory, 0o711)  # some tests look as another user
        patch.setenv("TMPDIR", directory)
        patch.setenv("WANDB_CACHE_DIR", directory)  # by itself it leaves logs in the home directory
        patch.setattr(tempfile, "tempdir", directory)
        yield


@pytest.fixture(autouse=True)
def works_in_an_empty_directory(tmp_path_factory, monkeypatch):
    """What a test, or Lightning, writes without being told where goes there."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


class Clock:
    """Goes on for those who sleep by it alone: what is measured is the same on a machine that is slow, or busy."""

    def __init__(self) -> None:
        self._now = 0.0

    def sleep(self, seconds: float) -> None:
        self._now += seconds

    def perf_counter(self) -> float:
        return self._now

    monotonic = perf_counter


@pytest.fixture
def clock(request, monkeypatch):
    """The ``time`` of the test's module and of those of ours that measure."""
    measuring = ("watch.own_time", "callbacks.step_timer", "callbacks.flops", "callbacks.straggler_detection")
    clock = Clock()
    monkeypatch.setattr(request.module, "time", clock)
    for name in measuring:
        monkeypatch.setattr(f"nemologger.{name}.time", clock)


@pytest.fixture
def quiet_loaders():
    """Without what Lightning says of loaders as small as those of tests."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*logging interval.*")
        yield


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail a test that leaves a thread, a process, a process group, an environment variable, or a change of logging."""
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_OURS}
    threads = set(threading.enumerate())
    handlers, levels = _handlers(), _levels()
    yield
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.teardown()  # it keeps the settings of who used it first, WANDB_MODE for example
    after = {key: value for key, value in os.environ.items() if key not in _NOT_OURS}
    assert after == environment, "environment variables changed"
    leaked = [t for t in set(threading.enumerate()) - threads if not t.daemon]
    for ending in (*leaked, *multiprocessing.active_children()):
        ending.join(10)  # on a busy machine it takes its time
    leaked = [t for t in leaked if t.is_alive()]
    assert not leaked, f"threads still running: {leaked}"
    assert not torch.distributed.is_initialized(), "a process group is still there"
    assert not multiprocessing.active_children(), "child processes still running"
    if _handlers() != handlers:
        gc.collect()  # a trainer that was set up, but never ran, takes its handlers with it
    assert _handlers() == handlers, "log handlers still attached"
    assert _levels() == levels, "log levels or filters are not what they were"


def _handlers() -> set[tuple[str, int]]:
    return {(logger.name, id(h)) for logger in _loggers() for h in logger.handlers if _writes_files(h)}


def _levels() -> set[tuple[str, object]]:
    """Levels of the root logger and ours, which of ours are off, and our filters on handlers that stay, as pytest's do."""
    loggers = [logger for logger in _loggers() if logger.name.partition(".")[0] in ("root", "nemologger")]
    filters = {("filter", id(f)) for h in logging.getLogger().handlers for f in h.filters if _is_ours(f)}
    off = {("off", logger.name) for logger in loggers if logger.disabled}
    return {(logger.name, logger.level) for logger in loggers if logger.level} | filters | off


def _loggers() -> list[logging.Logger]:
    return [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]


def _writes_files(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.FileHandler) or _is_ours(handler)


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("nemologger")
