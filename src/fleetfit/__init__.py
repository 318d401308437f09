"""fleetfit: fit one pre-trained Transformer to every device of a fleet.

    import fleetfit

    summary = fleetfit.run("digits", out="runs/digits")
    model = fleetfit.load("runs/digits/devices/phones-1")  # a torch module: inputs -> logits

Nothing heavy is imported until it is used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetfit.core.moved import find_moved_modules

if TYPE_CHECKING:
    from torch import nn

    from fleetfit.config.job import Job as Job
    from fleetfit.config.job import load_job as load_job
    from fleetfit.core.progress import Progress

    __version__: str

find_moved_modules()

__all__ = ["Job", "__version__", "load", "load_job", "run"]


def run(
    job: "str | Path | Mapping[str, Any] | Job",
    out: str | Path | None = None,
    progress: "Progress | None" = None,
    again: bool = False,
) -> dict[str, Any]:
    """Run a job on this machine: every device of its fleet gets a model. A run that was stopped is gone on with.

    Args:
        job: A job file, its fields as nested mappings, or a resolved job.
        out: The run folder. Default: ``runs/<name of the job file>``; for a job without a file, ``runs/<its hash>``.
        progress: Called as (phase, done, total, note), often; raise from it to stop.
        again: Begin anew: a run that is in the folder is moved to ``<out>.before-1`` (or ``-2``, ...). What did not
            change is taken from the cache.

    Returns:
        The summary, as in ``summary.json``; models are in ``<out>/devices/``.

    Raises:
        ValueError: a bad job or bad data, limits that nothing fits, a damaged run folder, a loss that is not finite.
        OSError: the job cannot be read, or the folder cannot be written.
    """
    from fleetfit.config.job import Job, load_job, make_job
    from fleetfit.core.files import content_hash
    from fleetfit.core.progress import silent
    from fleetfit.engines import local
    from fleetfit.runs.folder import set_aside

    if isinstance(job, (str, Path)):
        name, resolved = Path(job).stem, load_job(job)
    else:
        resolved = job if isinstance(job, Job) else make_job(dict(job))
        name = content_hash(resolved.model_dump(exclude={"run"}))
    folder = Path("runs", name) if out is None else Path(out)
    if again:
        set_aside(folder)
    return local.run(resolved, folder, progress or silent)


def load(device_folder: str | Path) -> "nn.Module":
    """One device's model, in evaluation mode: inputs -> logits [sample, class].

    What the inputs are, and the names of the classes, is in ``model.json`` of the same folder, or in the metadata of
    the ONNX file.

    Args:
        device_folder: ``<run>/devices/<device>``, ``<kit>/model``, or one that ``fleetfit export`` wrote as safetensors
            or ONNX; the latter is computed by ONNX Runtime.

    Raises:
        ValueError: no such folder, or a file in it is missing or corrupt.
        ImportError: the model is in ONNX, and ONNX Runtime is not installed.
    """
    from fleetfit.runs.device_folder import ONNX_FILE, load_model

    exported = Path(device_folder) / ONNX_FILE
    if exported.exists():
        from fleetfit.runs.onnx_module import OnnxModule

        return OnnxModule(exported).eval()
    return load_model(device_folder)


def __getattr__(name: str) -> Any:
    """The names that cost an import, on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("fleetfit")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+unknown"
    if name in ("Job", "load_job"):
        from fleetfit.config import job

        return getattr(job, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
