"""Averages of a model's parameters: of each what this rank has of it, which is all, or a shard.

With FSDP2 and tensor parallelism a parameter is a ``DTensor``, and so is its average, with the same placements. FSDP lets
each rank hold a run of the elements of several parameters: there an average is a plain tensor, which only FSDP itself can
make shards of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FlatParameter

from nemologger import sharded_state
from nemologger.checkpoint.reading.load import load_model, load_parts
from nemologger.checkpoint.state.shards import is_sharded, local, part_here
from nemologger.checkpoint.state.snapshot import MODEL
from nemologger.errors import ConfigurationError, ModelMismatchError

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as pl
    from lightning.pytorch.strategies import Strategy

_CHUNK = 64 << 20
_IN_CACHE = 1 << 16


class Averages:
    """Averages, the parameters that they are of, and what those were before they were exchanged for them.

    Args:
        decay: How much of an average stays in each update.
        cpu_offload: Keep them in the memory of the CPU.

    Attributes:
        values: The averages by parameter name.
    """

    def __init__(self, decay: float, *, cpu_offload: bool) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self._decay = decay
        self._cpu_offload = cpu_offload
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._chunks: list[list[str]] = []
        self._originals: dict[str, torch.Tensor] = {}  # while the model has the averages
        self._exchanged: dict[str, Any] = {}  # FSDP's shards of what it has not, while a checkpoint is made

    # --- training -------------------------------------------------------------------------------------------------

    def attach(self, strategy: Strategy, *, fresh: bool) -> None:
        """Average the parameters of ``strategy``'s model from now on; from their values of now if ``fresh``.

        Raises:
            ConfigurationError: If FSDP could not make shards of their averages.
        """
        self.give_back(strategy)
        self._parameters = sharded_state.parameters(strategy)
        if sharded_state.flattened(strategy) is not None:
            _check_flattened(self._parameters)
        if fresh:
            self.values = {}
        self.track()

    @property
    def are_complete(self) -> bool:
        """Whether all parameters that are trained have one."""
        return all(name in self.values for name, parameter in self._parameters.items() if parameter.requires_grad)

    def track(self, names: frozenset[str] = frozenset()) -> None:
        """Keep an average of every parameter that is trained, and of ``names``; a new one begins with its value of now."""
        with _ordinary_tensors():
            for name, parameter in self._parameters.items():
                if (
                    (parameter.requires_grad or name in names)
                    and name not in self.values
                    and _can_be_averaged(parameter)
                ):
                    device = torch.device("cpu") if self._cpu_offload else local(parameter).device
                    self.values[name] = parameter.detach().to(device, _wide(parameter.dtype), copy=True)
        self._chunks = [[]]
        size = 0
        for name, average in self.values.items():
            nbytes = local(average).nbytes
            if self._chunks[-1] and size + nbytes > _CHUNK:
                self._chunks.append([])
                size = 0
            self._chunks[-1].append(name)
            size += nbytes

    @torch.no_grad()
    def update(self) -> None:
        """Apply the formula."""
        # Product and sum apart, as the formula is written: a fused multiply-add has other last bits. A chunk at a time, so
        # that the products need little memory. Of sharded tensors the part that is here: nobody needs to know of the others.
        for chunk in filter(None, self._chunks):
            averages = [local(self.values[name]) for name in chunk]
            weights = [
                local(self._parameters[name]).to(average.device, average.dtype)
                for name, average in zip(chunk, averages, strict=True)
            ]
            if averages[0].device.type == "cpu":
                for average, weight in zip(averages, weights, strict=True):
                    _average_in_cache(average, weight, self._decay)
            else:
                torch._foreach_mul_(averages, self._decay)
                torch._foreach_add_(averages, torch._foreach_mul(weights, 1 - self._decay))  # noqa: SLF001  no public name

    # --- in place of the weights ----------------------------------------------------------------------------------

    @property
    def are_lent(self) -> bool:
        """Whether the model has them."""
        return bool(self._originals)

    def lend(self, strategy: Strategy) -> None:
        """Let the model have them."""
        with _ordinary_tensors():
            self._parameters = sharded_state.parameters(strategy)  # moving a module between devices may make new ones
            self._originals = {
                name: self._parameters[name].detach().to(local(average).device, copy=True)
                for name, average in self.values.items()
            }
            for name, average in self.values.items():
                local(self._parameters[name]).copy_(local(average))

    def give_back(self, strategy: Strategy) -> None:
        """Let it have its weights again, if it has not."""
        if not self._originals:
            return
        with _ordinary_tensors():
            sharded_state.reshard(strategy)
            for name, original in self._originals.items():
                local(self._parameters[name]).copy_(local(original))
        self._originals = {}

    @contextmanager
    def exchanged(self, strategy: Strategy) -> Iterator[None]:
        """While it lasts, the model has what it has not otherwise: the averages, or what is trained."""
        first, then = (self.give_back, self.lend) if self.are_lent else (self.lend, self.give_back)
        first(strategy)
        try:
            yield
        finally:
            then(strategy)

    # --- in checkpoints -------------------------------------------------------------------------------------------

    def gather(self, strategy: Strategy) -> None:
        """For :meth:`in_state`: have FSDP make shards of what the model has not now. Collective with FSDP, else nothing."""
        if sharded_state.flattened(strategy) is None:
            self._exchanged = {}
            return
        with self.exchanged(strategy):
            shards = sharded_state.model_state(strategy)
        self._exchanged = {name: shard for name, shard in shards.items() if is_sharded(shard)}

    def in_state(self, module: pl.LightningModule, state: dict[str, Any]) -> dict[str, Any]:
        """The model's state dictionary with the averages. :meth:`gather` comes first.

        Args:
            module: The model.
            state: Its state dictionary of now. If it has the averages, they are exchanged for what is trained.
        """
        averages = dict(state)
        exchanged, self._exchanged = self._exchanged, {}
        (state if self.are_lent else averages).update(exchanged)
        name_of = {id(parameter): name for name, parameter in self._parameters.items()}
        # Once more with the names that share a parameter.
        for wrapped_name, parameter in module.named_parameters(remove_duplicate=False):
            name, own = sharded_state.plain_name(wrapped_name), name_of.get(id(parameter), "")
            if own not in self.values or name not in averages or name in exchanged:
                continue
            averages[name] = self.values[own]
            if self.are_lent:
                state[name] = self._originals[own]
        return averages

    def trained_state(self, strategy: Strategy) -> dict[str, Any]:
        """The model's state dictionary as ``strategy`` makes it, of what is trained, while the model has the averages."""
        with self.exchanged(strategy):
            state = strategy.lightning_module_state_dict()
            # They may be the live ones. FSDP's own shards are copies.
            return {
                name: value if hasattr(value, "local_shards") or not isinstance(value, torch.Tensor) else value.clone()
                for name, value in state.items()
            }

    def take_over(self, strategy: Strategy, saved: Path | Mapping[str, torch.Tensor]) -> None:
        """Go on from ``saved``.

        Args:
            strategy: The model's strategy.
            saved: A directory of weights, or a state dictionary of whole tensors. What it lacks was not trained then.

        Raises:
            ModelMismatchError: If it is of a model with other parameters.
        """
        with _ordinary_tensors():
            if sharded_state.flattened(strategy) is not None:
                self._take_over_flattened(strategy, saved)
                return
            parts = _parts(saved, self.values) if isinstance(saved, Mapping) else load_parts(saved, self.values)
            for name, part in parts.items():
                local(self.values[name]).copy_(part)

    def _take_over_flattened(self, strategy: Strategy, saved: Path | Mapping[str, torch.Tensor]) -> None:
        """Let FSDP load them in place of the weights, and keep what each rank has of them then."""
        if isinstance(saved, Mapping):
            state = sharded_state.scatter(strategy, {MODEL: saved}, [])[MODEL]
        else:
            state = load_model(saved, sharded_state.templates(strategy))
        with self.exchanged(strategy):
            wanted = {name: value for name, value in state.items() if is_sharded(value) or name in self.values}
            sharded_state.load_model(strategy, wanted, strict=False)
            for name, parameter in sharded_state.parameters(strategy).items():
                if name in self.values:
                    self.values[name].copy_(parameter)


def _parts(saved: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's parts of whole tensors, as :func:`load_parts` reads them."""
    for name in saved.keys() & like.keys():
        if saved[name].shape != like[name].shape:
            raise ModelMismatchError(
                f"{name} has shape {tuple(saved[name].shape)} in the checkpoint's averages, {tuple(like[name].shape)} in "
                "the model"
            )
    return {name: part_here(saved[name], tensor, name) for name, tensor in like.items() if name in saved}


def _check_flattened(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, FlatParameter):
            why = "use_orig_params=False, which leaves parameters no names"
        elif _can_be_averaged(parameter) and _wide(parameter.dtype) != parameter.dtype:
            why = f"parameters of less than 32 bits ({name} has {parameter.dtype}): their averages have more"
        else:
            continue
        raise ConfigurationError(f"EMA does not work with FSDPStrategy and {why}. Use nemologger's FSDP2Strategy.")


def _can_be_averaged(parameter: torch.nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _average_in_cache(average: torch.Tensor, weight: torch.Tensor, decay: float) -> None:
    """The formula, a part at a time: three passes over all of the memory, and fresh memory for products, take far longer."""
    if average.is_contiguous() and weight.is_contiguous():
        parts = zip(torch.split(average.view(-1), _IN_CACHE), torch.split(weight.view(-1), _IN_CACHE), strict=True)
        for part, weights in parts:
            part.mul_(decay).add_(weights * (1 - decay))
    else:
        average.mul_(decay).add_(weight * (1 - decay))


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Validation runs in inference mode, whose tensors cannot be used like others later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
