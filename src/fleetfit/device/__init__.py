"""A device: the only code that sees private data."""
