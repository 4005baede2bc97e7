"""What launches the combinations of a sweep: how many run at a time, and which GPUs each of them may have."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemologger.errors import ConfigurationError
from nemologger.sweeps import devices

if TYPE_CHECKING:
    from omegaconf import DictConfig

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
NEMO = f"{__name__}.NeMoLauncher"
NEMO_NAME = "nemo_launcher"  # as NeMo 1 calls it in Hydra's group of launchers


@dataclass
class NeMoLauncher:
    """The fields of NeMo 1's ``hydra/launcher: nemo_launcher``. Other launchers do what it says: :func:`translated`.

    Attributes:
        num_gpus: How many of the GPUs that can be seen are used; -1: all of them.
        jobs_per_gpu: How many combinations run on one GPU, or on a machine without any, at a time.
    """

    _target_: str = NEMO
    num_gpus: int = -1
    jobs_per_gpu: int = 1


class NotStarted(BaseException):
    """A sweep cannot start. Hydra makes a warning of any ``Exception`` that a callback raises, and goes on.

    Args:
        error: What it is to be an error of.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Places:
    """Where the combinations that run at a time are.

    Attributes:
        groups: The GPUs, in groups for one combination each; none if every combination sees what is there.
        per_group: How many combinations share a group.
    """

    groups: Sequence[tuple[str, ...]]
    per_group: int

    @property
    def total(self) -> int:
        """How many run at a time."""
        return max(len(self.groups), 1) * self.per_group


def shares_this_machine(target: str) -> bool:
    """Whether the launcher of that class runs several combinations at a time on this machine."""
    return target in (JOBLIB, NEMO)


def places(cfg: DictConfig, launcher: Any, gpus: Sequence[str]) -> Places:
    """Room for the combinations, given the GPUs of this machine.

    Args:
        cfg: The configuration; ``trainer.devices`` says how many GPUs a combination wants.
        launcher: Its ``hydra.launcher``: one that :func:`shares_this_machine`.
        gpus: All that can be seen.

    Raises:
        ConfigurationError: What NeMo's launcher is asked for is not there.
    """
    from omegaconf import OmegaConf

    wanted = OmegaConf.select(cfg, "trainer.devices")
    if launcher._target_ == NEMO:
        on_cpu = OmegaConf.select(cfg, "trainer.accelerator") == "cpu"
        return _as_nemo_has_it(launcher, None if on_cpu else wanted, gpus)
    groups = devices.groups(gpus, wanted)
    jobs = launcher.n_jobs
    jobs = jobs if jobs > 0 else max((os.cpu_count() or 1) + 1 + jobs, 1)  # as joblib counts
    return Places(groups, math.ceil(jobs / max(len(groups), 1)))


def _as_nemo_has_it(launcher: Any, wanted: Any, gpus: Sequence[str]) -> Places:
    if launcher.jobs_per_gpu < 1:
        raise ConfigurationError(
            f"hydra.launcher.jobs_per_gpu={launcher.jobs_per_gpu}: expected how many combinations run on a GPU at a time, "
            "1 or more"
        )
    if launcher.num_gpus != -1 and not 1 <= launcher.num_gpus <= len(gpus):
        seen = f"{len(gpus)} GPUs ({', '.join(gpus)})" if gpus else "no GPU"
        expected = f"1 to {len(gpus)}, or -1 for all of them" if gpus else "-1, to run on the CPU"
        raise ConfigurationError(
            f"hydra.launcher.num_gpus={launcher.num_gpus}: {seen} can be seen here, expected {expected}"
        )
    used = gpus if launcher.num_gpus == -1 else gpus[: launcher.num_gpus]
    size = int(wanted) if str(wanted).isdecimal() and int(wanted) > 0 else 1  # NeMo's combinations have one each
    if used and size > len(used):
        raise ConfigurationError(
            f"trainer.devices={size}: a combination is to have more GPUs than the {len(used)} that hydra.launcher.num_gpus="
            f"{launcher.num_gpus} lets the sweep use"
        )
    return Places(devices.groups(used, size), launcher.jobs_per_gpu)


def translated(cfg: DictConfig, gpus: Sequence[str]) -> dict[str, Any]:
    """The ``hydra.launcher`` of an installed launcher that does what NeMo's of ``cfg`` says.

    Raises:
        ConfigurationError: It asks for what is not there, or needs a package that is missing.
    """
    jobs = places(cfg, cfg.hydra.launcher, gpus).total
    if jobs == 1:
        return {"_target_": BASIC}
    if importlib.util.find_spec(JOBLIB.rpartition(".")[0].rpartition(".")[0]) is None:
        raise ConfigurationError(
            f"hydra/launcher: {NEMO_NAME} is to run {jobs} combinations at a time, which takes Hydra's launcher for joblib: "
            "pip install 'nemologger[hydra]'"
        )
    return {"_target_": JOBLIB, "n_jobs": jobs}
