"""Callbacks that can be used alone in ``Trainer(callbacks=[...])``."""
