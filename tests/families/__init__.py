"""Tiny random models, one file a family; found by themselves. See ``tests/tiny.py``."""
