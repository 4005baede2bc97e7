"""A load.

load.py      a checkpoint back in memory
read.py      its tensors, from files: blocks.py, read and compared with their checksums on the way
fetch.py     its tensors, from a store
overlaps.py  which bytes
in_place.py  into which live tensors
"""
