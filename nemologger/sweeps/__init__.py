"""Sweeps: every combination of a Hydra multi-run as a run of its own, in a process of its own.

    runner.py      the decorator; program.py: the script that it is on
    note.py        settles a sweep before it starts
    launch.py      one start of it; launchers.py, devices.py: how many run at a time, on which GPUs
    supervisor.py  what becomes of one combination: skipped, or started here, in a worker process or on another machine
    child.py       its process: the same script with the overrides of this one combination
    naming.py      what it is called; record.py: what is known of it afterwards

Hydra's sweeper makes the combinations, in the process that was started with ``-m``.
"""
