"""What is said before training of ranks that do not fit together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemologger.ranks import SingleProcess
from nemologger.saving.checks import check_lengths


class Several(SingleProcess):
    """Rank 0, which hears the others' values from a list."""

    others: list[float] = []

    def exchange(self, value, answer):
        return answer([value, *self.others])


@pytest.mark.parametrize(
    ("lengths", "said"),
    [([6, 6, 6], ""), ([float("inf")] * 2, ""), ([6, 7, 5], "5 batches on rank 2 and 7 on rank 1")],
)
def test_epochs_of_different_lengths_are_told(caplog, monkeypatch, lengths, said):
    trainer = SimpleNamespace(num_training_batches=lengths[0], is_global_zero=True)
    ranks = Several(world_size=len(lengths))
    monkeypatch.setattr(Several, "others", lengths[1:])
    check_lengths(ranks, trainer)
    assert (said in caplog.text) if said else not caplog.text
