"""What a run was made of: constructor arguments, captured as objects are made, written with each checkpoint, read back.

:mod:`nemologger.io` has the names that users need.
"""
