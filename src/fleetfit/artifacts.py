"""The run folder and its files. Every file appears whole or not at all; finished steps survive a kill.

job.toml            the resolved job             summary.json   the figures
data.json           what data was read           devices.csv    a line for each device
metrics.jsonl       one line per finished step   report.html    the page (report.py)
cloud/front.csv     every candidate              devices/<id>/  model.safetensors, model.json
steps/              finished steps               memory/        what each device keeps between messages
exports/<id>/       a device's model in another format (export.py)
"""

import csv
import io
import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fleetfit.bounds import read_header
from fleetfit.config import Job, load_job
from fleetfit.data.file_rows import shown
from fleetfit.files import differences, locked, others_may_write, write_atomically
from fleetfit.messages import Message, TrainingState, decode, encode, first_problem
from fleetfit.model_folder import ModelCard, write_model
from fleetfit.models.classifier import Classifier
from fleetfit.records import DataSummary

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)
DATA_FILE = "data.json"
KEEP_TRAINING_SECONDS = 120.0
AT_THE_DOOR = "_wire"  # behind the name of a link: its bytes with all that carries them, where a server counts them
HOW = {"run", "links"}  # sections of the job that say how to run, not what: they may change when a run is gone on with


@dataclass
class Ledger:
    """What a run has cost so far: bytes by link and direction; by phase, seconds of wall time and of CPU time.

    ``cpu_seconds`` are those of all threads of the processes that ran the steps; NaN where one did not say.
    """

    traffic: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    cpu_seconds: Counter[str] = field(default_factory=Counter)

    @property
    def known_cpu_seconds(self) -> dict[str, float]:
        """By phase, where they are known; to the millisecond."""
        return {phase: round(s, 3) for phase, s in self.cpu_seconds.items() if math.isfinite(s)}

    def since(self, traffic: Counter[str]) -> dict[str, int]:
        """Bytes counted since an earlier copy of ``traffic``."""
        return {link: number - traffic[link] for link, number in self.traffic.items() if number != traffic[link]}


@dataclass(frozen=True)
class Cost:
    """What one step has cost: wall time, CPU time (NaN: not known), and bytes by link."""

    seconds: float
    cpu_seconds: float
    traffic: Mapping[str, int]

    @classmethod
    def read(cls, text: str) -> "Cost":
        """Of what ``written`` gave.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: of anything else.
        """
        cost = json.loads(text)
        traffic = {str(link): int(number) for link, number in cost["traffic"].items()}
        # Folders of earlier versions do not say how much CPU time it took.
        return cls(float(cost["seconds"]), float(cost.get("cpu_seconds", math.nan)), traffic)

    @property
    def written(self) -> str:
        """As JSON, without what is not known."""
        known = {} if math.isnan(self.cpu_seconds) else {"cpu_seconds": self.cpu_seconds}
        return json.dumps({"seconds": self.seconds, **known, "traffic": self.traffic})


class TrainingFile:
    """A long training's state as a file, written at most every few minutes; there until the training is finished.

    Args:
        path: The file.
        cache: The cache that it lies in, if it does; then it counts only if nobody else could have written it.
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path = path
        self.cache = cache
        self.earlier_seconds = self.earlier_cpu_seconds = 0.0
        self._started = self._saved = time.perf_counter()
        self._cpu_started = time.process_time()

    @property
    def where(self) -> str:
        """The file's name."""
        return str(self.path)

    def load(self) -> TrainingState | None:
        """What was kept, if anything.

        Raises:
            ValueError: the file is corrupt, truncated or foreign; names it.
        """
        if not self.path.exists():
            return None
        if self.cache and (place := others_may_write(self.path, self.cache)):
            logger.warning("%s is not used, as others may write %s", self.path, place)
            return None
        state = decode(self.path.read_bytes(), TrainingState, f"{self.path} (delete it to train afresh)")
        self.earlier_seconds = state.seconds
        self.earlier_cpu_seconds = math.nan if state.cpu_seconds is None else state.cpu_seconds
        logger.info("going on from step %d, kept in %s", state.step, self.path)
        return state

    def due(self) -> bool:
        """Whether the file is some minutes old."""
        return time.perf_counter() - self._saved >= KEEP_TRAINING_SECONDS

    def save(self, state: TrainingState) -> None:
        """Write the state, and how long it took to get there."""
        seconds = self.earlier_seconds + time.perf_counter() - self._started
        cpu_seconds = self.earlier_cpu_seconds + time.process_time() - self._cpu_started
        known = None if math.isnan(cpu_seconds) else cpu_seconds
        write_atomically(self.path, encode(state.model_copy(update={"seconds": seconds, "cpu_seconds": known})))
        self._saved = time.perf_counter()

    def forget(self) -> None:
        """The training is finished."""
        self.path.unlink(missing_ok=True)


class StepFolder:
    """Finished steps as files: computed once, read back after a kill with what they had cost.

    Args:
        folder: Where the files go.
        ledger: Bytes and seconds of steps, also of those that are read back, are added to it.
        on_step: Called with (name, cost, result) for each step.
        is_cache: It is of many runs, and its files may come from anywhere: one that somebody else could have written,
            or that is of another step, is computed again.
    """

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        on_step: Callable[[str, Cost, Message], None] | None = None,
        is_cache: bool = False,
    ) -> None:
        self.folder = folder
        self.is_cache = is_cache
        self.ledger = ledger
        self.on_step = on_step
        self._told: set[str] = set()
        self._bookmarks: dict[str, TrainingFile] = {}

    def bookmark(self, name: str) -> TrainingFile:
        """Where the training inside a step is kept until the step is finished; its seconds count as the step's."""
        path = self.folder / f"{name}.training.safetensors"
        return self._bookmarks.setdefault(name, TrainingFile(path, self.folder if self.is_cache else None))

    def step(self, name: str, result: type[M], compute: Callable[[], M]) -> M:
        """The saved result of a step, or compute and save it. The phase is the name's first part.

        A step that is asked for again counts once.

        Raises:
            ValueError: the saved file is corrupt, truncated or foreign; names it.
        """
        path = self.folder / f"{name}.safetensors"
        if path.exists() and not (self.is_cache and self._is_foreign(name, path)):
            what = f"{path} (delete it to compute this step again)"
            blob = path.read_bytes()
            value = decode(blob, result, what)
            try:
                cost = Cost.read(read_header(blob, what).metadata["cost"])
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{what} is corrupt: it does not say what it cost") from error
            if name in self._told:
                return value
            self.ledger.traffic.update(cost.traffic)
            logger.info("%s: read back from %s", name, path)
        else:
            before, start, cpu_start = self.ledger.traffic.copy(), time.perf_counter(), time.process_time()
            value = compute()
            training = self._bookmarks.pop(name, None)
            cost = Cost(
                seconds=time.perf_counter() - start + (training.earlier_seconds if training else 0.0),
                cpu_seconds=time.process_time() - cpu_start + (training.earlier_cpu_seconds if training else 0.0),
                traffic=self.ledger.since(before),
            )
            write_atomically(path, encode(value, cost=cost.written, **({"key": name} if self.is_cache else {})))
            if training is not None:
                training.forget()
        self._told.add(name)
        phase = name.partition("/")[0]
        self.ledger.seconds[phase] += cost.seconds  # type: ignore[assignment]
        self.ledger.cpu_seconds[phase] += cost.cpu_seconds  # type: ignore[assignment]
        if self.on_step is not None:
            self.on_step(name, cost, value)
        return value

    def _is_foreign(self, name: str, path: Path) -> bool:
        """Whether a file of a cache is not to be used, and says why."""
        if place := others_may_write(path, self.folder):
            why = f"others may write {place}" if place != path else "others may write it"
        else:
            try:
                key = read_header(path.read_bytes(), str(path)).metadata.get("key", name)
            except ValueError as error:
                key, why = "", str(error)
            if key == name:
                return False
            why = f"it is of {key!r}" if key else why
        logger.warning("%s is not used, but computed again: %s", path, why)
        return True


def claim_data(path: Path, data: DataSummary, begun: bool, anew: str) -> None:
    """Note what data something is of, or see that it still is: what was computed from other data is no answer.

    Args:
        path: The file of the note.
        data: As it is read now.
        begun: Whether anything has been computed.
        anew: What to do to begin anew, for a person.

    Raises:
        ValueError: it began with other data; says what is different.
    """
    if path.exists() and begun:
        try:
            before = DataSummary.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} is corrupt: {first_problem(error)}") from None
        told = changed_data(before, data)
        if told:
            raise ValueError(f"the data of {path.parent} changed since it began: {told}; put it back, or {anew}")
        return
    write_atomically(path, data.model_dump_json(indent=2) + "\n")


def changed_data(before: DataSummary, now: DataSummary) -> str:
    """What is different, for a person; nothing if the content is the same."""
    if before.fingerprint == now.fingerprint:
        return "" if before.form == now.form else "the samples are the same, but not what they become as inputs"
    lost, new = ([n for n in a.classes if n not in b.classes] for a, b in ((before, now), (now, before)))
    told = [
        f"{before.num_samples:,} samples before, {now.num_samples:,} now" * (before.num_samples != now.num_samples),
        f"no longer the classes {shown(lost)}" if lost else "",
        f"new classes {shown(new)}" if new else "",
    ]
    same = f"{now.num_samples:,} samples as before, of other content"
    return ", ".join(filter(None, told)) or same


class MemoryFolder:
    """What one device keeps between messages: its memory after the last two steps that it did not miss."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, step: int, kind: type[M]) -> M:
        """The memory after a step.

        Raises:
            ValueError: it is not there, or corrupt.
        """
        path = self._path(step)
        if not path.exists():
            raise ValueError(f"{path} is missing: the run folder is damaged; delete it and run again")
        return decode(path.read_bytes(), kind, str(path))

    def before(self, step: int, kind: type[M]) -> M | None:
        """The memory that a message of this step meets, also when it is repeated; None: the device has none.

        Raises:
            ValueError: the step is over, or a file is corrupt.
        """
        steps = self._steps()
        if steps and step < steps[-1]:
            raise ValueError(f"step {step} is over: the device has come to {steps[-1]}")
        earlier = [s for s in steps if s < step]
        return self.load(earlier[-1], kind) if earlier else None

    def save(self, step: int, memory: Message) -> None:
        """Keep the memory after a step; forget all but the one before it."""
        write_atomically(self._path(step), encode(memory))
        before = [s for s in self._steps() if s < step][-1:]
        for other in self._steps():
            if other not in (step, *before):
                self._path(other).unlink(missing_ok=True)

    def _steps(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.safetensors"))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step}.safetensors"


ASKED = "attributes"
_CLOUD = {"method", "seed", "data", "model"}
READS = {  # the sections of the job that a phase's steps depend on, in the order of a run
    "reference": _CLOUD,
    "elastic": _CLOUD | {"backbone"},
    "candidates": _CLOUD | {"backbone"},
    "specialise": _CLOUD | {"backbone", "fleet", "header"},
    "header_search": _CLOUD | {"backbone", "fleet", "header"},
}


class RunFolder:
    """Owner of one run's files.

    Raises:
        ValueError: the folder belongs to another job, or another process is writing to it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self.path = path
        self.job = job
        self.ledger = Ledger()
        path.mkdir(parents=True, exist_ok=True)
        self._lock = locked(path / ".lock")
        try:
            self._claim()
        except BaseException:
            self.close()
            raise
        self._lines: list[str] = []
        self.steps = StepFolder(path / "steps", self.ledger, self._note)

    def _claim(self) -> None:
        """Note what job this folder is of; one in which nothing was computed yet is whoever's comes next."""
        saved = self.path / "job.toml"
        if saved.exists():
            before = load_job(saved)
            differing = differences(before.model_dump(exclude=HOW), self.job.model_dump(exclude=HOW))
            if differing and self._begun():
                raise ValueError(
                    f"{self.path} holds the run of another job (differs in {', '.join(differing[:5])}); "
                    f"choose another --out, or delete the folder{self._could_stay(differing)}"
                )
            if differing:
                shutil.rmtree(self.path / "steps", ignore_errors=True)
        write_atomically(saved, self.job.to_toml())

    def _begun(self) -> bool:
        """Whether there is anything that took time: attributes of devices are asked for in a moment."""
        steps = (path for path in (self.path / "steps").rglob("*") if path.is_file() and path.parent.name != ASKED)
        return any(True for _ in (*steps, *self.path.glob("devices/*"), *self.path.glob("summary.json")))

    def _could_stay(self, differing: Sequence[str]) -> str:
        """Which finished steps are the same in the other job, for a person."""
        changed = {key.partition(".")[0] for key in differing}
        if "header.channels" in differing:  # the reference's own header has them too
            changed.add("model")
        same = []
        for phase, reads in READS.items():
            if changed & reads:
                break
            if (self.path / "steps" / phase).exists():
                same.append(phase)
        if not same:
            return ""
        names = same[0] if len(same) == 1 else "{" + ",".join(same) + "}"
        return (
            f"\nwhat is the same in both jobs need not be computed again: mkdir -p NEW/steps && cp -r "
            f"{self.path}/steps/{names} NEW/steps, and --out NEW"
        )

    def close(self) -> None:
        """Let others write here."""
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim_data(self, data: DataSummary) -> None:
        """Note what data this run is of.

        Raises:
            ValueError: it began with other data.
        """
        claim_data(
            self.path / DATA_FILE, data, self._begun(), "choose another --out, or delete the folder, to begin anew"
        )

    def _note(self, name: str, cost: Cost, value: Message) -> None:
        fields = json.loads(value.model_dump_json())
        known = {} if math.isnan(cost.cpu_seconds) else {"cpu_seconds": round(cost.cpu_seconds, 3)}
        line = {"step": name, "seconds": round(cost.seconds, 3), **known, "bytes": dict(cost.traffic), **fields}
        self._lines.append(json.dumps(line))
        write_atomically(self.path / "metrics.jsonl", "\n".join(self._lines) + "\n")

    def memory_of(self, device_id: str) -> MemoryFolder:
        """Where one device keeps its memory in a local run."""
        return MemoryFolder(self.path / "memory" / device_id)

    def write_device(self, model: Classifier, card: ModelCard) -> None:
        """Write devices/<id>/."""
        write_model(self.path / "devices" / card.device_id, model, card)

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as CSV; the first row's keys are the columns."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / name, text.getvalue())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file.

        Raises:
            ValueError: a number is not finite, which JSON cannot say.
        """
        write_atomically(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")
