"""Tiny vision towers, one file a host library; found by themselves. See ``tests/tiny_vit.py``."""
