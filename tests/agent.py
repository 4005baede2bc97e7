"""``torchrun`` itself, but that it forks its ranks: ``agent.py OPTIONS SCRIPT ARGUMENTS``."""

from __future__ import annotations

import atexit
import signal
from typing import Any

import zygote
from torch.distributed import run
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def forking(config: LaunchConfig, entrypoint: str) -> Any:
    """In place of what starts ``entrypoint``, the interpreter, with its options, the script and its arguments."""
    config.start_method = "fork"
    return elastic_launch(config, rank)


def rank(*command: str) -> None:
    """What one of them does."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # the agent has handlers of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        zygote.run(*(part for i, part in enumerate(command) if i or part != "-u"))
    finally:
        atexit._run_exitfuncs()  # multiprocessing, which has forked it, ends without


if __name__ == "__main__":
    run.elastic_launch = forking
    run.main()
