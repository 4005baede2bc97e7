"""Exact resume: a run that is stopped and continued sees the same batches and draws the same random numbers.

Nothing of the user's is asked to change. Each training loader is handed to Lightning in a thin wrapper that counts what
is taken from it, and knows the state of every random number generator at the moment an epoch began. That is what a
checkpoint holds; from it the loader is brought back to the same batch without loading those before it, where possible.

Loaders:

    loader.py     what Lightning sees instead of a loader
    feed.py       where one loader is, and how it gets there again
    source.py     what all kinds of loaders have in common
    sources.py    one way for each kind of loader
    described.py  what tells one dataset from another
    session.py    all loaders of one fit, and the generators between them
    port.py       what PyTorch's loaders keep to themselves
    workers.py    the same of their worker processes: seeds for each batch
    in_worker.py  what changes in a worker process, and is told
    earlier.py    checkpoints of earlier versions

What programs keep:

    owned.py      generators, counters, lists and arrays that a dataset or sampler keeps
    attributes.py those of a module and a data module
    own_states.py objects with a state_dict() that no checkpoint holds
    strangers.py  objects of libraries, which are named
    functions.py  schedules and optimizers
    settings.py   modes, and what is trained
    buffers.py    buffers that each rank has for itself
    reach.py      where such things may be
    objects.py    which objects are the program's own
    variables.py  what code keeps in variables of closures, files and classes
    crowds.py     long lists of objects
    flags.py      what says that something was made, and is of no use without it
    contents.py   what such a list or array holds, and whether it has changed
    plain_contents.py  the same as plain types, and back in its place
    rows.py       long lists as one row of bytes
    mappings.py   which kind of dictionary one is
    tensors.py    tensors, and those in lists and dictionaries
    records.py    what a module only notes, and what it goes on with

And:

    rng.py        the process's generators
    reduction.py  the order in which gradients are summed over ranks
"""
