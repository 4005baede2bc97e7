"""Where the training loaders of a fit are, and how they get there again.

session.py    all loaders of one fit, and the generators between them
loader.py     what Lightning sees instead of a loader
feed.py       where one loader is, and how it gets there again
position.py   the same as values that a checkpoint can hold
sources.py    one way to begin for each kind of loader; source.py: what they have in common
drawn.py      what a sampler has drawn, and drawing it once more
described.py  what tells one dataset from another
orders.py     the order of an epoch, on another number of ranks
in_worker.py  what changes in a worker process, and is told
earlier.py    checkpoints of earlier versions
"""
