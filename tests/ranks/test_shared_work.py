"""Rank 0 decides with the help of all: they may take their time, they may fail, and one that says nothing is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.shared_verification import DAMAGED, WORLD
from processes import seen_by_ranks

from nemologger.errors import ConfigurationError
from nemologger.ranks import SingleProcess, decide_with_help

SCRIPT = Path(__file__).parents[1] / "helpers" / "shared_verification.py"


def countdown(start: int):
    yield from range(start, 0, -1)
    return -start


def broken(start: int):
    yield start
    raise ConfigurationError("cannot work")


def test_one_process_helps_itself():
    told: list[int] = []
    result = decide_with_help(SingleProcess(), lambda ask: [ask(3), ask(2)], countdown, told.append)
    assert result == [[-3], [-2]]
    assert told == [3, 2, 1, 2, 1]


def test_a_step_need_not_ask_and_hears_when_the_work_fails():
    assert decide_with_help(SingleProcess(), lambda ask: "nothing to ask", countdown) == "nothing to ask"

    def step(ask):
        with pytest.raises(ConfigurationError, match="cannot work"):
            ask(1)
        return "went on"

    assert decide_with_help(SingleProcess(), step, broken) == "went on"


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What each of two ranks saw."""
    return seen_by_ranks(SCRIPT, WORLD, tmp_path_factory.mktemp("shared"))


@pytest.mark.dist
def test_all_ranks_work_and_hear_the_decision(seen):
    assert [rank["several questions"] for rank in seen] == [[[10, 11], [20, 21]]] * WORLD


@pytest.mark.dist
def test_work_may_take_longer_than_a_rank_is_waited_for(seen):
    assert [rank["slow"] for rank in seen] == [[0, 1]] * WORLD
    assert all(rank["slow, seconds"] > 1.5 * rank["timeout"] for rank in seen)


@pytest.mark.dist
def test_work_that_fails_on_one_rank_is_an_error_on_all(seen):
    assert [rank["fails"] for rank in seen] == ["ConfigurationError: rank 1: not here"] * WORLD


@pytest.mark.dist
def test_a_rank_that_says_nothing_is_named(seen):
    assert seen[0]["mute"].startswith("SilentRankError: rank 1 of 2 did not answer")


@pytest.mark.dist
def test_a_resume_shares_out_the_verification(seen):
    """Each rank reads its share of both checkpoints; rank 0 also looks at the block that rank 1 says is damaged."""
    for checkpoint, twice in (("step=2", {(DAMAGED, 0)}), ("step=1", set())):
        shares = [{tuple(unit) for unit in rank["looked at"][checkpoint]} for rank in seen]
        assert all(shares)
        assert shares[0] & shares[1] == twice
        assert {file for file, _ in shares[0] | shares[1]} == set(seen[0]["files"][checkpoint])


@pytest.mark.dist
def test_damage_in_another_ranks_share_makes_all_go_on_from_the_checkpoint_before(seen):
    assert "step=2" in seen[1]["damaged file"]
    assert [rank["resumed"] for rank in seen] == [["step=1", 1]] * WORLD
    assert any("have changed since they were written" in line for line in seen[0]["errors"])
