"""The run folder and its files. Every file appears whole or not at all; finished steps survive a kill.

job.toml            the resolved job             summary.json   the figures
metrics.jsonl       one line per finished step   report.html    the page (report.py)
cloud/front.csv     every candidate              devices/<id>/  model.safetensors, model.json
steps/              finished steps               memory/        what each device keeps between messages
exports/<id>/       a device's model in another format (export.py)
"""

import csv
import fcntl
import hashlib
import io
import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TypeVar

import safetensors.torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError

from fleetfit.config import Job, load_job
from fleetfit.data.preprocessing import Form, TextPreprocessing
from fleetfit.data.tokenizer_files import tokenizer_files, with_tokenizer
from fleetfit.messages import Message, TrainingState, decode, encode, first_problem, read_metadata, take
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import header_from_state
from fleetfit.records import HeaderSpec, JsonDict, Record

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)
MODEL_FORMAT = 1
KEEP_TRAINING_SECONDS = 120.0
HOW = {"run", "links"}  # sections of the job that say how to run, not what: they may change when a run is gone on with
ONNX_FILE = "model.onnx"
TORCH_FILE = "model.pt2"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file or none: to a temporary neighbour, flushed to disk, then renamed.

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
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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


@dataclass
class Ledger:
    """What a run has cost so far: bytes by link and direction, seconds by phase."""

    traffic: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    def since(self, traffic: Counter[str]) -> dict[str, int]:
        """Bytes counted since an earlier copy of ``traffic``."""
        return {link: number - traffic[link] for link, number in self.traffic.items() if number != traffic[link]}


class TrainingFile:
    """A long training's state as a file, written at most every few minutes; there until the training is finished.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.earlier_seconds = 0.0
        self._started = self._saved = time.perf_counter()

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
        state = decode(self.path.read_bytes(), TrainingState, f"{self.path} (delete it to train afresh)")
        self.earlier_seconds = state.seconds
        logger.info("going on from step %d, kept in %s", state.step, self.path)
        return state

    def due(self) -> bool:
        """Whether the file is some minutes old."""
        return time.perf_counter() - self._saved >= KEEP_TRAINING_SECONDS

    def save(self, state: TrainingState) -> None:
        """Write the state, and how long it took to get there."""
        seconds = self.earlier_seconds + time.perf_counter() - self._started
        write_atomically(self.path, encode(state.model_copy(update={"seconds": seconds})))
        self._saved = time.perf_counter()

    def forget(self) -> None:
        """The training is finished."""
        self.path.unlink(missing_ok=True)


class StepFolder:
    """Finished steps as files: computed once, read back after a kill with what they had cost.

    Args:
        folder: Where the files go.
        ledger: Bytes and seconds of steps, also of those that are read back, are added to it.
        on_step: Called with (name, seconds, bytes by link, result) for each step.
    """

    def __init__(
        self,
        folder: Path,
        ledger: Ledger,
        on_step: Callable[[str, float, Mapping[str, int], Message], None] | None = None,
    ) -> None:
        self.folder = folder
        self.ledger = ledger
        self.on_step = on_step
        self._told: set[str] = set()
        self._bookmarks: dict[str, TrainingFile] = {}

    def bookmark(self, name: str) -> TrainingFile:
        """Where the training inside a step is kept until the step is finished; its seconds count as the step's."""
        return self._bookmarks.setdefault(name, TrainingFile(self.folder / f"{name}.training.safetensors"))

    def step(self, name: str, result: type[M], compute: Callable[[], M]) -> M:
        """The saved result of a step, or compute and save it. The phase is the name's first part.

        A step that is asked for again counts once.

        Raises:
            ValueError: the saved file is corrupt, truncated or foreign; names it.
        """
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            what = f"{path} (delete it to compute this step again)"
            blob = path.read_bytes()
            value = decode(blob, result, what)
            try:
                cost = json.loads(read_metadata(blob, what)["cost"])
                seconds, traffic = float(cost["seconds"]), {str(k): int(v) for k, v in cost["traffic"].items()}
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{what} is corrupt: it does not say what it cost") from error
            if name in self._told:
                return value
            self.ledger.traffic.update(traffic)
            logger.info("%s: read back from %s", name, path)
        else:
            before, start = self.ledger.traffic.copy(), time.perf_counter()
            value = compute()
            training = self._bookmarks.pop(name, None)
            seconds = time.perf_counter() - start + (training.earlier_seconds if training else 0.0)
            traffic = self.ledger.since(before)
            cost_json = json.dumps({"seconds": seconds, "traffic": traffic})
            write_atomically(path, encode(value, cost=cost_json))
            if training is not None:
                training.forget()
        self._told.add(name)
        self.ledger.seconds[name.partition("/")[0]] += seconds  # type: ignore[assignment]
        if self.on_step is not None:
            self.on_step(name, seconds, traffic, value)
        return value


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


class ModelCard(Record):
    """model.json: all that rebuilds and uses a device's model beside its tensors."""

    format: int = MODEL_FORMAT
    device_id: str
    cluster: str
    family: str
    config: JsonDict
    header: HeaderSpec
    labels: tuple[str, ...]
    width: float
    depth: int
    inputs: str = Field(description="what the model expects")
    preprocessing: Form | None = Field(None, description="the same for programs; None: not known")
    size_bytes: int
    limit_bytes: int
    accuracy: float | None = Field(description="on the device's private test split")


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
        saved = self.path / "job.toml"
        if saved.exists():
            before = load_job(saved)
            differing = differences(before.model_dump(exclude=HOW), self.job.model_dump(exclude=HOW))
            if differing:
                raise ValueError(
                    f"{self.path} holds the run of another job (differs in {', '.join(differing[:5])}); "
                    "choose another --out, or delete the folder"
                )
        write_atomically(saved, self.job.to_toml())

    def close(self) -> None:
        """Let others write here."""
        self._lock.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, name: str, seconds: float, traffic: Mapping[str, int], value: Message) -> None:
        cost = {"step": name, "seconds": round(seconds, 3), "bytes": dict(traffic)}
        fields = json.loads(value.model_dump_json())  # an edge's report has seconds of its own, which the summary tells
        self._lines.append(json.dumps(cost | fields | cost))
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


def write_model(folder: Path, model: Classifier, card: ModelCard) -> None:
    """Write a device's model: the tensors first, then the card that makes them loadable.

    The tokenizer of a text model goes into files of its own, not into the card.
    """
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    if isinstance(card.preprocessing, TextPreprocessing):
        for name, content in tokenizer_files(card.preprocessing).items():
            write_atomically(folder / name, content)
    fields = card.model_dump_json(indent=2, exclude={"preprocessing": {"tokenizer"}})
    write_atomically(folder / "model.json", fields + "\n")


def load_model(folder: str | Path) -> Classifier:
    """Rebuild a device's model from its folder: inputs -> logits [sample class].

    Inputs are pixels [sample channel row column], or the numbers of texts' tokens [sample token].

    Raises:
        ValueError: a file is missing, corrupt or of another format; the folder holds an export that needs no fleetfit.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        for name, how in (
            (ONNX_FILE, "run it with onnxruntime, as the README.md beside it shows, or use `fleetfit predict`"),
            (TORCH_FILE, "load it with torch.export.load(...).module()"),
        ):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} is an exported model: {how}")
    card = read_card(folder)
    path = folder / "model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    try:
        backbone = Backbone(card.family, card.config)
        backbone.load_state_dict(take(tensors, "backbone"), strict=True)
        header = header_from_state(card.header, backbone.feature_shape, len(card.labels), take(tensors, "header"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {folder / 'model.json'}: {error}") from None
    return Classifier(backbone, header).eval()


def read_card(folder: Path) -> ModelCard:
    """model.json of a device's folder.

    Raises:
        ValueError: missing, not JSON, or not a model card of this format.
    """
    path = folder / "model.json"
    try:
        card = ModelCard.model_validate_json(_with_tokenizer(path.read_text(encoding="utf-8"), folder))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no device folder: {path} is missing") from None
    except ValidationError as error:
        raise ValueError(f"{path} is not a model card: {first_problem(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a model card: {error}") from None
    if card.format != MODEL_FORMAT:
        raise ValueError(f"{path} has format {card.format}, this fleetfit reads {MODEL_FORMAT}")
    return card


def _with_tokenizer(text: str, folder: Path) -> str:
    try:
        fields = json.loads(text)
    except ValueError:
        return text  # told by the one who validates it
    if not isinstance(fields, dict) or "preprocessing" not in fields:
        return text
    return json.dumps({**fields, "preprocessing": with_tokenizer(fields["preprocessing"], folder)})


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


def own_version() -> str:
    """fleetfit's version, as installed."""
    try:
        return metadata.version("fleetfit")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


def content_hash(*parts: object) -> str:
    """Sixteen hex digits that change when any part does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def locked(path: Path) -> IO[bytes]:
    """Hold a folder for one process; the lock goes with the process, also when it is killed."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"{path.parent} is in use by another fleetfit process") from None
    return file


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
