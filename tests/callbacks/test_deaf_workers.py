"""Workers of a DataLoader and a signal that is not meant for them."""

from __future__ import annotations

import multiprocessing
import signal
import threading

import torch
from processes import python
from torch.utils.data import DataLoader
from toy import BATCH, ToyData

from nemologger.callbacks import deaf_workers
from nemologger.callbacks.deaf_workers import DeafWorkers

HANGS = """
import sys
import time
from torch.utils.data import DataLoader
from nemologger.callbacks import deaf_workers

class Data:
    def __len__(self): return 9
    def __getitem__(self, index): return index if index < 2 else time.sleep(3600)

if __name__ == "__main__":  # workers that are not forked read this too
    deaf_workers._LEAVING = 0.5
    loader = DataLoader(Data(), num_workers=2, prefetch_factor=2)
    deaf_workers.DeafWorkers(15).add(loader)
    batches = iter(loader)
    next(batches)
    sys.exit(3)
"""


def test_they_hear_it_when_nobody_else_does():
    loader = DataLoader(ToyData(), batch_size=BATCH, num_workers=1, persistent_workers=True)
    deaf = DeafWorkers(signal.SIGTERM)
    deaf.add(loader)
    deaf.add(loader)
    other = DeafWorkers(signal.SIGUSR1)
    other.add(loader)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    assert len(list(batches)) == 9
    deaf.give_back(loader)
    other.give_back(loader)
    assert loader.worker_init_fn is None
    deaf.end()
    worker.terminate()
    worker.join(timeout=120)
    assert worker.exitcode == 0


def test_one_that_hangs_does_not_keep_the_process_from_ending(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    assert python(script, check=False).returncode == 3


SERVED = """
import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver
from nemologger.callbacks import deaf_workers
from nemologger.callbacks.deaf_workers import DeafWorkers

if __name__ == "__main__":
    deaf = DeafWorkers(15)
    context = multiprocessing.get_context("forkserver")
    with context.Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
        for sig in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(forkserver._forkserver._forkserver_pid, sig)
        time.sleep(0.2)
        assert pool.apply(os.getppid) == forkserver._forkserver._forkserver_pid
    for _ in range(20):
        hangs = context.Process(target=time.sleep, args=(3600,))
        hangs.start()
        hangs.terminate()
        hangs.join()
        assert hangs.exitcode == -15
    deaf.end()
    print(forkserver._forkserver._preload_modules)
"""


def test_the_server_that_starts_them_does_not_hear_it_and_others_that_it_starts_do(tmp_path):
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    assert python(script).stdout == "['__main__']\n"


AS_BEFORE = """
import multiprocessing
import signal
from nemologger.callbacks.deaf_workers import DeafWorkers

def listens():
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return [(signal.getsignal(sig).name, sig in blocked) for sig in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]

if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR2,))
    deaf = DeafWorkers(15)
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(pool.apply(listens))
    deaf.end()
"""


def test_what_the_process_that_trains_ignores_or_blocks_the_processes_of_the_server_do_too(tmp_path):
    script = tmp_path / "as_before.py"
    script.write_text(AS_BEFORE)
    assert python(script).stdout == "[('SIG_DFL', False), ('SIG_IGN', False), ('SIG_DFL', True)]\n"


def test_workers_that_are_threads_leave_the_signal_alone(monkeypatch):
    monkeypatch.setattr(deaf_workers, "get_worker_info", lambda: object())
    before, prepared = signal.getsignal(signal.SIGTERM), []
    deaf = deaf_workers._Deaf(prepared.append, signal.SIGTERM, torch.zeros(1))
    thread = threading.Thread(target=deaf, args=(3,))
    thread.start()
    thread.join()
    assert prepared == [3]
    assert signal.getsignal(signal.SIGTERM) is before
