"""Object stores, behind fsspec: ``s3://``, ``gs://``, ``memory://`` and whatever else it knows.

A ``client`` is what fsspec opens; the ``store`` calls it, again if need be. A ``path`` reads as those of pathlib do, and
``remote_disk`` writes, links and removes as a local disk does. Above, nobody asks which of the two a checkpoint is on. The
``owner`` of a directory is the run that has begun there last.
"""
