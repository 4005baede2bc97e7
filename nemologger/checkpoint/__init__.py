"""The checkpoint engine: writes, finds, verifies, prunes and loads checkpoints. It knows no Lightning.

A save goes through one file per stage: ``snapshot`` (what is saved), ``weights`` (where each byte goes), ``stage`` (its
bytes in memory), ``write`` (into files), ``commit`` (published, or absent); ``saver`` runs them and ``retention`` decides
what may go. A resume goes through ``find`` (which checkpoint), ``verify`` (is it whole) and ``load``.
"""
