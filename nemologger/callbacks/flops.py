"""How many floating point operations a second training does, counted and not guessed from a formula per model."""

from __future__ import annotations

import logging
import sys
import time
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from nemologger import lightning_port
from nemologger.condition import holds
from nemologger.context.mixin import IOMixin
from nemologger.errors import ConfigurationError

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

METRIC = "tflops_per_sec_per_gpu"


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    shapes = (tensor.shape for tensor in (gradient, query, key, value))
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _recurrent(given: Any, *weights: Any, **kwargs: Any) -> int:
    """Of an LSTM, GRU or RNN that is one operator: each of its matrices is used once for each element of each sequence."""
    # The weights are a list, or the next four arguments, and biases are among them.
    tensors = weights[0] if isinstance(weights[0], list | tuple) else weights[:4]
    elements = sum(tensor.numel() for tensor in tensors if tensor.dim() == 2)
    return int(2 * elements * (given.numel() // given.shape[-1]))


def _recurrent_backward(given: Any, *weights: Any, **kwargs: Any) -> int:
    return 2 * _recurrent(given, *weights)  # for the gradient of what came in, and for that of the matrices


# torch has no formula for recurrent networks that are one operator, as oneDNN (on the CPU) and cuDNN run them.
_RECURRENT = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    torch.ops.aten._cudnn_rnn: _recurrent,  # noqa: SLF001  an operator's name
    torch.ops.aten._cudnn_rnn_backward: _recurrent_backward,  # noqa: SLF001
    torch.ops.aten.miopen_rnn: _recurrent,
    torch.ops.aten.miopen_rnn_backward: _recurrent_backward,
}
# What multiplies matrices too, and would be left out without a word.
_WITHOUT_FORMULA = {
    torch.ops.aten._trilinear,  # noqa: SLF001
    torch.ops.aten._grouped_mm,  # noqa: SLF001
    torch.ops.aten._scaled_grouped_mm,  # noqa: SLF001
}
# torch counts attention on CUDA; on the CPU it is another operator, with the same arguments.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001  an operator's name
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by torch's formulas, and stays out of the way of all else.

    torch's own ``FlopCounterMode`` refuses operators that take functions (``flex_attention``, ``map``) and some with nested
    tensors, runs both branches of ``cond``, counts products of sharded tensors as one device's, and has ``torch.compile``
    run what it meets for the first time uncompiled, then and ever after.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._formulas = {**flop_registry, **_ON_CPU, **_RECURRENT}
        self._compiled = _compiled_graphs()
        self.total = 0
        self.uncounted: dict[str, str] = {}

    @property
    def has_compiled(self) -> bool:
        """Whether ``torch.compile`` has compiled something since."""
        return _compiled_graphs() != self._compiled

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let ``torch.compile`` compile while this counts. What the compiled code calls is still seen."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count it."""
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            self.uncounted[str(func)] = "it takes functions as arguments"
            return func(*args, **kwargs)
        if FakeTensor in types:  # nothing is computed, only how it would be sharded
            return func(*args, **kwargs)
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # tensors made of others, sharded or nested: what is done with those comes here, too
        packet = func.overloadpacket
        formula = self._formulas.get(packet)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # in inference mode, matrix products may be inside
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in _WITHOUT_FORMULA:
            self.uncounted[str(packet)] = "there is no formula for it"
        if formula is not None:
            try:
                self.total += int(formula(*args, **kwargs, out_val=out))
            except Exception as error:  # noqa: BLE001  the formula does not know these arguments
                self.uncounted[str(packet)] = f"{type(error).__name__}: {error}"
        return out


class FLOPsMeasurement(IOMixin, Callback):
    """Logs ``tflops_per_sec_per_gpu``: trillions of floating point operations per second and device (or CPU process).

    The operations of the first training batch of this process, forward and backward, are counted with
    ``torch.utils.flop_counter`` (matrix products, convolutions, attention) and for recurrent layers; every later batch
    is taken to need as many. The time is that of the wall clock without validation: waiting for data, the optimizer and
    saving are in it, the first batch is not. Counting neither draws random numbers nor changes a result, so a resumed
    run counts its first batch again.

    A compiled model is not counted: the products that its kernels contain cannot be seen. Give ``flops_per_batch`` for it.
    The same is true of the compiled parts of a model that is not compiled as a whole, and of operators that take functions,
    such as ``flex_attention``; they are left out, with a warning.

    Args:
        log_every_n_steps: Log the average over so many steps; default the trainer's own ``log_every_n_steps``, which is
            also how often Lightning hands metrics to loggers.
        flops_per_batch: Operations of one batch, forward and backward, on one device, instead of counting.

    Raises:
        ConfigurationError: If an argument has a value that cannot work.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> flops = FLOPsMeasurement(log_every_n_steps=2)
        >>> trainer = Trainer(callbacks=[flops], max_steps=4, limit_val_batches=0, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())  # one layer: 1 row times 32 x 2 weights, forward, and again for their gradient
        >>> flops.flops_per_batch
        256
        >>> trainer.callback_metrics["tflops_per_sec_per_gpu"] > 0
        tensor(True)
    """

    def __init__(self, log_every_n_steps: int | None = None, flops_per_batch: float | None = None) -> None:
        if log_every_n_steps is not None and not holds(lambda: index(log_every_n_steps) >= 1):
            raise ConfigurationError(
                f"FLOPsMeasurement(log_every_n_steps={log_every_n_steps!r}): it must be a whole number, at least 1, or None"
            )
        if flops_per_batch is not None and not holds(lambda: flops_per_batch > 0):
            raise ConfigurationError(
                f"FLOPsMeasurement(flops_per_batch={flops_per_batch!r}): it must be a number, more than 0, or None to count"
            )
        self.log_every_n_steps = log_every_n_steps
        self.flops_per_batch = flops_per_batch
        self._given = flops_per_batch is not None
        self._counter: _Counter | None = None
        self._every = 0
        self._batches = 0
        self._since: float | None = None
        self._validating_since = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Say what will not be seen."""
        if stage != "fit":
            return
        own, trainers = self.log_every_n_steps, int(trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._every = own or trainers
        if own and trainers and trainer.loggers and trainers % own:
            log.warning(
                "FLOPsMeasurement(log_every_n_steps=%d): loggers get what falls on a multiple of %d, the trainer's own "
                "log_every_n_steps",
                own,
                trainers,
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to measure; count the first batch."""
        self._batches, self._since = 0, None
        if self._given:
            return
        self.flops_per_batch = None
        if _is_compiled(pl_module):
            self._every = 0
            log.warning(
                "%s is not measured: the model is compiled, and the products that its kernels contain cannot be counted. "
                "Give FLOPsMeasurement(flops_per_batch=...)",
                METRIC,
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the operations from here on, once."""
        self._stop_counting()  # the batch before may have been left out
        if self.flops_per_batch is None and self._every:
            self._counter = _Counter()
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Forward and backward are done, if Lightning runs them; some optimizers multiply matrices, too."""
        if self._counter is not None and pl_module.automatic_optimization:
            self.flops_per_batch = self._stop_counting()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is due."""
        if not self._every:
            return
        if self._counter is not None:
            self.flops_per_batch = self._stop_counting()
        if self._since is None:  # the first batch takes longer: it is counted, memory is allocated, kernels are chosen
            if not self.flops_per_batch:
                self._every = 0
                log.warning("%s is not measured: no operation of the first batch is one that torch can count", METRIC)
            self._since = _now(trainer)
            return
        self._batches += 1
        if not lightning_port.log_is_due(trainer, self._every):
            return
        now = _now(trainer)
        value = float(self.flops_per_batch or 0) * self._batches / max(now - self._since, 1e-9) / 1e12
        pl_module.log(METRIC, value, batch_size=1)
        self._batches, self._since = 0, now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._validating_since = _now(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let it go on."""
        if self._since is not None:
            self._since += _now(trainer) - self._validating_since

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave torch as it was, if the model has left the batch out."""
        self._stop_counting()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave torch as it was."""
        self._stop_counting()

    def _stop_counting(self) -> int | None:
        counter, self._counter = self._counter, None
        if counter is None:
            return None
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for operator, why in counter.uncounted.items():
            log.warning("%s leaves out the operator %s, which torch could not count: %s", METRIC, operator, why)
        if counter.has_compiled:
            log.warning(
                "%s may be too low: part of the first batch is compiled, where not all operators can be seen. "
                "Give FLOPsMeasurement(flops_per_batch=...)",
                METRIC,
            )
        return counter.total


def _now(trainer: pl.Trainer) -> float:
    """Seconds, when the device has done all that it was told."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _compiled_graphs() -> int:
    """How many graphs ``torch.compile`` has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # nothing is compiled where nobody has imported it
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def _is_compiled(module: pl.LightningModule) -> bool:
    return getattr(module, "_compiler_ctx", None) is not None or any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
