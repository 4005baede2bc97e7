"""Sweeps: every combination of a Hydra multi-run as a run of its own, in a process of its own.

``runner`` is the decorator. In the process that was started with ``-m``, Hydra's sweeper makes the combinations, and its
launcher calls ``supervisor`` for each, here or in a worker process or on another machine; that starts ``child``, the same
script with the overrides of this one combination. ``record`` is what is known of each afterwards.
"""
