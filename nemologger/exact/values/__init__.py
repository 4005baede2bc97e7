"""Lists, dictionaries, arrays, tensors, and what else is plain data.

contents.py        whether one has changed
plain_contents.py  what it holds as plain types, and back in its place
atoms.py           complex numbers, dates and the like
rows.py            long lists as one row of bytes
mappings.py        which kind of dictionary one is
tensors.py         tensors, and those in lists and dictionaries
"""
