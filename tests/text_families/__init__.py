"""Tiny text-only decoders, a file a kind; the laws of methods for text run over all of them."""
