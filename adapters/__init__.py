"""Model families, one file each. A new family is a new file with ``ADAPTERS``; nothing is listed here."""
