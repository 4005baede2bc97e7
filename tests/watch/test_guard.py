"""A monitor process and the process it looks after."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import environment, wait_for

from nemologger.watch.board import Board, Section
from nemologger.watch.guard import Guard
from nemologger.watch.guard_main import Silence, waits_for_others

RANK = """
import os, signal, sys, time
from pathlib import Path
from nemologger.watch.board import Board, Section
from nemologger.watch.guard import Guard

def stuck_here():
    board.give_sign(7, Section.STEP{waiting})
    board.set_timeouts([{timeout}] * 6)  # only now: until here the machine may take its time
    {body}

board = Board()
board.set_timeouts([1e9] * 6)
guard = Guard(board, rank=3, interval=0.05, end_with=signal.{signal}, log_files=[Path("rank.txt"), Path("none.txt")])
print(guard.pid, flush=True)
stuck_here()
"""


def rank(body: str = "time.sleep(60)", timeout: float = 0.5, signal: str = "SIGKILL", waiting: bool = False):
    """A process that hangs."""
    with open("rank.txt", "w") as file:
        file.write("earlier\n")
    code = RANK.format(body=body, timeout=timeout, signal=signal, waiting=", waiting=True" if waiting else "")
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stderr, log file. The monitor is gone, too."""
    out, errors = process.communicate(timeout=60)
    wait_for(lambda: not psutil.pid_exists(int(out.split()[0])))
    with open("rank.txt") as file:
        return process.returncode, errors, file.read()


def test_a_rank_that_hangs_is_ended_and_named():
    code, errors, log = outcome(rank())
    assert code == -signal.SIGKILL
    for text in (errors, log):
        assert "ERROR [rank 3]" in text
        assert f"rank 3 on host {os.uname().nodename}" in text
        assert "while training, step 7" in text
        assert "SIGKILL" in text
        assert "in stuck_here" in text
    assert log.startswith("earlier\n")
    assert not os.path.exists("none.txt")


def test_a_rank_that_is_stopped_is_ended():
    code, errors, _ = outcome(rank("os.kill(os.getpid(), signal.SIGSTOP)", timeout=3.0))
    assert code == -signal.SIGKILL
    assert "stopped by a signal" in errors


def test_another_signal_if_it_is_heard():
    code, errors, _ = outcome(rank(signal="SIGTERM"))
    assert code == -signal.SIGTERM
    assert "ended with SIGTERM" in errors
    assert "killed" not in errors


def test_a_rank_that_waits_is_reported_first_and_ended_later():
    start = time.monotonic()
    # A monitor that is held up counts no more than 1.1 s of that: it does not miss the first of the two moments.
    code, errors, _ = outcome(rank(timeout=1.2, waiting=True))
    assert code == -signal.SIGKILL
    assert errors.index("WARNING [rank 3]") < errors.index("hangs: no sign of life")
    assert errors.count("has been waiting for other ranks") == 1
    assert time.monotonic() - start > 2.4


def test_signs_of_life_keep_it_alive():
    body = """
    for step in range(40):
        board.give_sign(step, Section.STEP)
        time.sleep(0.05)
    guard.close()
    board.close()
"""
    code, errors, log = outcome(rank(body, timeout=10.0))
    assert (code, errors, log) == (0, "", "earlier\n")


def test_the_monitor_hears_no_signal_that_is_sent_to_all_processes_of_a_job():
    until = "while not os.path.exists('sent'): time.sleep(0.02)"
    process = rank(f"{until}\n    board.set_timeouts([0.5] * 6)\n    time.sleep(60)", timeout=1e9)
    monitor = int(process.stdout.readline())
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(monitor, number)
    Path("sent").touch()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert "hangs: no sign of life" in errors


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_the_monitor_ends_with_its_rank(how):
    process = rank("time.sleep(60)" if how == "killed" else "os._exit(5)", timeout=1e9)
    if how == "killed":
        monitor = psutil.Process(int(process.stdout.readline()))
        process.kill()
        wait_for(lambda: not monitor.is_running())
        process.communicate()
    else:
        assert outcome(process)[0] == 5


def test_closing_leaves_nothing_behind():
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    number = signal.SIGRTMAX - 1
    board = Board()
    board.set_timeouts([1e9] * len(Section))
    guard = Guard(board, rank=0, interval=30.0, end_with=signal.SIGKILL)
    assert guard.alive
    start = time.monotonic()
    guard.close()
    assert time.monotonic() - start < 20  # it does not wait for the next look
    assert not guard.alive
    guard.close()
    board.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert not faulthandler.unregister(number)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_monitor_that_was_held_up_does_not_count_that_time():
    clock = [0.0]
    silence = Silence(1.0, now=lambda: clock[0])
    seen = []
    for passed, count in ((1, 5), (1, 5), (1, 5), (3600, 5), (1, 5), (1, 6)):
        clock[0] += passed
        seen.append(silence.look(count))
    assert seen == [0, 1, 2, 5, 6, 0]


STACKS = """Thread 0x00007f0000000001 (most recent call first):
  File "/x/torch/distributed/distributed_c10d.py", line 1 in barrier

Current thread 0x00007f0000000002 (most recent call first):
  File "{innermost}", line 3 in f
  File "/x/mine.py", line 5 in training_step
  File "/x/a.py", line 7 in g
  File "/x/b.py", line 7 in h
  File "/x/torch/nn/parallel/distributed.py", line 9 in forward
  File "/x/torch/distributed/run.py", line 9 in forward
"""


@pytest.mark.parametrize(
    ("innermost", "waits"),
    [
        ("/x/torch/distributed/distributed_c10d.py", True),
        ("/x/torch/nn/parallel/distributed.py", True),
        ("/x/nemologger/ranks/notes.py", True),
        ("/x/mine.py", False),
    ],
)
def test_who_waits_for_others(innermost, waits):
    stacks = STACKS.format(innermost=innermost)
    assert waits_for_others(stacks, 0x7F0000000002) is waits
    assert waits_for_others(stacks, 0x7F0000000001)
    assert not waits_for_others("", 1)
