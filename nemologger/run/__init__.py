"""A run's directory, and what is written there besides checkpoints.

    directory.py  where it is: name and version to a frozen value
    files.py      how the run was started: its command, its code, its configuration
    log_files.py  what Python's logging, its warnings and Lightning say
    record.py     what a trainer knows of its run

Nothing here decides: :class:`nemologger.NeMoLogger` does.
"""
