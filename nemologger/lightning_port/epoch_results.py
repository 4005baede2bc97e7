"""What has been logged for the epoch so far, and what the metrics of torchmetrics have counted: Lightning saves neither.

It has torchmetrics' own names, too: its metrics keep what they have counted in attributes without public ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torchmetrics import Metric, SumMetric
from torchmetrics.wrappers import MetricTracker
from typing_extensions import override

if TYPE_CHECKING:
    import lightning.pytorch as pl

_OPTIONS = (
    "fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx",
    "metric_attribute",
)  # fmt: skip


Counters = Mapping[str, Mapping[str, Any]]
_NONE: Mapping[str, Metric] = {}
#: Before the paths of metrics that are no parts of the module.
_APART = "apart: "

#: What each metric has.
_OF_METRICS = frozenset(vars(SumMetric()))


class _Saved(_Metadata):
    """Options of ``self.log()`` from a checkpoint, until the program gives its own.

    Lightning compares the two before it goes on with what was logged. A program that sums up otherwise today, or logs a
    metric in place of a number, begins anew.
    """

    results: dict[str, _ResultMetric]
    key: str

    @override
    def __eq__(self, given: object) -> bool:
        if isinstance(given, _Metadata):
            if _way(given) == _way(self):
                self.results[self.key].meta = given
            else:
                self.results[self.key] = _ResultMetric(given, is_tensor=given.metric_attribute is None)
        return True

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Saved:
        return self  # Lightning makes copies of options when it moves what was logged to a device


def _way(meta: _Metadata) -> tuple[Any, ...]:
    """What a value for the epoch is made of, and how."""
    return meta.metric_attribute, meta.metric_attribute is None and meta.reduce_fx.__name__, meta.on_epoch


def counters(trainer: pl.Trainer) -> Counters:
    """What metrics that wrap others (Running, MinMaxMetric) count beside what they say is their state, by name."""
    named = trainer.lightning_module.named_modules()
    return {name: _kept_counters(metric) for name, metric in named if isinstance(metric, Metric)}


def take(
    trainer: pl.Trainer, most: int, first: Counters, apart: Mapping[str, Metric] = _NONE
) -> tuple[dict[str, Any], dict[str, str]]:
    """This rank's, as plain types, for :func:`restore`.

    Args:
        trainer: Between two batches of a fit.
        most: Bytes that they may take.
        first: What :func:`counters` returned when training began: what is still so, the program gives.
        apart: Metrics that the program holds elsewhere than in the module, by path.

    Returns:
        The values, and by name why a metric is not among them.
    """
    results = trainer.fit_loop.epoch_loop._results
    values = {key: _of_result(result) for key, result in results.items() if not result.has_reset}
    # After this validation Lightning resets them, and they those that they wrap.
    of_validation = [result.value for result in trainer.fit_loop.epoch_loop.val_loop._results.values()]
    reset_soon = {id(part) for value in of_validation if isinstance(value, Metric) for part in value.modules()}
    metrics: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for name, metric in _metrics(trainer, apart).items():
        changed = _changed(metric, first.get(name, {}))
        if not changed and (id(metric) in reset_soon or not metric._update_count):
            continue
        if id(metric) in reset_soon:
            metric = deepcopy(metric)  # some counters outlive that
            metric.reset()
        parts = [part for state in metric.metric_state.values() for part in _parts(state)]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            lost[name] = "has a state that is no tensor"
            continue
        most -= sum(part.nbytes for part in parts)
        if most < 0:
            lost[name] = "is too large"
            continue
        metrics[name] = {
            "updates": metric._update_count,
            "state": {field: _kept(state) for field, state in metric.metric_state.items()},
            "counters": _changed(metric, first.get(name, {})),
        }
    return {"values": values, "metrics": metrics, "tracked": {name: len(one) for name, one in _trackers(trainer)}}, lost


def _metrics(trainer: pl.Trainer, apart: Mapping[str, Metric]) -> dict[str, Metric]:
    named = trainer.lightning_module.named_modules()
    of_module = {name: metric for name, metric in named if isinstance(metric, Metric)}
    return of_module | {f"{_APART}{path}": metric for path, metric in apart.items()}


def _trackers(trainer: pl.Trainer) -> list[tuple[str, MetricTracker]]:
    """Those that have a metric of its own for each epoch, say: the list of them grows."""
    return [(name, one) for name, one in trainer.lightning_module.named_modules() if isinstance(one, MetricTracker)]


def _kept_counters(metric: Metric) -> dict[str, Any]:
    fields = vars(metric).items()
    own = {field: value for field, value in fields if field not in _OF_METRICS and field not in metric._defaults}
    return {
        field: _kept(value) if isinstance(value, torch.Tensor) else value
        for field, value in own.items()
        if isinstance(value, int | float | torch.Tensor)
    }


def _changed(metric: Metric, first: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _kept_counters(metric).items() if not _is_same(value, first.get(name))}


def _is_same(value: Any, first: Any) -> bool:
    if isinstance(value, torch.Tensor) and isinstance(first, torch.Tensor):
        return value.shape == first.shape and bool((value == first).all())
    return type(value) is type(first) and bool(value == first)


def _of_result(result: _ResultMetric) -> dict[str, Any]:
    meta = result.meta
    return {
        "options": {name: getattr(meta, name) for name in _OPTIONS},
        "reduce": meta.reduce_fx.__name__,
        "sync": (meta.sync.should, meta.sync.rank_zero_only),
        "state": {name: _kept(getattr(result, name)) for name in result._defaults} if result.is_tensor else None,
        "forward": _kept(result._forward_cache) if isinstance(result._forward_cache, torch.Tensor) else None,
    }


def _parts(state: Any) -> list[torch.Tensor]:
    return state if isinstance(state, list) else [state]


def _kept(state: Any) -> Any:
    kept = [part.detach().to("cpu", copy=True) for part in _parts(state)]
    return kept if isinstance(state, list) else kept[0]


def restore(trainer: pl.Trainer, plain: dict[str, Any], apart: Mapping[str, Metric] = _NONE) -> None:
    """For ``on_train_start``: go on from what :func:`take` returned."""
    for name, tracker in _trackers(trainer):
        for _ in range(len(tracker), plain.get("tracked", {}).get(name, 0)):
            tracker.increment()
    metrics = _metrics(trainer, apart)
    for name, metric in metrics.items():
        saved = plain["metrics"].get(name)
        if saved is not None and set(saved["state"]) == set(metric._defaults):
            _restore_metric(metric, saved)
    results = trainer.fit_loop.epoch_loop._results
    for key, saved in plain["values"].items():
        wrapped = metrics.get(saved["options"]["metric_attribute"])
        if saved["state"] is not None or wrapped is not None:
            meta = _Saved(**saved["options"], reduce_fx=saved["reduce"])
            meta.results, meta.key = results, key
            should, rank_zero_only = saved["sync"]
            meta.sync = _Sync(fn=trainer.strategy.reduce, _should=should, rank_zero_only=rank_zero_only)
            results[key] = _result_of(meta, saved, wrapped).to(trainer.strategy.root_device)
    if plain["values"]:
        # With the first batch of an epoch Lightning begins to count anew: the next one is not the first.
        trainer._logger_connector._first_loop_iter = True


def _restore_metric(metric: Metric, saved: Mapping[str, Any]) -> None:
    for field, state in saved["state"].items():
        parts = [part.to(metric.device) for part in _parts(state)]
        setattr(metric, field, parts if isinstance(state, list) else parts[0])
    for field, value in saved.get("counters", {}).items():
        if field in _kept_counters(metric):
            setattr(metric, field, value.to(metric.device) if isinstance(value, torch.Tensor) else value)
    metric._update_count, metric._computed = saved["updates"], None


def _result_of(meta: _Saved, saved: Mapping[str, Any], wrapped: Metric | None) -> _ResultMetric:
    """What :func:`_of_result` was given: what a number comes to in an epoch, or a metric of the module."""
    result = _ResultMetric(meta, is_tensor=saved["state"] is not None)
    for field, state in ({"value": wrapped} if saved["state"] is None else saved["state"]).items():
        setattr(result, field, state)
    result._forward_cache, result._update_count = saved["forward"], 1
    return result
