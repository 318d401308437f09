"""Where rows come from: files and folders, a local copy of a data set of the hub, the hub, or a Python function."""

import glob
import hashlib
import importlib
import json
import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fleetfit.config import DataConfig

log = logging.getLogger(__name__)

READERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".arrow": "arrow",
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHOWN = 5
ROOT_VARIABLE = "FLEETFIT_DATA"
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
GIVEN = "input"  # the column that a function's inputs become

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Table:
    """Rows of a source.

    Attributes:
        rows: A ``datasets.Dataset``, memory-mapped where it comes from files.
        fingerprint: Changes with the content, whatever the files are called and wherever they are.
        origin: Where the rows came from, for a person.
        folder: What relative paths in the rows start from.
        given: Columns that a function gave as they are.
    """

    rows: Any
    fingerprint: str
    origin: str
    folder: Path | None = None
    given: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def column(self, name: str) -> list[Any]:
        """A whole column of small values."""
        if name in self.given:
            return list(self.given[name])
        values: list[Any] = self.rows.select_columns([name]).with_format(None)[:][name]
        return values

    def chunks(self, name: str, rows: Sequence[int], size: int) -> Iterator[list[Any]]:
        """Some rows of a column of large values, in order, a few at a time; images stay encoded."""
        from datasets import Image

        if name in self.given:
            for start in range(0, len(rows), size):
                yield [self.given[name][row] for row in rows[start : start + size]]
            return
        kept = self.rows.select_columns([name])
        if isinstance(kept.features[name], Image):
            kept = kept.cast_column(name, Image(decode=False))
        if len(rows) < len(kept):
            kept = kept.select(rows)
        for part in kept.with_format(None).iter(size):
            yield part[name]


def open_table(config: DataConfig, cache: Path, tell: Tell) -> Table:
    """The rows that a job names: all splits of it, joined, or those that the job chooses.

    Args:
        config: The job's data.
        cache: Where tables that were read from files are kept, memory-mapped.
        tell: Told in words what takes long.

    Raises:
        ValueError: no such file, folder or function, no such data set, no network; rows that cannot be read or joined.
    """
    said = f"data.source = {config.source!r}"
    with _calm():
        if FUNCTION.fullmatch(config.source):
            return _of_function(config, said)
        place, origin = _find(config, said)
        if place:
            tell(f"reading {origin}")
            splits, digest, folder = _of_files(place, config, cache, said)
        else:
            tell("asking the Hugging Face hub")
            splits, digest, folder = _of_hub(config, said)
            origin = f"the Hugging Face hub ({config.source})"
        log.info("%s: taken from %s", said, origin)
        rows, chosen = _joined(splits, config.splits, said)
        return Table(rows, _hash([digest, chosen]), origin, folder)


# -- what is meant ----------------------------------------------------------------------------------------------------


def _find(config: DataConfig, said: str) -> tuple[list[Path], str]:
    """The file, folder or files that the source names, and its words for a person; none for a data set of the hub."""
    path = Path(config.source).expanduser()
    if path.exists():
        return [path], str(path)
    if any(sign in config.source for sign in "*?["):
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path)))
        if not found:
            raise ValueError(f"{said}: no file here fits this pattern")
        return found, f"{len(found)} files {config.source}"
    variable = os.environ.get(ROOT_VARIABLE, "")
    root, named = (config.root, "data.root") if config.root else (variable, ROOT_VARIABLE)
    if root:
        base = Path(root).expanduser()
        if not base.is_dir():
            raise ValueError(f"{named} = {root!r} is no folder")
        for name in dict.fromkeys((config.source, config.source.rpartition("/")[2])):
            if HUB_ID.fullmatch(name) and (base / name).exists():
                return [base / name], f"the local copy {base / name} ({named})"
        log.info("%s: no copy of it in %s (%s)", said, base, named)
    if path.suffix in READERS or not HUB_ID.fullmatch(config.source):
        raise ValueError(
            f"{said} is no file or folder here, no module:function, and cannot be the id of a data set on the hub"
        )
    return [], ""


def _joined(splits: Mapping[str, Any], wanted: Sequence[str], said: str) -> tuple[Any, list[str]]:
    from datasets import concatenate_datasets

    for name in wanted:
        if name not in splits:
            raise ValueError(f"data.splits: {said} has no split {name!r}; there are {', '.join(splits)}")
    chosen = list(wanted or splits)
    try:
        rows = concatenate_datasets([splits[name] for name in chosen])
    except Exception as error:  # of datasets or of pyarrow, by what differs
        raise ValueError(f"{said}: its splits have different columns; choose some with data.splits: {error}") from error
    if not len(rows):
        raise ValueError(f"{said} has no rows")
    return rows, chosen


# -- files ------------------------------------------------------------------------------------------------------------


def _of_files(
    places: list[Path], config: DataConfig, cache: Path, said: str
) -> tuple[Mapping[str, Any], str, Path | None]:
    place, subset = places[0], config.subset
    if place.is_dir() and subset and (place / subset).is_dir():
        place, subset = place / subset, ""
    folder = place if place.is_dir() else place.parent
    files = sorted(_seen(place)) if place.is_dir() else places
    if not files:
        raise ValueError(f"{said}: {place} is empty")
    digest = _digest(files, folder, cache)
    try:
        return _read(place, files, subset, str(cache / "tables" / digest[:16])), f"{digest} {subset}", folder
    except Exception as error:  # of datasets, of pyarrow, of pandas
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{said}: {place} cannot be read: {_first_line(error)}") from error


def _seen(folder: Path) -> Iterator[Path]:
    """All files below a folder, but hidden ones."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _read(place: Path, files: Sequence[Path], subset: str, tables: str) -> Mapping[str, Any]:
    """Splits by name: of a folder that ``save_to_disk`` wrote, of a copy of a hub repository, or of plain files."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    if any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        saved = load_from_disk(str(place))
        return saved if isinstance(saved, DatasetDict) else {"all": saved}
    page = place / "README.md"
    if page.exists() and page.read_text(encoding="utf-8", errors="replace").startswith("---"):
        described: Mapping[str, Any] = load_dataset(str(place), subset or None, cache_dir=tables)
        return described  # by the repository's own description of its files
    kind, readable = _kind(place, files)
    splits: dict[str, list[str]] = {name: [] for name in ("train", "validation", "test")}
    for file in readable:
        splits[_split_of(file, place, readable, kind)].append(glob.escape(str(file)))
    splits = {name: there for name, there in splits.items() if there}
    more = {"sep": "\t"} if readable[0].suffix.lower() == ".tsv" else {}
    # Ours, not those that datasets finds: it takes /home/test/data/train.csv for a test split.
    found: Mapping[str, Any] = load_dataset(kind, data_files=splits, cache_dir=tables, **more)
    return found


def _kind(place: Path, files: Sequence[Path]) -> tuple[str, list[Path]]:
    """How to read some files, and which of them: of a folder those of the commonest kind."""
    from PIL import Image

    pictures = dict.fromkeys(Image.registered_extensions(), "imagefolder")
    kinds = [(pictures | READERS).get(file.suffix.lower(), "") for file in files]
    known = Counter(kind for kind in kinds if kind)
    if not known or (not place.is_dir() and len(set(kinds)) > 1):
        names = ", ".join(sorted({file.suffix or file.name for file in files})[:SHOWN])
        raise ValueError(f"files must be images, or of one kind of {', '.join(READERS)}, got {names}")
    ((kind, _),) = known.most_common(1)
    also = METADATA if kind == "imagefolder" else ()
    return kind, [file for file, its in zip(files, kinds, strict=True) if its == kind or file.name in also]


def _split_of(file: Path, place: Path, files: Sequence[Path], kind: str) -> str:
    """The split that a file belongs to by its name or its folder's; folders of images may also be classes."""
    if not place.is_dir():
        return "train"  # as datasets calls what is not split
    inside = file.relative_to(place).parts
    if kind == "imagefolder":
        first = {f.relative_to(place).parts[0] for f in files}
        return SPLIT_WORDS[inside[0].lower()] if all(n.lower() in SPLIT_WORDS for n in first) else "train"
    words = [word for part in reversed(inside) for word in re.split(r"[^a-z]+", part.lower())]
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")


def _digest(files: Sequence[Path], folder: Path, cache: Path) -> str:
    """Of the content of files and their names in the folder; remembered for files that did not change since."""
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    note = cache / "digests" / _hash(stats)
    if note.exists():
        return note.read_text()
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            name = path.relative_to(folder) if len(files) > 1 else ""  # it may be a class, or say the order
            digest.update(f"{name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
    note.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as temporary:
        temporary.write(digest.hexdigest())
    os.replace(temporary.name, note)
    return digest.hexdigest()


# -- the hub ----------------------------------------------------------------------------------------------------------


def _of_hub(config: DataConfig, said: str) -> tuple[Mapping[str, Any], str, Path | None]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(config.source, config.subset or None)
        builder.download_and_prepare()
        return builder.as_dataset(), f"{config.source} {builder.config.name} {builder.hash}", None
    except Exception as error:  # of datasets, of the hub's client, of the network
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{said} is no file or folder here, and could not be had from the Hugging Face hub: {_first_line(error)}. "
            f"{_offline(config)}"
        ) from error


def _offline(config: DataConfig) -> str:
    import datasets

    name = config.source.rpartition("/")[2]
    return (
        f"Data sets that were had before are in {datasets.config.HF_DATASETS_CACHE}; with HF_HUB_OFFLINE=1 nothing "
        f"else is tried. Without a network, put its files into a folder {name!r}, and name the folder around that in "
        f"the variable {ROOT_VARIABLE} or in data.root."
    )


# -- a function -------------------------------------------------------------------------------------------------------


def _of_function(config: DataConfig, said: str) -> Table:
    from datasets import Dataset, DatasetDict

    module, _, name = config.source.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # an installed program does not look there by itself
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{said}: the module cannot be imported: {error}") from error
    except AttributeError:
        raise ValueError(f"{said}: {module} has no {name!r}") from None
    finally:
        sys.path.pop(0)
    result = function()
    origin = f"the function {config.source}"
    if isinstance(result, (Dataset, DatasetDict)):
        splits = result if isinstance(result, DatasetDict) else {"all": result}
        rows, chosen = _joined(splits, config.splits, said)
        return Table(rows, _hash([_digest_of_rows(rows), chosen]), origin)
    if not (isinstance(result, tuple) and len(result) == 2):
        kind = type(result).__name__
        raise ValueError(f"{said} must return a datasets.Dataset, or a pair (inputs, labels), got a {kind}")
    inputs, labels = result
    if len(inputs) != len(labels):
        raise ValueError(f"{said} returned {len(inputs)} inputs and {len(labels)} labels")
    rows = Dataset.from_dict({"label": np.asarray(labels).tolist()})
    digest = hashlib.sha256(json.dumps(rows[:]["label"]).encode())
    for value in inputs:
        digest.update(value.encode() if isinstance(value, str) else np.asarray(value).tobytes())
    return Table(rows, digest.hexdigest(), origin, Path.cwd(), {GIVEN: inputs})


def _digest_of_rows(rows: Any) -> str:
    """Of the content of a table in memory or on disk."""
    import pyarrow as pa

    class Sink:
        closed = False

        def __init__(self) -> None:
            self.digest = hashlib.sha256()

        def write(self, data: Any) -> int:
            self.digest.update(data)
            return len(data)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    sink, table = Sink(), None
    for table in rows.with_format("arrow").iter(1000):
        with pa.ipc.new_stream(pa.PythonFile(sink, "w"), table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata().combine_chunks())
    return sink.digest.hexdigest()


# -- for all of them --------------------------------------------------------------------------------------------------


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    """What went wrong in the end: datasets wraps it in sentences that say nothing."""
    while error.__cause__ is not None and type(error).__name__.startswith("DatasetGeneration"):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _calm() -> Iterator[None]:
    """No bars; what matters of the libraries' warnings is an error here."""
    from datasets.utils import logging as datasets_logging

    level, bars = datasets_logging.get_verbosity(), datasets_logging.is_progress_bar_enabled()
    retries = logging.getLogger("huggingface_hub")
    before = retries.level
    datasets_logging.set_verbosity(logging.CRITICAL)
    datasets_logging.disable_progress_bar()
    retries.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(level)
        retries.setLevel(before)
        if bars:
            datasets_logging.enable_progress_bar()
