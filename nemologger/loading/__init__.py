"""What stands between Lightning's ``fit`` and the checkpoint engine when a run goes on.

    choice.py          which checkpoint is meant by a path or a directory
    verified_reads.py  whether it is whole, found out by all ranks
    compare.py         whether it is of the model at hand
    checkpoint_io.py   what Lightning loads through, whoever wrote the checkpoint

What people call is :mod:`nemologger.resume`.
"""
