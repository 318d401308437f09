"""The run folder and its files. Every file appears whole or not at all; finished steps survive a kill.

job.toml            the resolved job             summary.json   the figures
data.json           what data was read           devices.csv    a line for each device
metrics.jsonl       one line per finished step   report.html    the page (runs/report)
cloud/front.csv     every candidate              devices/<id>/  model.safetensors, model.json
steps/              finished steps               memory/        what each device keeps between messages
exports/<id>/       a device's model in another format (runs/export.py)
"""

import csv
import io
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fleetfit.config.job import Job, load_job
from fleetfit.core.checkpoints import Cost, Ledger, MemoryFolder, StepFolder
from fleetfit.core.encoding import Message, first_problem
from fleetfit.core.files import differences, locked, read_json, write_atomically
from fleetfit.core.progress import Progress
from fleetfit.core.records import DataSummary
from fleetfit.core.step_cache import StepCache
from fleetfit.data.file_rows import shown
from fleetfit.models.classifier import Classifier
from fleetfit.runs.device_folder import ModelCard, write_model

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)
DATA_FILE = "data.json"
CACHE_FILE = "from_cache.json"
HOW = {"run", "links"}  # sections of the job that say how to run, not what: they may change when a run is gone on with


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


ASKED = "attributes"
ANEW = "choose another --out, or begin anew here with --again, which keeps what is there beside it"


def set_aside(path: Path) -> Path | None:
    """Move a run out of the way, so that another can begin in its folder; where it is now, None if there was none.

    Raises:
        ValueError: another process is writing to it.
        OSError: it cannot be moved.
    """
    if not (path / "job.toml").exists():
        return None
    lock = locked(path / ".lock")
    try:
        number = next(n for n in itertools.count(1) if not os.path.lexists(path.with_name(f"{path.name}.before-{n}")))
        return path.rename(path.with_name(f"{path.name}.before-{number}"))
    finally:
        lock.close()


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
                    f"{self.path} holds the run of another job (differs in {', '.join(differing[:5])}); {ANEW}"
                )
            if differing:
                shutil.rmtree(self.path / "steps", ignore_errors=True)
        write_atomically(saved, self.job.to_toml())

    def _begun(self) -> bool:
        """Whether there is anything that took time: attributes of devices are asked for in a moment."""
        steps = (path for path in (self.path / "steps").rglob("*") if path.is_file() and path.parent.name != ASKED)
        return any(True for _ in (*steps, *self.path.glob("devices/*"), *self.path.glob("summary.json")))

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
        claim_data(self.path / DATA_FILE, data, self._begun(), ANEW)

    def _note(self, name: str, cost: Cost, value: Message) -> None:
        fields = json.loads(value.model_dump_json())
        known = {} if math.isnan(cost.cpu_seconds) else {"cpu_seconds": round(cost.cpu_seconds, 3)}
        line = {"step": name, "seconds": round(cost.seconds, 3), **known, "bytes": dict(cost.traffic), **fields}
        self._lines.append(json.dumps(line))
        write_atomically(self.path / "metrics.jsonl", "\n".join(self._lines) + "\n")

    def took(self, phase: str, path: Path) -> None:
        """Note that a step of this phase was taken from the cache."""
        files = [*self.from_cache.get(phase, ()), str(path)]
        self.write_json(CACHE_FILE, {**self.from_cache, phase: list(dict.fromkeys(files))})

    @property
    def from_cache(self) -> dict[str, list[str]]:
        """By phase, the files of the cache that steps were taken from instead of being computed."""
        return read_json(self.path / CACHE_FILE) if (self.path / CACHE_FILE).exists() else {}

    def cache(self, progress: Progress) -> StepCache:
        """Results of steps of all runs, as this one uses them."""
        run = self.job.run
        return StepCache(run.cache_folder, tell=progress, limit_bytes=run.cache_limit, taken=self.took, run=self.path)

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
