"""Skipping: tokens, modules and layers that do not run, for text and while decoding."""
