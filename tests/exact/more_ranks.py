"""For ``torchrun``: go on with the epoch of a checkpoint to its end, and write down what a rank sees, and what is said."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from exact.runs import BATCH, Augmented, Case, train
from torch.utils.data import DataLoader


class Noted(Augmented):
    """Remembers which samples it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __getitem__(self, index):
        self.seen.append(index)
        return super().__getitem__(index)


def go_on(directory: Path, checkpoint: Path | None, **trainer: object) -> list[int]:
    """What one rank sees."""
    data = Noted()
    case = Case(
        lambda: DataLoader(data, batch_size=BATCH // 2, shuffle=True), trainer={"limit_val_batches": 0, **trainer}
    )
    train(case, directory, 5, checkpoint)
    return data.seen


def main() -> None:
    directory, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
    rank = os.environ["RANK"]
    logging.getLogger("nemologger").addHandler(logging.FileHandler(directory / f"log-{rank}"))
    ranks = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": "ddp"}
    seen = go_on(directory / "more", checkpoint, **ranks, max_epochs=1, max_steps=-1)
    (directory / f"seen-{rank}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
