"""Folders of images: which files are pictures, which folder of their paths is the class, tables of labels beside them.

The rule for the class, told with each run:

1. Folders named train, validation, test (or val, dev, training, ...) divide the pictures, if all at their level are so.
2. A folder that all pictures share, above or below the others, is neither a class nor a split.
3. The class is the first folder below that whose names differ.
4. Where a deeper folder's names differ too, they must look like sessions (a date, a number, "session 3"), or only some
   pictures have one. If they could as well be the classes, the job has to say so: ``data.class_folder``.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fleetfit.data.file_rows import LeftOut, shown
from fleetfit.data.label_text import tidy

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Pictures that Pillow alone does not read: of phones, and raw ones of cameras.
FOREIGN_PICTURES = {
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".svg"),
    *(".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf", ".rw2", ".raf", ".raw", ".pef"),
    *(".srw", ".x3f", ".3fr", ".erf", ".kdc", ".mrw", ".rwl", ".iiq"),
}
NO_PICTURES = {"PDF", "MPEG", "BUFR", "GRIB", "HDF5", "WMF", "EPS"}  # formats of Pillow that hold no pixels of a photo
LITTER = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"}
LITTER_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}
SESSION = re.compile(
    r"[\d\s._:T-]*\d[\d\s._:T-]*"  # a number, a date, a time
    r"|(session|sess|day|date|batch|part|take|run|seq|sequence|fold|week|month|year|trip|visit|cam|camera|shoot|roll|"
    r"series|recording|rec|scan|site|subject|subj|patient|person|user|device|dev|clip|video|vid|group|round|album)"
    r"[\s._-]*\w{0,3}",
    re.IGNORECASE,
)
MOST = 0.9  # of the pictures: the others may have been put elsewhere by mistake
METADATA = ("metadata.csv", "metadata.tsv", "metadata.json", "metadata.jsonl", "metadata.parquet")


@cache
def readable_endings() -> frozenset[str]:
    """Endings of files that hold pictures that can be read here."""
    from PIL import Image

    known = Image.registered_extensions()
    return frozenset(e for e, kind in known.items() if kind in Image.OPEN and kind not in NO_PICTURES)


def is_picture(path: Path) -> bool:
    """Whether a file is one by its ending; one without a known ending, by its first bytes."""
    ending = path.suffix.lower()
    if ending in readable_endings() or ending in FOREIGN_PICTURES:
        return True
    return not re.fullmatch(r"\.[a-z]\w{1,5}", ending) and _begins_as_picture(path)


def _begins_as_picture(path: Path) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path):
            return True
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def files_below(folder: Path) -> list[Path]:
    """All files, through links to folders too, but hidden ones and what systems leave behind.

    Raises:
        ValueError: a link leads back to a folder that it is in.
    """
    found: list[Path] = []
    for place, names, files in os.walk(folder, followlinks=True):
        here = Path(place)
        above = {os.path.realpath(p) for p in (here, *here.parents)}
        names[:] = sorted(n for n in names if not n.startswith(".") and n.lower() not in LITTER_FOLDERS)
        for name in names:
            if (here / name).is_symlink() and os.path.realpath(here / name) in above:
                raise ValueError(f"{here / name} links to a folder that it is in")
        found += [here / f for f in sorted(files) if not f.startswith((".", "~$")) and f.lower() not in LITTER]
    return sorted(found)


@dataclass(frozen=True)
class ImageFiles:
    """The pictures of a folder.

    Attributes:
        paths: Of all pictures.
        splits: Which split each is of.
        classes: The class of each; none where its place does not say.
        why: How the class was found; empty where there are none.
        notes: What else a person should know.
    """

    paths: tuple[Path, ...]
    splits: tuple[str, ...]
    classes: tuple[str | None, ...]
    why: str
    notes: tuple[str, ...]


def read_image_folder(
    folder: Path, pictures: Sequence[Path], class_folder: int | None = None, known: Sequence[str] = ()
) -> ImageFiles:
    """Splits and classes of pictures by their places below a folder, by the rule above.

    Args:
        folder: The source.
        pictures: Its pictures.
        class_folder: Which folder of a picture's path is its class, 1 for the first below the source (and below
            train, validation, test); None: found.
        known: Names of the classes, if they are: the folders whose names all are among them are the classes.

    Raises:
        ValueError: several levels of folders may be the classes.
    """
    parts = [path.relative_to(folder).parts[:-1] for path in pictures]
    splits = ["train"] * len(parts)
    notes: list[str] = []
    level = _split_level(parts)
    if level is not None:
        splits = [SPLIT_WORDS[p[level].lower()] if p else "train" for p in parts]
        parts = [p[:level] + p[level + 1 :] for p in parts]
        if level:
            notes.append(f"folders {shown(sorted(set(splits)))} below the classes divide the pictures")
    depth = max(map(len, parts))
    names = [_names_at(parts, i) for i in range(depth)]
    wanted = set(map(tidy, known))
    called = [i for i, there in enumerate(names) if there.total() == len(parts) and set(map(tidy, there)) <= wanted]
    if len(called) == 1:
        why = "the folder whose names are classes of the job"
        chosen = tuple(p[called[0]] for p in parts)
        return ImageFiles(tuple(pictures), tuple(splits), chosen, why, tuple(notes))
    if class_folder is not None:
        if class_folder > depth:
            raise ValueError(
                f"data.class_folder must be <= {depth}, the folders in the longest path, got {class_folder}"
            )
        return ImageFiles(
            tuple(pictures),
            tuple(splits),
            tuple(p[class_folder - 1] if len(p) >= class_folder else None for p in parts),
            f"folder {class_folder} of each path, as data.class_folder says",
            tuple(notes),
        )
    differing = [i for i, there in enumerate(names) if len(there) > 1]
    if not differing:
        why = "all in one folder" if depth or level is None else f"only {shown(sorted(set(splits)))} divide them"
        return ImageFiles(tuple(pictures), tuple(splits), (None,) * len(parts), why, tuple(notes))
    first, *deeper = differing
    why = "the first folder below the source whose names differ"
    for other in deeper:
        _check_deeper(parts, first, other, folder)
        notes.append(
            f"folders {shown(sorted(names[other]), 3)} below the classes are taken for sessions, not for classes"
        )
    classes = [p[first] if len(p) > first else None for p in parts]
    return ImageFiles(tuple(pictures), tuple(splits), tuple(classes), why, tuple(notes))


def _names_at(parts: Sequence[tuple[str, ...]], level: int) -> Counter[str]:
    return Counter(p[level] for p in parts if len(p) > level)


def _split_level(parts: Sequence[tuple[str, ...]]) -> int | None:
    """The level at which all folders are called like splits, if there are classes beside it."""
    parts = [p for p in parts if p]  # a picture beside the folders is of none
    for level in range(min(map(len, parts), default=0)):
        words = {p[level].lower() for p in parts}
        if all(word in SPLIT_WORDS for word in words):
            others = [p[:level] + p[level + 1 :] for p in parts]
            has_classes = any(len(_names_at(others, i)) > 1 for i in range(max(map(len, others))))
            return level if has_classes or len(words) == 1 or not any(others) else None
    return None


def _check_deeper(parts: Sequence[tuple[str, ...]], first: int, other: int, folder: Path) -> None:
    """Raises where the deeper level could as well be that of the classes."""
    upper, lower = _names_at(parts, first), _names_at(parts, other)
    has_split = any(name.lower() in SPLIT_WORDS for name in upper)
    if sum(lower.values()) < MOST * sum(upper.values()) and not has_split:
        return  # only some have such a folder: it can be no class
    if all(SESSION.fullmatch(name) for name in lower) and not all(SESSION.fullmatch(name) for name in upper):
        return
    raise ValueError(
        f"{folder}: two levels of folders may be the classes, {shown(sorted(upper))} and, below them, "
        f"{shown(sorted(lower))}; say which with data.class_folder = {first + 1} or {other + 1}"
    )


# -- what else lies there ---------------------------------------------------------------------------------------------


def without_sidecars(files: Sequence[Path], pictures: Sequence[Path]) -> list[Path]:
    """Files but those that describe a picture: of its name, in its folder, with another ending."""
    described = {path.with_suffix("") for path in pictures} | set(pictures)
    kept = set(pictures)
    return [f for f in files if f in kept or (f.with_suffix("") not in described)]


def count_others(files: Sequence[Path], used: Sequence[Path], left_out: LeftOut) -> None:
    """Note files that are neither data nor litter, by their ending."""
    taken = set(used)
    for ending, number in Counter(f.suffix.lower() or "no ending" for f in files if f not in taken).items():
        left_out.add(f"files that are no data here ({ending})", number)
