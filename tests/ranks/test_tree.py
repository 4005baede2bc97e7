"""Values go up and down a tree of several floors, and a silent rank is known to all by its number."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from helpers.five_ranks import LONG, WORLD
from processes import ranks, seen_by_ranks

from nemologger.ranks.tree import RankTree

SCRIPT = Path(__file__).parents[1] / "helpers" / "five_ranks.py"
DYING = SCRIPT.with_name("dying_rank.py")

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of five ranks saw."""
    return seen_by_ranks(SCRIPT, WORLD, tmp_path_factory.mktemp("five"))


def test_rank_zeros_answer_to_all_values_is_everybodys(seen):
    assert [rank["exchange"] for rank in seen] == [[0, 10, 20, 30, 40]] * WORLD


def test_rank_zeros_value_is_everybodys(seen):
    assert [rank["broadcast"] for rank in seen] == ["zero's"] * WORLD


def test_values_may_be_long(seen):
    assert [rank["long"] for rank in seen] == [WORLD * len(LONG)] * WORLD


@pytest.mark.parametrize("silent", [3, 1])
def test_every_other_rank_names_the_silent_one(seen, silent):
    told = [seen[rank][f"without {silent}"] for rank in range(WORLD) if rank != silent]
    assert [message.split(" did not answer")[0] for message in told] == [f"rank {silent} of {WORLD}"] * (WORLD - 1)


@pytest.mark.parametrize("silent", [3, 1])
def test_a_monitor_sees_that_the_others_wait(seen, silent):
    """It would end them as ranks that hang."""
    assert all(seen[rank][f"waits for {silent}"] for rank in range(WORLD) if rank != silent)


def test_ranks_can_be_waited_for_where_some_may_never_come(seen):
    assert [rank["late"] for rank in seen] == [[0, 0]] * WORLD
    assert [rank["missing"] for number, rank in enumerate(seen) if number != 3] == [1] * (WORLD - 1)


def test_a_rank_that_dies_is_named_by_those_who_do_not_wait_for_it(tmp_path):
    """Rank 2 waits for rank 0, which gives up at once and takes the store with it."""
    told = seen_by_ranks(DYING, 3, tmp_path)
    assert [message.split(" did not answer")[0] for message in told] == ["rank 1 of 3", "", "rank 1 of 3"]


def test_a_rank_that_falls_silent_with_the_store_is_named_and_waited_for_no_longer(tmp_path):
    """Its host has no power, say: torch would wait for an answer of the store without end."""
    with ranks(SCRIPT.with_name("silent_store.py"), 3, tmp_path) as (_, one, two):
        assert [rank.wait(timeout=120) for rank in (one, two)] == [0, 0]
    for rank in (1, 2):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert seen["told"].startswith(f"rank 0 of 3 did not answer (seen by rank {rank}, timeout 5 s): ")
        assert f"or its host has gone ({socket.gethostname()})" in seen["told"]
        assert seen["missing"] == 1


def test_who_is_missing_is_not_known_without_the_store():
    class Silent:
        def add(self, key, amount):
            raise RuntimeError("the store did not answer within 10 s")

    tree = object.__new__(RankTree)
    tree._broken, tree.world_size, tree._come_to, tree._notes = "", 3, set(), Silent()
    assert tree.missing_at("the end", 1.0) is None
