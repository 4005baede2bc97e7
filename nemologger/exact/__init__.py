"""Exact resume: a run that is stopped and continued sees the same batches and draws the same random numbers.

Nothing of the user's is asked to change. Each training loader is handed to Lightning in a thin wrapper that counts what
is taken from it, and knows the state of every random number generator at the moment an epoch began. That is what a
checkpoint holds; from it the loader is brought back to the same batch without loading those before it, where possible.

    loaders/          where the training loaders are, and how they get there again
    program/          what a program changes beside weights
    reach/            what can be reached from an object of a program
    values/           lists, dictionaries, arrays and tensors: whether they have changed, and what they hold as plain types
    rng.py            the process's generators
    buffers.py        buffers that each rank has for itself
    reduction.py      the order in which gradients are summed over ranks
    trained_steps.py  what the last steps came to, for a run that is killed to compare with
    port.py           what PyTorch's loaders keep to themselves
    workers.py        the same of their worker processes: seeds for each batch
"""
