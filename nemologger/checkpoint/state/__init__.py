"""What is in a checkpoint.

snapshot.py    tensors under flat keys, and everything else
plain.py       everything else, as plain types
optimizers.py  an optimizer's state for an optimizer of the same parameters
shards.py      the part of a tensor that a rank holds
shares.py      who writes what of it
stage.py       a piece of a tensor as bytes in memory
collector.py   many objects made at once
"""
