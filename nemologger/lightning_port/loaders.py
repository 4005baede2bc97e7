"""The loaders that a fit trains from, and what it has taken of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.data import _auto_add_worker_init_fn, _set_sampler_epoch
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.strategies import ModelParallelStrategy

if TYPE_CHECKING:
    import lightning.pytorch as pl


def wrap_training_loaders(trainer: pl.Trainer, wrap: Callable[[object], object]) -> Callable[[], None]:
    """Let the fit loop have ``wrap(loader)`` for each of its loaders, and return what undoes that.

    ``wrap`` sees them as they will be iterated over: with a distributed sampler, if Lightning has put one in.
    """
    return _process_loaders(trainer, lambda loader: wrap(loader) if trainer.training else loader)


def see_loaders(trainer: pl.Trainer, see: Callable[[Any], None]) -> Callable[[], None]:
    """Have ``see(loader)`` called for each loader before it is iterated over, and return what undoes that."""

    def process(loader: object) -> object:
        _auto_add_worker_init_fn(loader, trainer.global_rank)  # Lightning does so next, where there is none
        see(loader)
        return loader

    return _process_loaders(trainer, process)


def _process_loaders(trainer: pl.Trainer, process: Callable[[object], object]) -> Callable[[], None]:
    strategy = trainer.strategy
    inner = strategy.process_dataloader
    strategy.process_dataloader = lambda dataloader: process(inner(dataloader))  # type: ignore[method-assign]
    return lambda: strategy.__dict__.pop("process_dataloader", None)


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """The fit's loaders of validation, in a flat list; empty before they are made."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else combined.flattened


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """The loaders of the fit loop, in a flat list; empty before they are made."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def trains_from(trainer: pl.Trainer, batches: object) -> bool:
    """Whether ``batches`` is an iterator that the fit loop takes its batches from, rather than somebody else."""
    combined = trainer.fit_loop._combined_loader
    own = None if combined is None else combined._iterator
    return own is not None and any(iterator is batches for iterator in own.iterators)


def data_reader(trainer: pl.Trainer) -> tuple[int, int]:
    """Which of how many different streams of training data this rank sees; tensor-parallel ranks see the same one."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return trainer.global_rank, trainer.world_size
    mesh = trainer.strategy.device_mesh["data_parallel"]
    return mesh.get_local_rank(), mesh.size()


def fetches_ahead(trainer: pl.Trainer) -> bool:
    """Whether the fit loop takes a batch before it trains on the one before, to know which one is the last."""
    fetcher = trainer.fit_loop._data_fetcher
    return isinstance(fetcher, _PrefetchDataFetcher) and fetcher.length is None


def fetched(trainer: pl.Trainer) -> int:
    """How many batches of this epoch the fit loop has taken."""
    fetcher = trainer.fit_loop._data_fetcher
    return 0 if fetcher is None else fetcher.fetched


def watch_fetches(trainer: pl.Trainer, began: Callable[[], None], ended: Callable[[], None]) -> None:
    """For ``on_train_batch_start``: have ``began()`` and ``ended()`` called around each later fetch of this epoch.

    Lightning calls its profiler there, and forgets what was put in its place when the next epoch begins.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    if fetcher is None:
        return
    start, stop = fetcher._start_profiler, fetcher._stop_profiler

    def start_both() -> None:
        start()
        began()

    def stop_both() -> None:
        ended()
        stop()

    fetcher._start_profiler, fetcher._stop_profiler = start_both, stop_both


def fetch_again(trainer: pl.Trainer) -> None:
    """Drop batches taken in advance, and begin again."""
    if trainer.fit_loop._data_fetcher is not None:
        iter(trainer.fit_loop._data_fetcher)


def will_reload(trainer: pl.Trainer) -> bool:
    """For ``on_train_start``: whether Lightning makes the loaders anew before the first batch."""
    return bool(trainer.fit_loop._should_reload_train_dl)


def reloads(trainer: pl.Trainer) -> bool:
    """Whether Lightning makes the loaders anew after some epochs."""
    return trainer.reload_dataloaders_every_n_epochs > 0  # type: ignore[attr-defined, no-any-return]  # a connector's


def has_taken_of_new_loaders(trainer: pl.Trainer) -> bool:
    """For ``on_train_epoch_start``: whether a batch of loaders made for this epoch came before the hooks that begin it.

    In the first epoch of a resumed run Lightning leaves it at that; in others it takes that batch once more behind them.
    """
    fit_loop: Any = trainer.fit_loop
    left = fit_loop.epoch_loop.restarting or getattr(fit_loop, "is_resuming", False)
    epoch = trainer.current_epoch
    return bool(left and epoch > 0 and fit_loop._last_train_dl_reload_epoch == epoch)


def tell_samplers_the_epoch(trainer: pl.Trainer) -> None:
    """For ``on_train_epoch_start``: what Lightning has told them before it, if they have been set back since."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    for loader in training_loaders(trainer):
        _set_sampler_epoch(loader, progress.processed)


def saved_batches(checkpoint: dict[str, Any]) -> int:
    """How many batches of its epoch ``checkpoint`` was saved after; 0 if they were all."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    return 0 if progress is None or progress.get("is_last_batch") else int(progress["current"]["ready"])


def rescale_saved_batches(checkpoint: dict[str, Any], numerator: int, denominator: int) -> None:
    """Count batches as another number of ranks would have after as many samples."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is not None:
        current = progress["current"]
        more = current["ready"] * numerator // denominator - current["ready"]
        # The batch that was ending is one batch still.
        progress["current"] = {key: value + more for key, value in current.items()}


def drop_loader_states(checkpoint: dict[str, Any]) -> None:
    """Leave what Lightning knows of loaders out of ``checkpoint``: it is rank 0's only."""
    checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).pop("combined_loader", None)


def last_reload_epoch(trainer: pl.Trainer) -> float:
    """The epoch that the training loaders were made in."""
    return trainer.fit_loop._last_train_dl_reload_epoch


def set_last_reload_epoch(trainer: pl.Trainer, epoch: float) -> None:
    """Let the loaders be made again when they would be if this fit had made them in ``epoch``."""
    trainer.fit_loop._last_train_dl_reload_epoch = epoch


def data_module(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """What the running fit gets its loaders from, if it is one."""
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]  # set by a connector
