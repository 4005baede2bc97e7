"""All ranks agree: on a result, on an error, and on not waiting for ever."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from helpers.two_ranks import SILENCE, results

from nemologger.errors import ConfigurationError, RankError, SilentRankError
from nemologger.ranks import Failure, Poll, ProcessGroup, SingleProcess, connect, decide, together
from nemologger.ranks.group import _leave


@pytest.fixture(scope="session")
def seen(tmp_path_factory):
    """What two gloo ranks saw."""
    directory = tmp_path_factory.getbasetemp() / "two_ranks"
    directory.mkdir(exist_ok=True)
    return results(directory)


def fail(error: Exception):
    raise error


def test_one_process_agrees_with_itself():
    assert connect() == SingleProcess()
    assert decide(SingleProcess(), lambda: 42) == 42
    assert together(SingleProcess(), lambda: 42) == [42]


def test_one_process_raises_its_own_error():
    for agree in (decide, together):
        with pytest.raises(KeyError, match="mine"):
            agree(SingleProcess(), lambda: fail(KeyError("mine")))


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo"])
def test_a_network_interface_that_is_not_there_is_named(tmp_path, monkeypatch, backend):
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        assert ProcessGroup().gather("here") == ["here"]
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
        with pytest.raises(
            RankError, match=r"nowhere0\nName the one that connects the hosts .* GLOO_SOCKET_IFNAME=eth0"
        ):
            ProcessGroup()
    finally:
        _leave()
    assert not dist.is_initialized()


class Silent(SingleProcess):
    """The other one does not answer any more."""

    def broadcast(self, value):
        raise SilentRankError("rank 1 of 2 did not answer")

    def exchange(self, value, answer):
        raise SilentRankError("rank 1 of 2 did not answer")


@pytest.mark.parametrize("agree", [decide, together])
def test_what_was_raised_here_is_shown_where_the_others_do_not_answer_any_more(agree):
    with pytest.raises(SilentRankError) as raised:
        agree(Silent(world_size=2), lambda: fail(KeyError("mine")))
    assert repr(raised.value.__cause__) == "KeyError('mine')"


def test_an_interrupt_is_not_kept_back():
    for agree in (decide, together):
        with pytest.raises(KeyboardInterrupt):
            agree(SingleProcess(), lambda: fail(KeyboardInterrupt()))


def test_none_is_a_result_too():
    assert decide(SingleProcess(), lambda: None) is None


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConfigurationError("bad"), ConfigurationError, "bad"),
        (OSError("full"), RankError, "rank 3: OSError: full"),
    ],
)
def test_an_error_travels_by_value(error, kind, message):
    travelled = Failure.of(error, 3).error()
    assert (type(travelled), str(travelled)) == (kind, message)


@pytest.mark.dist
def test_rank_zeros_decision_is_everybodys(seen):
    zero, one = seen
    assert zero["decide"]["value"] == one["decide"]["value"]
    assert "value" in zero["decide"]


@pytest.mark.dist
@pytest.mark.parametrize("what", ["decide other", "exchange"])
def test_an_error_of_rank_zero_is_raised_everywhere_with_the_same_message(seen, what):
    """Also that of its answer: the others wait for one."""
    zero, one = seen
    for rank in seen:
        assert (rank["decide ours"]["error"], rank["decide ours"]["message"]) == ("ConfigurationError", "not like this")
    assert (zero[what]["error"], zero[what]["message"]) == ("KeyError", "'x'")
    assert (one[what]["error"], one[what]["message"]) == ("RankError", "rank 0: KeyError: 'x'")


@pytest.mark.dist
def test_what_cannot_travel_is_an_error_everywhere_too(seen):
    for rank in seen:
        assert "error" in rank["decide unpicklable"]
        assert "pickle" in rank["exchange unpicklable"]["message"]
        assert "error" in rank["together unpicklable"]
        assert "pickle" in rank["together unpicklable"]["message"]


@pytest.mark.dist
def test_everybodys_results_are_in_rank_order(seen):
    for rank in seen:
        assert rank["together"]["value"] == [0, 10]
        assert rank["still together"]["value"] == ["here", "here"]


@pytest.mark.dist
def test_an_error_of_any_rank_is_raised_everywhere_and_names_it(seen):
    zero, one = seen
    assert (zero["together ours"]["error"], zero["together ours"]["message"]) == ("ConfigurationError", "rank 1: bad")
    assert (one["together ours"]["error"], one["together ours"]["message"]) == ("ConfigurationError", "bad")
    assert zero["together other"]["error"] == "RankError"
    assert zero["together other"]["message"] == "rank 1: OSError: [Errno 28] full"
    assert one["together other"]["error"] == "OSError"
    assert [rank["together all"]["message"] for rank in seen] == ["mine is 0", "mine is 1"]


@pytest.mark.dist
@pytest.mark.parametrize("what", ["late", "unheard", "died"])
def test_a_silent_rank_ends_in_an_error_within_the_timeout(seen, what):
    told = seen[0][what]
    assert told["error"] == "SilentRankError"
    assert told["message"].startswith(f"rank 1 of 2 did not answer (seen by rank 0, timeout {SILENCE:g} s)")
    assert "look for the first error in its log file" in told["message"]
    assert told["seconds"] < 30  # and not after the minute of the process group


@pytest.mark.dist
def test_the_late_rank_is_told_too(seen):
    assert seen[1]["late"]["error"] == "SilentRankError"


@pytest.mark.dist
def test_ranks_that_have_lost_one_do_not_listen_to_it_any_more(seen):
    assert seen[0]["late again"]["error"] == "SilentRankError"
    assert seen[0]["late again"]["seconds"] < SILENCE


def test_a_poll_of_one_process_is_its_own_wish():
    poll = Poll(SingleProcess())
    assert [poll(wish) for wish in (False, True, False)] == [False, True, False]


class _Two(SingleProcess):
    """Another rank that takes its time and has wishes of its own."""

    def __init__(self, seconds: float) -> None:
        super().__init__(0, 2)
        self.__dict__.update(seconds=seconds, wish=False, asked=0)

    def largest(self, values):
        self.__dict__["asked"] += 1
        return [max(values[0], float(self.wish)), max(values[1], self.seconds)]


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, 40), (0.06, 40), (0.02, 8), (1e-6, 3)])
def test_slow_steps_are_polled_each_and_fast_ones_now_and_then(seconds, expected):
    ranks = _Two(seconds)
    poll = Poll(ranks)
    assert not any(poll(False) for _ in range(40))
    # The first call, then every n-th: 5 of 0.02 s are 0.1 s, and no more than 16 go by.
    assert ranks.asked == expected


def test_a_wish_is_heard_after_16_calls_at_most_and_at_once_when_asked_now():
    ranks = _Two(1e-6)
    poll = Poll(ranks)
    poll(False)
    ranks.__dict__["wish"] = True
    answers = [poll(False) for _ in range(16)]
    assert answers == [False] * 15 + [True]
    assert poll(False, now=True)


def test_a_wish_of_this_rank_is_not_heard_before_the_others_hear_it():
    poll = Poll(_Two(1e-6))
    poll(False)
    assert [poll(True) for _ in range(16)] == [False] * 15 + [True]


@pytest.mark.dist
def test_two_ranks_take_the_largest_and_hear_the_others_wish(seen):
    for rank in seen:
        assert rank["largest"]["value"] == [1.0, 10.5]
        assert rank["polls"]["value"] == [False, False, True, False]
