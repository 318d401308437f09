"""Files that the values of a column name: where they are, and a digest of what is in them."""

import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHUNK = 1000
THREADS = 4


def locate(folder: Path | None, name: str | Path) -> Path:
    """Where a file is: as it is named, or else without white space around, and with / for the \\ of Windows."""
    base = Path(folder or ".")
    path = base / name
    if path.exists():
        return path
    other = base / str(name).strip().replace("\\", "/")
    return other if other.exists() else path


def digest_of_files(rows: Any, given: Sequence[Any] | None, column: str, folder: Path | None, known: Set[str]) -> str:
    """Of the content of all files that a column names, which are read anew each time; empty: it names none.

    Args:
        rows: A ``datasets.Dataset``.
        given: The column's values, if they are not in it.
        column: Which column.
        folder: What relative paths start from.
        known: Absolute paths of files whose content is known to be the same.
    """
    digest, number = hashlib.sha256(), 0

    def content(name: str) -> str:
        try:
            with locate(folder, name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError):
            return ""  # it cannot be read now; if it can be later, that is another content

    with ThreadPoolExecutor(THREADS) as pool:
        for names in _names(rows, given, column):
            wanted = [name for name in names if name not in known]
            number += len(wanted)
            digest.update(json.dumps([wanted, list(pool.map(content, wanted))]).encode())
    return digest.hexdigest() if number else ""


def _names(rows: Any, given: Sequence[Any] | None, column: str) -> Iterator[list[str]]:
    """What the values name, where they are not the files themselves, some at a time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if given is not None:
        yield [str(value) for value in given if isinstance(value, str | Path)]
        return
    for part in rows.select_columns([column]).with_format("arrow").iter(CHUNK):
        values = part.column(0).combine_chunks()
        if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
            paths = pc.struct_field(values, "path")
            if values.type.get_field_index("bytes") >= 0:
                paths = paths.filter(pc.is_null(pc.struct_field(values, "bytes")))
            values = paths
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            yield [name for name in values.to_pylist() if name is not None]
