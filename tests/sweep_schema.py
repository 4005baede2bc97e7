"""A script with a schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

import nemologger as nl


@dataclass
class Settings:
    """What may be configured."""

    name: str = MISSING
    steps: int = 3


@nl.hydra_runner(config_name="other", schema=Settings)
def main(cfg: Any) -> None:
    print("name", cfg.name, "steps", cfg.steps)


if __name__ == "__main__":
    main()
