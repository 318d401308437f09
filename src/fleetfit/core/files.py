"""Files and folders that appear whole or not at all; locks, hashes, JSON."""

import fcntl
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write a whole file or none: to a temporary neighbour, flushed to disk, then renamed.

    Args:
        path: The file.
        content: All of it; text in UTF-8.
        mode: Who may read and write it, less what the process's umask takes away.

    Raises:
        OSError: the disk is full, or the folder cannot be written; whatever was there before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's own. Linux tells it; elsewhere it can only be read by changing it for a moment."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except (OSError, ValueError):
        pass
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def others_may_write(path: Path, root: Path) -> Path | None:
    """The first of a file and the folders around it, up to ``root``, that somebody else could have written.

    That is who owns it, if not this user or the administrator; or anyone, if its mode says so. A group that is this
    user's alone, as many systems make for each, is no one else.
    """
    own = os.geteuid()
    around = [folder for folder in path.parents if folder == root or folder.is_relative_to(root)]
    for place in (path, *around):
        facts = place.stat() if place == root else place.lstat()  # where a cache is, its owner may well say by a link
        of_group = facts.st_mode & stat.S_IWGRP and not facts.st_gid == facts.st_uid == own
        if facts.st_uid not in (own, 0) or facts.st_mode & stat.S_IWOTH or of_group or stat.S_ISLNK(facts.st_mode):
            return place
    return None


def check_replaceable(path: Path, mark: str) -> None:
    """Raises ValueError if ``path`` is there and holds no file ``mark``, so that something else would be lost."""
    if path.exists() and not (path / mark).is_file():
        raise ValueError(f"{path} is there already and was not made by this command; choose another --out")


@contextmanager
def whole_folder(path: Path, mark: str) -> Iterator[Path]:
    """A folder to write into, which takes its name when all is well, and is gone when not.

    Args:
        path: The name. A folder of this name that holds ``mark`` is replaced.
        mark: A file that tells that a folder was made here.

    Raises:
        ValueError: there is something else of this name.
        OSError: the disk is full, or the folder cannot be written; whatever was there before is untouched.
    """
    check_replaceable(path, mark)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise


def locked(path: Path) -> IO[bytes]:
    """Hold a folder for one process; the lock goes with the process, also when it is killed."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"{path.parent} is in use by another fleetfit process") from None
    return file


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        ValueError: missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is {path.parent} the folder of a finished run?") from None
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is corrupt: a JSON object was expected, got {type(value).__name__}")
    return value


def content_hash(*parts: object) -> str:
    """Sixteen hex digits that change when any part does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys, with dots, whose values differ."""
    keys: list[str] = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            keys += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            keys.append(f"{prefix}{key}")
    return keys


def own_version() -> str:
    """fleetfit's version, as installed."""
    try:
        return metadata.version("fleetfit")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
