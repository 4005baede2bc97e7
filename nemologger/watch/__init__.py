"""Watching ranks: which of them is slow, and which has stopped. Knows no Lightning."""
