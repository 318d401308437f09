"""Results of steps kept by what they were computed from, for all runs of a user: what did not change is computed once.

A key is a hash of everything that a step reads: its own part of the job, the content of its inputs, and fleetfit's
code; of a reference, which may have taken days, without the code. What is in the cache may come from anywhere, so
nothing is used that somebody else could have written, that is of another step, or that is damaged; it is computed
again, and said why.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, TypeVar

import torch

from fleetfit.core.bounds import read_header
from fleetfit.core.checkpoints import Bookmark, Checkpoints, Cost, Ledger, StepFolder, TrainingFile
from fleetfit.core.encoding import Message, encode
from fleetfit.core.files import content_hash, others_may_write, write_atomically
from fleetfit.core.progress import Progress, silent

M = TypeVar("M", bound=Message)
logger = logging.getLogger(__name__)
SUFFIX = ".safetensors"
RUNS_SUFFIX = ".runs"
LOOKED_AT = 30  # entries of a phase, the last used ones, when it is told why none of them serves
MOST_NAMED = 4
MOST_OF_A_HEADER = 10**7  # bytes


@cache
def code_of(*packages: str) -> str:
    """A hash of the source code of some of fleetfit's packages, so that no result outlives what computed it."""
    found = hashlib.sha256()
    for package in packages:
        folder = resources.files(f"fleetfit.{package}")
        for file in sorted((f for f in folder.iterdir() if f.name.endswith(".py")), key=lambda f: f.name):
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:16]


def content_of(message: Message) -> str:
    """A hash of a message with its tensors; its encoding may differ from one time to the next in what comes first."""
    found = hashlib.sha256(message.model_dump_json().encode())
    for name, tensor in sorted(message.tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def cached(
    kept: Checkpoints, phase: str, reads: Mapping[str, object], result: type[M], compute: Callable[[Bookmark], M]
) -> M:
    """The result of a step from the cache, or into it; a training in it that was stopped is resumed.

    Args:
        kept: The cache.
        phase: Of the step.
        reads: All that it depends on, by name.
        result: What it gives.
        compute: Computes it; given where a long training in it is kept.
    """
    key = f"{phase}/{content_hash(dict(reads))}"
    return kept.step(key, result, lambda: compute(kept.bookmark(key)), reads)


class StepCache(StepFolder):
    """The cache as a folder: ``<phase>/<hash>.safetensors``.

    Args:
        folder: Of the cache.
        ledger: What is computed is added to it.
        tell: Told what was taken, and why the rest was not.
        limit_bytes: The most that it may hold; what was used longest ago goes first, never what a run in progress uses.
        taken: Called with (phase, file) for what was taken.
        run: The run folder, noted with what it uses.
    """

    def __init__(
        self,
        folder: Path,
        ledger: Ledger | None = None,
        tell: Progress = silent,
        limit_bytes: int | None = None,
        taken: Callable[[str, Path], None] | None = None,
        run: Path | None = None,
    ) -> None:
        super().__init__(folder, ledger or Ledger())
        self.tell = tell
        self.limit_bytes = limit_bytes
        self.taken = taken
        self.run = run
        self._held: dict[Path, IO[bytes]] = {}

    def step(
        self, name: str, result: type[M], compute: Callable[[], M], reads: Mapping[str, object] | None = None
    ) -> M:
        """As of any steps; told whether it was taken from the cache."""
        phase = name.partition("/")[0]

        def computed() -> M:
            if why := self._why_not(phase, reads or {}):
                self.tell("cache", 0, 0, f"{phase.replace('_', ' ')}: computed, as what the cache has {why}")
            return compute()

        return super().step(name, result, computed, reads)

    def _training_file(self, name: str) -> TrainingFile:
        return TrainingFile(self.folder / f"{name}.training{SUFFIX}", self.folder)

    def _found(self, name: str, path: Path, result: type[M]) -> tuple[M, Cost] | None:
        if not path.exists():
            return None
        if place := others_may_write(path, self.folder):
            why = f"others may write {place}" if place != path else "others may write it"
        else:
            try:
                key = read_header(path.read_bytes(), str(path)).metadata.get("key", name)
                why = "" if key == name else f"it is of {key!r}"
                found = None if why else super()._found(name, path, result)
            except ValueError as error:
                why = str(error)
        if why:
            logger.warning("%s is not used, but computed again: %s", path, why)
            return None
        self._hold(path)
        if name not in self._told:
            phase = name.partition("/")[0]
            if self.taken is not None:
                self.taken(phase, path)
            self.tell("cache", 0, 0, f"{phase.replace('_', ' ')}: taken from the cache")
        return found

    def _keep(self, name: str, path: Path, value: Message, cost: Cost, reads: Mapping[str, object] | None) -> None:
        told = json.dumps({k: content_hash(v) for k, v in (reads or {}).items()})
        try:
            write_atomically(path, encode(value, cost=cost.written, key=name, reads=told))
        except OSError as error:
            logger.warning("%s is not kept in the cache: %s", name, error.strerror or error)
            return
        self._hold(path)
        if self.limit_bytes is not None:
            shrink(self.folder, self.limit_bytes)

    def _hold(self, path: Path) -> None:
        """Note that it is used now, and keep others from clearing it while this process lives."""
        try:
            os.utime(path)
            file = path.open("rb")
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return  # a cache that cannot be written, or that is being cleared: what was read stays valid
        self._held[path] = file
        if self.run is not None and (run := str(self.run.resolve())) not in (known := _noted(path)):
            try:
                write_atomically(path.with_suffix(RUNS_SUFFIX), "\n".join([*known, run]) + "\n")
            except OSError:
                return

    def _why_not(self, phase: str, reads: Mapping[str, object]) -> str:
        """What differs between a step and the entry that is most like it, for a person; nothing without entries."""
        now = {k: content_hash(v) for k, v in reads.items()}
        best: list[str] | None = None
        for entry in sorted(entries(self.folder), key=lambda e: -e.used)[:LOOKED_AT]:
            if entry.phase != phase or not now:
                continue
            try:
                before = json.loads(_metadata(entry.path)["reads"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            differing = sorted(k for k in {*now, *before} if now.get(k) != before.get(k))
            if differing and (best is None or len(differing) < len(best)):
                best = differing
        if best is None:
            return ""
        more = f" and {len(best) - MOST_NAMED} more" if len(best) > MOST_NAMED else ""
        return f"differs in {', '.join(best[:MOST_NAMED])}{more}"


def _metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file, without its tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, MOST_OF_A_HEADER)))
    found: dict[str, str] = header["__metadata__"]
    return found


@dataclass(frozen=True)
class Entry:
    """A file of the cache."""

    path: Path
    phase: str
    size_bytes: int
    used: float  # seconds since the epoch


def entries(folder: Path) -> Iterator[Entry]:
    """What a cache has of steps; trainings that were stopped count as their phase's."""
    for path in folder.glob(f"*/*{SUFFIX}"):
        try:
            status = path.stat()
        except OSError:
            continue  # gone since
        yield Entry(path, path.parent.name, status.st_size, status.st_mtime)


def shrink(folder: Path, limit_bytes: int) -> list[Entry]:
    """Clear what was used longest ago until the rest is within the limit; never what a run in progress uses."""
    kept = sorted(entries(folder), key=lambda e: e.used)
    excess = sum(e.size_bytes for e in kept) - limit_bytes
    cleared = []
    for entry in kept:
        if excess <= 0:
            break
        if clear(entry):
            cleared.append(entry)
            excess -= entry.size_bytes
    return cleared


def clear(entry: Entry) -> bool:
    """Remove an entry unless a run uses it; whether it is gone."""
    try:
        with entry.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entry.path.unlink()
            entry.path.with_suffix(RUNS_SUFFIX).unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def runs_of(path: Path) -> list[str]:
    """Run folders, still there, that used a file of the cache."""
    return [run for run in _noted(path) if Path(run).is_dir()]


def _noted(path: Path) -> list[str]:
    try:
        return path.with_suffix(RUNS_SUFFIX).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def age_seconds(entry: Entry) -> float:
    """Since it was used last."""
    return max(0.0, time.time() - entry.used)
