"""Whole files or none; hashes and JSON."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fleetfit.core import files
from fleetfit.core.files import content_hash, others_may_write, read_json, write_atomically

torch.set_num_threads(1)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    write_atomically(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomically(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_follow_the_umask_and_secrets_stay_secret(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"")
        write_atomically(tmp_path / "secret", b"", mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_what_others_may_write_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "deep"
    folder.mkdir(parents=True)
    path = folder / "file"
    path.write_bytes(b"")
    root = tmp_path / "cache"
    for place in (path, folder, root):
        assert others_may_write(path, root) is None
        mode = stat.S_IMODE(place.stat().st_mode)
        place.chmod(mode | stat.S_IWOTH)
        assert others_may_write(path, root) == place
        place.chmod(mode)
    link = folder / "link"
    link.symlink_to(path)
    assert others_may_write(link, root) == link
    if os.geteuid() == 0:  # a file of another user
        os.chown(path, 12345, 12345)
        assert others_may_write(path, root) == path


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod", "fdopen"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "interrupted"]
)
@pytest.mark.parametrize("before", [b"old", None])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException, before: bytes | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(files.os, failing, fail)
        with pytest.raises(type(error)):
            write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file"]), "a temporary file was left"
    assert before is None or path.read_bytes() == before
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_new_content_is_flushed_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "file", []
    path.write_bytes(b"old")
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(("fsync", os.fstat(handle).st_size, path.read_bytes()))
        real_sync(handle)

    def replace(source: str, target: Path) -> None:
        events.append(("replace", Path(source).stat().st_size, path.read_bytes()))
        assert Path(source).parent == path.parent, "a rename is atomic within one file system only"
        real_replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write_atomically(path, b"newer")
    assert events == [("fsync", 5, b"old"), ("replace", 5, b"old")]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    """Killed for good just before the rename: no handler runs."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, sys, pathlib\nfrom fleetfit.core import files\n"
        "files.os.replace = lambda *_: os._exit(9)\n"
        "files.write_atomically(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("content", "says"), [(None, "is missing"), (b"{", "corrupt"), (b"[1]", "JSON object"), (b"\xff\xfe", "corrupt")]
)
def test_a_json_file_that_is_none_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_hashes_change_with_any_part_and_not_with_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [2]}, 3) == content_hash({"b": [2], "a": 1}, 3)
    hashes = [content_hash(*p) for p in [({"a": 1},), ({"a": 2},), ({"b": 1},), ({"a": 1}, 0), ({"a": 1}, 1), ()]]
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 16 for h in hashes)
    assert content_hash("x") == content_hash("x") == "cd65ea2c2ad99e94"
