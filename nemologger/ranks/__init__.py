"""Rank 0 decides, all agree: what the processes of one run do together.

Everything here is collective: every rank calls it, in the same order, from its main thread.

    group.py        the processes of the run, and how they reach each other
    tree.py         values up and down between them; who does not answer is named
    notes.py        what they leave for each other in the store of the run
    failure.py      an exception on its way to the others
    agreement.py    a step's outcome, an error included, is the same on every rank
    shared_work.py  as that, where all ranks work on what rank 0 asks
    restarts.py     what torchrun's restarts need
    poll.py         whether any rank wants something, for every training step
"""

from __future__ import annotations

from nemologger.ranks.agreement import all_together, decide, together, together_at_zero
from nemologger.ranks.failure import Failure
from nemologger.ranks.group import DEFAULT_TIMEOUT, ProcessGroup, Ranks, SingleProcess, connect, leave_at_exit
from nemologger.ranks.poll import Poll
from nemologger.ranks.restarts import why_restarts_may_hang
from nemologger.ranks.shared_work import decide_with_help

__all__ = [
    "DEFAULT_TIMEOUT",
    "Failure",
    "Poll",
    "ProcessGroup",
    "Ranks",
    "SingleProcess",
    "all_together",
    "connect",
    "decide",
    "decide_with_help",
    "leave_at_exit",
    "together",
    "together_at_zero",
    "why_restarts_may_hang",
]
