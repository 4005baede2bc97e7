"""The checkpoint engine: writes, finds, verifies, prunes and loads checkpoints. It knows no Lightning.

What it is about:

    snapshot.py     what one checkpoint holds; plain.py: all but its tensors, as plain types
    shards.py       the part of a tensor that a rank holds; shares.py: who writes what of it
    weights/        the format of the tensors' files
    manifest.py     what makes a directory a checkpoint; naming.py: what it is called
    optimizers.py   an optimizer's state for an optimizer of the same parameters

A save goes through one file per stage:

    plan.py         who writes what, and where: once for a run; directories.py: which directory each piece goes to
    stage.py        a piece in memory
    write.py        its file
    commit.py       published, or absent
    saver.py        runs the stages, and training waits
    async_saver.py  runs them beside training: staging.py copies into an arena.py, and a writer.py (writer_main.py) writes;
                    in_flight.py is such a save, progress.py says how far it is

and what is kept:

    keeper.py       saves, and keeps what is to be kept: decision.py, then the shelf.py, where retention.py says what may go
    remover.py      takes it away beside training, or thinning.py only its optimizer's state; errand.py: what is done so
    memory_disk.py  what was written, for somebody else to write for real

A resume:

    find.py         which checkpoint
    verify.py       whether it is whole
    load.py         what is in it: read.py from files, fetch.py from a store; blocks.py and overlaps.py: which bytes
    in_place.py     into which live tensors
"""
