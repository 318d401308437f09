"""What a run tells while it goes on, for those who follow many runs with a program of theirs (``run.track``).

One callback feeds it: the progress callback, whose notes hold losses, and at the end the summary. Nothing leaves the
machine unless the tracker's own settings say so. A tracker that fails is told of once, and the run goes on without.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fleetfit.config.job import Job
from fleetfit.core.progress import Progress

LOSS = re.compile(r"\bloss (\d+(?:\.\d+)?)")
FOLDER = "tracking"  # of a run folder, where a tracker keeps files
MOST_PARAMETERS = 200
EVERY_SHARE = 0.01  # of a phase: the most points of a curve are a hundred


class Tracker(Protocol):
    """What is asked of a program that follows runs."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep some numbers of one step."""

    def close(self, failed: bool) -> None:
        """The run is over, or has failed or been stopped."""


class _TensorBoard:
    def __init__(self, job: Job, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(out / FOLDER))
        self.writer.add_text("job", f"```\n{job.to_toml()}\n```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class _MLflow:
    def __init__(self, job: Job, out: Path) -> None:
        import mlflow

        self.mlflow: Any = mlflow
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((out / FOLDER).resolve().as_uri())
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "fleetfit"))
        mlflow.start_run(run_name=out.name)
        mlflow.log_params(parameters(job))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics({_plain(name): value for name, value in values.items()}, step=step)

    def close(self, failed: bool) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")


class _Trackio:
    def __init__(self, job: Job, out: Path) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((out / FOLDER).resolve()))
        import trackio  # type: ignore[import-not-found]

        self.trackio: Any = trackio
        trackio.init(project="fleetfit", name=out.name, config=parameters(job))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.trackio.finish()


TRACKERS: dict[str, Callable[[Job, Path], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


def _plain(name: str) -> str:
    """A name of letters, digits and a few signs, as MLflow takes it."""
    return re.sub(r"[^\w./ -]", "_", name)


def parameters(job: Job) -> dict[str, str]:
    """The job's keys, flat; of very many the first."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flat(inner, f"{name}.{key}" if name else key)
        elif value is not None:
            yield name, str(value)[:250]

    return dict(list(flat(job.model_dump(mode="json", exclude={"fleet": {"devices"}}), ""))[:MOST_PARAMETERS])


class Tracked:
    """A progress callback that tells a tracker too."""

    def __init__(self, name: str, tracker: Tracker | None, progress: Progress) -> None:
        self.name = name
        self.tracker = tracker
        self.progress = progress
        self._told: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        """Progress, and its loss if there is one."""
        self.progress(phase, done, total, note)
        found = LOSS.search(note)
        if self.tracker is None or found is None or not total:
            return
        who, colon, _ = note.partition(": ")
        curve = f"{phase.replace(' ', '_')}{f'/{who}' if colon else ''}/loss"
        share = done / total
        if share - self._told.get(curve, -1.0) < EVERY_SHARE and done < total:
            return
        self._told[curve] = share
        self._log({curve: float(found[1])}, done)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """What came of the run: means over devices, each device's accuracy, seconds, and bytes."""
        kinds = {"accuracy_coarse": "as_sent", "accuracy_local": "alone", "accuracy": "fleetfit"}
        values: dict[str, float] = {"reference/accuracy": summary["reference"]["accuracy"]}
        for key, name in kinds.items():
            known = [d[key] for d in summary["devices"] if d[key] is not None]
            if known:
                values[f"devices/accuracy_{name}"] = sum(known) / len(known)
        values |= {f"device/{d['id']}/accuracy": d["accuracy"] for d in summary["devices"]}
        values |= {f"seconds/{phase}": seconds for phase, seconds in summary["seconds"].items()}
        values |= {f"traffic/{link}": number for link, number in summary["traffic"].items()}
        self._log({k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}, 0)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._try(lambda: self.tracker.log(values, step) if self.tracker else None)

    def close(self, failed: bool) -> None:
        """The run is over, or has failed or been stopped."""
        self._try(lambda: self.tracker.close(failed) if self.tracker else None)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # whatever a program of others raises is no reason to stop a run of hours
            self.tracker = None
            self.progress("tracking", 0, 0, f"run.track = {self.name!r}: {_words(error)}; the run goes on without")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


@contextmanager
def tracking(job: Job, out: Path, progress: Progress) -> Iterator[Tracked]:
    """The callback of a run, which tells its tracker if the job asks for one.

    Args:
        job: The resolved job.
        out: The run folder.
        progress: Told all the same.
    """
    tracker: Tracker | None = None
    if job.run.track:
        try:
            tracker = TRACKERS[job.run.track](job, out)
        except ImportError:
            way = f'pip install "fleetfit[{job.run.track}]"'
            progress(
                "tracking", 0, 0, f"run.track = {job.run.track!r} is not installed ({way}); the run goes on without"
            )
        except Exception as error:
            progress("tracking", 0, 0, f"run.track = {job.run.track!r}: {_words(error)}; the run goes on without")
    tracked = Tracked(job.run.track, tracker, progress)
    failed = True
    try:
        yield tracked
        failed = False
    finally:
        tracked.close(failed)
