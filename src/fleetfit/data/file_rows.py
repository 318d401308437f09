"""What the reader of one file of rows gives, and how the file's bytes become text."""

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BOM = "\ufeff"
WESTERN = "cp1252"
MOST_LUCKY = 0.1  # share of lines (words) that are valid UTF-8 (look like another encoding) by chance: Spaß“ is
MOST_FOREIGN = 0.25  # share of letters outside ASCII in Western languages: below a sixth in all that were looked at
ODD = re.compile(  # as cp1252 has words of other encodings: of accented letters alone, or with signs behind letters
    r"\b[À-ÖØ-öø-ÿŠŽŒšžœŸ]{2,}\b|[^\W\d_][‚„¿¡¶¤¦¨¬¯±¸¼]|[a-zß-öø-ÿ][ŠŽŒŸ]"
)
EXAMPLE = 12  # characters shown on either side


@dataclass(frozen=True)
class FileRows:
    """Rows of one file by column, as they are written there.

    Attributes:
        columns: Values of all rows, by the column's name.
        as_text: Every value is text, whatever it looks like: the file has no types.
        blank_rows: How many rows without any value were left out.
        notes: How the file was read, for a person.
    """

    columns: Mapping[str, Sequence[Any]]
    as_text: bool
    blank_rows: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0


def read_text(path: Path, encoding: str = "") -> tuple[str, str]:
    """The text of a file, and its encoding in words; line ends stay as they are.

    Without ``encoding``: what a byte order mark says, else UTF-8, else cp1252 if most letters are ASCII then, as in
    Western languages, and no other lines are UTF-8; nothing else can be told from it.

    Raises:
        ValueError: no text, or of an encoding that has to be given; names the file.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    named = next((name for mark, name in BOMS if content.startswith(mark)), "")
    if encoding:
        text = _decoded(content, encoding, path)
        _check_encoding(content, encoding, named, path)
        return text.lstrip(BOM), encoding
    if named:
        told = "UTF-8 with BOM" if named == "utf-8-sig" else named.upper()
        return _decoded(content, named, path).lstrip(BOM), told  # twice, if files were joined
    if b"\0" in content:
        return _without_mark(content, path), "UTF-16 without BOM"
    try:
        return content.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    said = f"{path} is not UTF-8 (line {line})"
    odd = [part for part in content.split(b"\n") if not part.isascii()]
    others = sum(_is_utf8(part) for part in odd)
    if others > MOST_LUCKY * len(odd):
        raise ValueError(f"{said}, but {others:,} other lines are: it is in several encodings; save it as UTF-8")
    try:
        text = content.decode(WESTERN)
    except UnicodeDecodeError:
        raise ValueError(f"{said}, and not {WESTERN}; say what it is with data.encoding") from None
    letters = sum(character.isalpha() for character in text)
    foreign = sum(character.isalpha() and not character.isascii() for character in text)
    if foreign > MOST_FOREIGN * letters:
        raise ValueError(
            f"{said}; as {WESTERN} {foreign / letters:.0%} of its letters are accented ({_example(text)!r}), as no "
            "Western language has them; say what it is with data.encoding"
        )
    words = [word for word in text.split() if not word.isascii()]
    odd_words = [word for word in words if ODD.search(word)]
    if len(odd_words) > MOST_LUCKY * len(words):
        raise ValueError(
            f"{said}; as {WESTERN} it has words like {odd_words[0][-2 * EXAMPLE :]!r}, which no Western language has; "
            "say what it is with data.encoding"
        )
    return text, f"{WESTERN}, since it is no UTF-8 (line {line} is {_example(text)!r} so)"


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding)
    except LookupError:
        raise ValueError(f"data.encoding = {encoding!r} is no encoding that Python knows") from None
    except UnicodeError as error:
        raise ValueError(f"{path} is not {encoding}: {error}") from None


def _check_encoding(content: bytes, encoding: str, named: str, path: Path) -> None:
    """Raises where a file says itself that it is in another encoding than the job has it."""
    said = codecs.lookup(encoding).name
    mark = named.removesuffix("-sig")
    if mark and not said.startswith(mark):
        raise ValueError(f"{path} begins with the mark of {mark.upper()}, but data.encoding = {encoding!r}")
    if not said.startswith("utf") and not content.isascii() and _is_utf8(content):
        example = _example(content.decode("utf-8"))
        raise ValueError(f"{path} is UTF-8 ({example!r}), but data.encoding = {encoding!r}")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _without_mark(content: bytes, path: Path) -> str:
    """UTF-16 that does not say so has a zero in nearly every second byte of Western text."""
    zeros = [content[start::2].count(0) / max(1, len(content) // 2) for start in (0, 1)]
    for share, other, encoding in ((zeros[1], zeros[0], "utf-16-le"), (zeros[0], zeros[1], "utf-16-be")):
        if share > 0.5 and other < 0.05 and len(content) % 2 == 0:
            return _decoded(content, encoding, path)
    raise ValueError(f"{path} is no text: it has zero bytes; if it is one, say how with data.encoding")


def _example(text: str) -> str:
    """The first characters outside ASCII, with their neighbours."""
    place = next(i for i, character in enumerate(text) if not character.isascii())
    return " ".join(text[max(0, place - EXAMPLE) : place + EXAMPLE].split())


def shown(values: Sequence[object], most: int = 5) -> str:
    """Some of the values, for a message."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(repr(v) for v in values[:most]) + more


@dataclass
class LeftOut:
    """Counts of what is not used, by why."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, why: str, number: int) -> None:
        """Count some more; none leaves no trace."""
        if number:
            self.counts[why] = self.counts.get(why, 0) + number
