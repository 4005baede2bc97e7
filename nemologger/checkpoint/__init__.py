"""The checkpoint engine: writes, finds, verifies, prunes and loads checkpoints. It knows no Lightning.

What makes a directory a checkpoint:

    manifest.py  lists its files; it is written last
    commit.py    published, or absent
    find.py      which checkpoint to go on from
    verify.py    whether it is whole

and a package for each thing that is done with one, where no file of ``reading`` and ``writing`` knows the other:

    state/    what is in it: tensors, the part of them that a rank holds, and everything else as plain types
    weights/  the format of the tensors' files
    writing/  a save, waited for or beside training
    reading/  a load: which bytes, from a file or a store, into which live tensors
    keeping/  what a run keeps: names, the best, the last, and how the others go
"""
