"""What is worth telling a person about many decoded pictures, before a model learns from them."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field

from fleetfit.core.records import Record
from fleetfit.data.pixels import FLAT, Decoded

SHOWN = 3
NEARLY_ALL = 0.99
ENOUGH = 10  # pictures: fewer may well be alike
DIM_DEEP = 64  # of 255: what 14 bits reach in a file of 16


class Place(Record):
    """Where a picture comes from: a file of its own, or a row.

    ``file`` is its path from the source's folder; of a picture within a table, how its file was called.
    """

    row: int
    file: str = ""
    own: bool = False

    def words(self, folder: Path | None) -> str:
        """For a person."""
        if self.own:
            return str(Path(folder or ".", self.file))
        return f"row {self.row} ({self.file})" if self.file else f"row {self.row}"


def place_of(value: Any, row: int, folder: Path | None) -> Place:
    """Of a value of a column of pictures."""
    path, within = value, False
    if isinstance(value, dict):
        path, within = value.get("path"), value.get("bytes") is not None
    if not isinstance(path, str | Path) or not str(path):
        return Place(row=row)
    if within:
        return Place(row=row, file=Path(path).name)
    base = Path(folder or ".").absolute()
    whole = Path(base, path)
    return Place(row=row, file=str(whole.relative_to(base) if whole.is_relative_to(base) else path), own=True)


class Some(Record):
    """Some of the pictures: how many, and the first of them."""

    number: int = 0
    first: tuple[Place, ...] = ()


class PictureFacts(Record):
    """What came out of decoding; kept beside the pixels.

    Attributes:
        bad: Which of the pictures cannot be read.
        problems: The first of these, and what is wrong with each.
        bytes_per_image: What an encoded picture weighs, on average.
        kinds: How many pictures were kept in which way.
        range: The smallest and the largest value of a pixel, after decoding.
        flat: Pictures of (nearly) one colour.
        twins: Pictures that are identical to another one; the first two.
        frames: Pictures that are the first of several in their file.
        on_white: Pictures with transparent parts, which were laid on white.
        on_black: Those laid on black.
        deep: Pictures of 16 bits, if no pixel of them is bright.
    """

    bad: tuple[Annotated[int, Field(ge=0)], ...]
    problems: tuple[tuple[Place, str], ...]
    bytes_per_image: int
    kinds: dict[str, int]
    range: tuple[int, int]
    flat: Some
    twins: Some
    frames: Some
    on_white: Some
    on_black: Some
    deep: Some

    def notes(self, folder: Path | None) -> tuple[str, ...]:
        """Sentences for a person."""
        good = sum(self.kinds.values())
        notes = []

        def tell(some: Some, words: str) -> None:
            if some.number:
                first = " and ".join(place.words(folder) for place in some.first)
                notes.append(f"{some.number:,} of {good:,} pictures {words}, the first {first}")

        if self.bad:
            told = told_problems(self.problems, len(self.bad), folder)
            notes.append(f"cannot be read: {told}")
        tell(self.flat, "are (nearly) of one colour")
        tell(self.twins, "are identical to another one")
        tell(self.deep, f"have 16 bits, and none is brighter than {DIM_DEEP} of 255: of 14 bits or fewer?")
        tell(self.frames, "are the first of several in their file; the others are not used")
        tell(self.on_white, "have transparent parts and are laid on white")
        tell(self.on_black, "have transparent parts and are laid on black")
        return tuple(notes)


def told_problems(problems: Sequence[tuple[Place, str]], number: int, folder: Path | None) -> str:
    """The first pictures that cannot be read, of a number of them, and why."""
    more = "; ..." if number > len(problems) else ""
    return "; ".join(f"{place.words(folder)}: {problem}" for place, problem in problems) + more


class Tally:
    """Counts pictures as they are decoded.

    Args:
        channels: Of each.
        white: The largest value that a pixel can have, where that is less than 255: 16 in digits kept as they are.
    """

    def __init__(self, channels: int, white: float = 255) -> None:
        self._channels = channels
        self._flat = FLAT * min(white, 255) / 255
        self._bad: list[int] = []
        self._problems: list[tuple[Place, str]] = []
        self._weight = self._done = 0
        self._kinds: Counter[str] = Counter()
        self._some: dict[str, list[int]] = {"frames": [], "on_white": [], "on_black": [], "deep": []}
        self._brightest_deep = 0
        self._good: list[int] = []
        self._extremes = bytearray()
        self._digests = bytearray()

    @property
    def num_bad(self) -> int:
        """Pictures that cannot be read, so far."""
        return len(self._bad)

    def add_bad(self, place: Place, problem: str) -> None:
        """A picture that cannot be read."""
        self._bad.append(self._done)
        self._done += 1
        if len(self._problems) < SHOWN:
            self._problems.append((place, problem))

    def add(self, found: Decoded, weight: int, digest: bytes) -> None:
        """A picture, what it weighed when encoded, and ``digest_of`` its pixels."""
        self._good.append(self._done)
        self._weight += weight
        self._kinds[found.kind] += 1
        self._extremes += found.extremes
        self._digests += digest
        deep = " 16 bit" in found.kind
        if deep:
            self._brightest_deep = max(self._brightest_deep, *found.extremes[self._channels :])
        for name, true in (("frames", found.frames), (f"on_{found.ground}", bool(found.ground)), ("deep", deep)):
            if true:
                self._some[name].append(self._done)
        self._done += 1

    def facts(self, place_at: Callable[[int], Place]) -> PictureFacts:
        """All of it.

        Args:
            place_at: Says where a picture is from, by its number.

        Raises:
            ValueError: (nearly) all pictures are of one colour, or identical.
        """
        extremes = np.frombuffer(self._extremes, np.uint8).reshape(-1, 2, self._channels).astype(np.int64)
        low, high = extremes[:, 0], extremes[:, 1]
        flat = (high - low).max(1, initial=0) <= self._flat
        _, group, sizes = np.unique(np.frombuffer(self._digests, np.uint64), return_inverse=True, return_counts=True)
        twin = sizes[group] > 1
        if len(flat) >= ENOUGH:
            self._refuse(low, high, flat, sizes)
        good = np.array(self._good, np.int64)
        numbers = {**self._some, "flat": good[flat].tolist(), "twins": good[twin].tolist()}
        if self._brightest_deep > DIM_DEEP:
            numbers["deep"] = []
        some = {name: Some(number=len(all_), first=tuple(map(place_at, all_[:1]))) for name, all_ in numbers.items()}
        if twin.any():
            pair = good[group == group[twin.argmax()]][:2].tolist()
            some["twins"] = Some(number=int(twin.sum()), first=tuple(map(place_at, pair)))
        return PictureFacts(
            bad=tuple(self._bad),
            problems=tuple(self._problems),
            bytes_per_image=round(self._weight / max(1, len(self._good))),
            kinds=dict(self._kinds),
            range=(int(low.min(initial=255)), int(high.max(initial=0))),
            **some,
        )

    def told_problems(self, folder: Path | None) -> str:
        """The first pictures that cannot be read, and why."""
        return told_problems(self._problems, len(self._bad), folder)

    def _refuse(
        self,
        low: Int[np.ndarray, "picture channel"],
        high: Int[np.ndarray, "picture channel"],
        flat: Bool[np.ndarray, " picture"],
        sizes: Int[np.ndarray, " different"],
    ) -> None:
        """Pictures of which nothing can be learned."""
        middle = (low + high) / 2
        alike = flat & (np.abs(middle - np.median(middle, axis=0)).max(1) <= self._flat / 2)
        pixels = f"their pixels go from {int(low.min())} to {int(high.max())} of 0 to 255"
        for number, words in (
            (int(sizes.max()), "identical"),
            (int(alike.sum()), "(nearly) of one and the same colour"),
        ):
            if number >= NEARLY_ALL * len(flat):
                raise ValueError(
                    f"{number:,} of {len(flat):,} pictures are {words}, and nothing can be learned of them: {pixels}, "
                    f"kept as {', '.join(self._kinds)}. If they look right elsewhere, save them as 8 bits with white "
                    "at 255"
                )


def digest_of(pixels: bytes) -> bytes:
    """Eight bytes that no other pixels have, but by a chance of one to 2^64."""
    return hashlib.sha1(pixels, usedforsecurity=False).digest()[:8]
