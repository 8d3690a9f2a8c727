"""One published method a file, each with its ``CARD``. Files are found by themselves; nothing is listed here."""
