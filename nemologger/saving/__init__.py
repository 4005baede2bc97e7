"""The parts of ModelCheckpoint: what stands between Lightning's hooks and the checkpoint engine when a run saves.

    arguments.py         which of its arguments can work
    settle.py            its place in a run: among the callbacks, its directory, its names
    checks.py            what would never be saved, said before training
    monitor.py           whether a metric can appear under a Trainer's limits
    batches.py           how many samples a batch holds
    moments.py           the hooks of Lightning in which something is saved
    due.py               what the intervals say
    saves.py             how one save goes
    notices.py           what is said of saves, each thing once, and how many have failed
    kept_checkpoints.py  which checkpoints there are, and what Lightning sees of them

The callback itself is :mod:`nemologger.model_checkpoint`.
"""
