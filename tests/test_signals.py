"""Signals to all processes of a job pass those by that help the one that trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import psutil
import pytest

from nemologger.signals import unheard

SENT = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def sent_to_children():
    """All of them, again and again, to whatever this process starts from now on, from its first moment on."""
    here, over = psutil.Process(), threading.Event()
    before = set(here.children())  # servers of other tests are to live

    def send() -> None:
        while not over.is_set():
            for child in set(here.children()) - before:
                for number in SENT:
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("is_deaf", [True, False])
def test_a_process_that_is_started_so_hears_none_of_them_from_the_start(is_deaf):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    command = [sys.executable, "-c", f"import time; time.sleep({0.2 if is_deaf else 60})"]
    with sent_to_children():
        if is_deaf:
            with unheard():
                process = subprocess.Popen(command)
        else:
            process = subprocess.Popen(command)
        code = process.wait()
    assert (code == 0) is is_deaf
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_who_starts_it_hears_what_comes_meanwhile():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with unheard():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
