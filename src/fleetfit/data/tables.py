"""Where rows come from: files and folders, a local copy of a data set of the hub, the hub, or a Python function."""

import hashlib
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fleetfit.config.sections import DataConfig
from fleetfit.data.file_tables import as_written, check_alike, first_line, is_plain_csv, read_files
from fleetfit.data.named_files import digest_of_files
from fleetfit.data.row_files import READERS, Read, as_dataset

log = logging.getLogger(__name__)

ROOT_VARIABLE = "FLEETFIT_DATA"
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/\t\n\r\f\v\b\a].*|[A-Za-z]:$", re.DOTALL)
HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
GIVEN = "input"  # the column that a function's inputs become

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Table:
    """Rows of a source.

    Attributes:
        rows: A ``datasets.Dataset``, memory-mapped where it comes from typed files.
        fingerprint: Changes with the content, whatever the files are called and wherever they are; with that of
            files that the rows name, see ``with_files_of``.
        origin: Where the rows came from, for a person.
        folder: What relative paths in the rows start from.
        given: Columns that a function gave as they are.
        as_text: Values are text as it is written in a file without types.
        mixed: Columns that are not in the rows, since they hold values of several types, and which.
        class_rule: How the classes of a folder of images were found.
        num_files: How many files the rows are of.
        left_out: What of the source is not in the rows, by why.
        notes: How it was read, for a person.
        digested: Absolute paths of files that the rows name whose content is in the fingerprint already.
    """

    rows: Any
    fingerprint: str
    origin: str
    folder: Path | None = None
    given: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    as_text: bool = False
    mixed: Mapping[str, str] = field(default_factory=dict)
    class_rule: str = ""
    num_files: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    digested: frozenset[str] = frozenset()

    def with_files_of(self, column: str) -> "Table":
        """The same rows; the fingerprint changes with the content of the files that a column names, too."""
        digest = digest_of_files(self.rows, self.given.get(column), column, self.folder, self.digested)
        return replace(self, fingerprint=_hash([self.fingerprint, digest])) if digest else self

    def column(self, name: str) -> list[Any]:
        """A whole column of small values."""
        if name in self.given:
            return list(self.given[name])
        values: list[Any] = self.rows.select_columns([name]).with_format(None)[:][name]
        return values

    def number_kind(self, name: str) -> "np.dtype[Any] | None":
        """What numbers a column of nested lists holds, by its type; None: it holds no such lists, or values say it."""
        feature: Any = None if name in self.given else self.rows.features.get(name)
        while getattr(feature, "feature", None) is not None:
            feature = feature.feature
        try:
            kind: np.dtype[Any] = np.dtype(feature.dtype)
        except (AttributeError, TypeError):
            return None
        return kind

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


def open_table(config: DataConfig, cache: Path, tell: Tell, known: Sequence[str] = ()) -> Table:
    """The rows that a job names: all splits of it, joined, or those that the job chooses.

    Args:
        config: The job's data.
        cache: Where tables of typed files are kept, memory-mapped, by their content.
        tell: Told in words what takes long.
        known: Names of the classes, if they are.

    Raises:
        ValueError: no such file, folder or function, no such data set, no network; rows that cannot be read or joined.
        ImportError: a spreadsheet, and no reader for it is installed.
    """
    said = f"data.source = {config.source!r}"
    with _calm():
        if FUNCTION.fullmatch(config.source):
            return _of_function(config, said)
        place, origin = _find(config, said)
        if place:
            tell(f"reading {origin}")
            read, digest, folder = read_files(place, config, cache, said, known)
        else:
            tell("asking the Hugging Face hub")
            (read, digest), folder = _of_hub(config, cache, said), None
            origin = f"the Hugging Face hub ({config.source})"
        log.info("%s: taken from %s", said, origin)
        rows, chosen = _joined(read.splits, config.splits, said)
        return Table(
            rows,
            _hash([digest, chosen, config.separator, config.encoding, config.class_folder]),
            origin,
            folder,
            as_text=read.as_text,
            mixed=read.mixed,
            class_rule=read.class_rule,
            num_files=read.num_files,
            left_out=read.left_out.counts,
            notes=tuple(read.notes),
            digested=read.digested,
        )


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
    if WINDOWS_PATH.fullmatch(config.source):
        raise ValueError(
            f"{said} is a path of Windows, and not here; in a job's double quotes a backslash begins a sign such as "
            "\\n: write it in single quotes, or with /"
        )
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
        check_alike((f"the split {name}", splits[name].features) for name in chosen)
        rows = concatenate_datasets([splits[name] for name in chosen])
    except Exception as error:  # of datasets or of pyarrow, by what differs
        raise ValueError(f"{said}: its splits have different columns; choose some with data.splits: {error}") from error
    if not len(rows):
        raise ValueError(f"{said} has no rows")
    return rows, chosen


# -- the hub ----------------------------------------------------------------------------------------------------------


def _of_hub(config: DataConfig, cache: Path, said: str) -> tuple[Read, str]:
    from datasets import load_dataset_builder

    try:
        subset, folder = config.subset or None, str(cache / "tables" / "hub")
        builder = as_written(
            load_dataset_builder(config.source, subset),
            lambda: load_dataset_builder(config.source, subset, cache_dir=folder),
        )
        builder.download_and_prepare()
        read = Read(builder.as_dataset(), 0, as_text=is_plain_csv(builder))
        return read, f"{config.source} {builder.config.name} {builder.hash}"
    except Exception as error:  # of datasets, of the hub's client, of the network
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{said} is no file or folder here, and could not be had from the Hugging Face hub: {first_line(error)}. "
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
    # One by one: an array of 1 and "1" would make them alike.
    plain = [value.item() if isinstance(value, np.generic | np.ndarray) else value for value in labels]
    rows, mixed = as_dataset({"label": plain, "row": range(len(plain))}, as_text=False)
    digest = hashlib.sha256(json.dumps([repr(value) for value in plain]).encode())
    for value in inputs:
        array = str(value) if isinstance(value, str | Path) else np.asarray(value)
        digest.update(repr(array).encode() if isinstance(array, str) else f"{array.dtype}{array.shape}".encode())
        digest.update(b"" if isinstance(array, str) else array.tobytes())
    return Table(rows, digest.hexdigest(), origin, Path.cwd(), {GIVEN: inputs}, mixed=mixed)


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
