"""All who ask for the ranks share one gloo group: it costs descriptors and threads for every rank there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.shared_group import WORLD
from processes import seen_by_ranks

SCRIPT = Path(__file__).parents[1] / "helpers" / "shared_group.py"

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw."""
    return seen_by_ranks(SCRIPT, WORLD, tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize("life", ["first", "second"])
def test_a_second_connection_costs_nothing_and_works(seen, life):
    for rank in seen:
        assert rank[life]["first group"] > 0
        assert rank[life]["five more"] == 0
        assert rank[life]["gathered"] == [[0, 1]] * 6


def test_all_is_given_back_with_the_process_group(seen):
    for rank in seen:
        assert rank["second"]["left"] == rank["first"]["left"]


@pytest.mark.parametrize("life", ["first", "second"])
def test_each_connection_has_points_of_its_own(seen, life):
    assert seen[0][life]["missing"] == [0, 1]


def test_who_shares_a_group_with_a_silent_rank_is_told_at_once_and_the_next_one_gets_another(seen):
    told = seen[0]["silent"]["told"]
    assert len(told) == 2
    assert all(message.startswith("rank 1 of 2 did not answer") for message in told)
    assert seen[0]["silent"]["missing"] == 1
    assert [rank["silent"]["after"] for rank in seen] == [[0, 1]] * 2


def test_each_has_its_own_patience_in_the_group_of_another(seen):
    """Who is patient gets an answer, later than the one that the group was made by would have waited."""
    assert [rank["silent"]["patient"] for rank in seen] == [[1.0]] * 2
