"""What stands between Lightning's ``fit`` and the checkpoint engine when a run goes on.

    choice.py            which checkpoint is meant by a path or a directory
    verified_reads.py    whether it is whole, found out by all ranks
    leftovers.py         what a killed run has left half done
    compare.py           whether it is of the model at hand
    optimizer_states.py  whether and in which order its optimizers' states fit
    checkpoint_io.py     what Lightning loads through, whoever wrote the checkpoint

What people call is :mod:`nemologger.resume`.
"""
