"""Readers and loaders behind `datasets.py`."""
