"""Finished steps and interrupted training, kept so that a run that was stopped is resumed.

Every file appears whole or not at all.
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from pydantic import Field

from fleetfit.core.bounds import read_header
from fleetfit.core.encoding import Message, decode, encode
from fleetfit.core.files import others_may_write, write_atomically

M = TypeVar("M", bound=Message)


class TrainingState(Message):
    """A long training at the end of an epoch: all that decides how it goes on.

    Tensors: ``parameter.<i>``, ``average.<i>``, ``optimizer.<i>.<name>``, ``generator.<i>`` (their states) and
    ``losses`` (of all steps so far).
    """

    kind: ClassVar[str] = "training_state"
    step: int = Field(ge=1)
    seconds: float = Field(0.0, ge=0, description="wall time so far")
    cpu_seconds: float | None = Field(0.0, ge=0, description="CPU time so far; None: not known")


class Bookmark(Protocol):
    """Where one long training is kept, to be gone on with after a kill."""

    @property
    def where(self) -> str:
        """Its name for a person."""

    def load(self) -> TrainingState | None:
        """What was kept, if anything."""

    def due(self) -> bool:
        """Whether it is time to keep it again."""

    def save(self, state: TrainingState) -> None:
        """Keep this, instead of what was kept before."""


class Checkpoints(Protocol):
    """Finished steps that survive a kill."""

    def step(
        self, name: str, result: type[M], compute: Callable[[], M], reads: Mapping[str, object] | None = None
    ) -> M:
        """The saved result of this step, or compute and save it; a cache keeps with it what it ``reads``."""

    def bookmark(self, name: str) -> Bookmark:
        """Where the training inside this step is kept until the step is finished."""


logger = logging.getLogger(__name__)
KEEP_TRAINING_SECONDS = 120.0


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
    """

    def __init__(
        self, folder: Path, ledger: Ledger, on_step: Callable[[str, Cost, Message], None] | None = None
    ) -> None:
        self.folder = folder
        self.ledger = ledger
        self.on_step = on_step
        self._told: set[str] = set()
        self._bookmarks: dict[str, TrainingFile] = {}

    def bookmark(self, name: str) -> TrainingFile:
        """Where the training inside a step is kept until the step is finished; its seconds count as the step's."""
        return self._bookmarks.setdefault(name, self._training_file(name))

    def step(
        self, name: str, result: type[M], compute: Callable[[], M], reads: Mapping[str, object] | None = None
    ) -> M:
        """The saved result of a step, or compute and save it. The phase is the name's first part.

        A step that is asked for again counts once.

        Raises:
            ValueError: the saved file is corrupt, truncated or foreign; names it.
        """
        path = self.folder / f"{name}.safetensors"
        if (found := self._found(name, path, result)) is not None:
            value, cost = found
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
            self._keep(name, path, value, cost, reads)
            if training is not None:
                training.forget()
        self._told.add(name)
        phase = name.partition("/")[0]
        self.ledger.seconds[phase] += cost.seconds  # type: ignore[assignment]
        self.ledger.cpu_seconds[phase] += cost.cpu_seconds  # type: ignore[assignment]
        if self.on_step is not None:
            self.on_step(name, cost, value)
        return value

    def _training_file(self, name: str) -> TrainingFile:
        return TrainingFile(self.folder / f"{name}.training.safetensors")

    def _found(self, name: str, path: Path, result: type[M]) -> tuple[M, Cost] | None:
        if not path.exists():
            return None
        what = f"{path} (delete it to compute this step again)"
        blob = path.read_bytes()
        value = decode(blob, result, what)
        try:
            return value, Cost.read(read_header(blob, what).metadata["cost"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{what} is corrupt: it does not say what it cost") from error

    def _keep(self, name: str, path: Path, value: Message, cost: Cost, reads: Mapping[str, object] | None) -> None:
        write_atomically(path, encode(value, cost=cost.written))


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

    def last(self, kind: type[M]) -> M:
        """The memory of a device that has finished.

        Raises:
            ValueError: it is not there, or corrupt.
        """
        return self.load(max(self._steps(), default=0), kind)

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
