"""Labels as text."""

import unicodedata

UNSEEN = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))  # signs of no width


def tidy(name: str) -> str:
    """A label without what cannot be seen: spare white space, and Unicode's several ways to write one letter."""
    return " ".join(unicodedata.normalize("NFC", name).translate(UNSEEN).split())
