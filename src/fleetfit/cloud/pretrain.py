"""A reference worth adapting: trained as a run would train it, and written as a folder that other jobs start from.

model.safetensors, config.json   the base model in 16 bits, as save_pretrained writes it
header.safetensors               its header, and the names of the classes
preprocessor_config.json         how images become inputs, where that is known
card.json, README.md             what it is, how it was made, how good it is
job.toml                         the job, to train it again
"""

import json
import platform
from importlib import metadata
from pathlib import Path

import torch
from pydantic import Field

from fleetfit.cloud.clusters import fleet_of
from fleetfit.cloud.reference import Reference, classifier_of, scores_of
from fleetfit.cloud.run import cached_reference
from fleetfit.config.job import Job
from fleetfit.core.checkpoints import Ledger
from fleetfit.core.files import check_replaceable, own_version, whole_folder, write_atomically
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import JsonDict, Record
from fleetfit.core.step_cache import StepCache
from fleetfit.data.image_forms import image_processor
from fleetfit.data.partition import Split, share_out
from fleetfit.data.preprocessing import Preprocessing, TextPreprocessing
from fleetfit.data.sources import load_samples
from fleetfit.data.tokenizer_files import tokenizer_files
from fleetfit.models.classifier import Classifier
from fleetfit.models.pretrained import CARD_FILE, load_pretrained, silence
from fleetfit.models.pretrained_header import HEADER_FILE, header_bytes, load_header

LIBRARIES = ("torch", "transformers")


class CheckpointCard(Record):
    """card.json: what a checkpoint folder holds, and how it was made."""

    format: int = 1
    family: str
    labels: tuple[str, ...]
    parameters: int = Field(description="of the base model and the header")
    size_bytes: int = Field(description="of both files of weights")
    validation_accuracy: float | None = Field(description="of these files, on the public split; None: no samples")
    test_accuracy: float | None = Field(description="the same on its held-out test")
    seconds: float = Field(description="wall time of the training")
    hardware: str = Field(description="of the training")
    command: str
    seed: int = Field(description="decides the split of the data, and the training")
    data: JsonDict
    model: JsonDict = Field(description="how it was trained: the job's table of this name")
    versions: dict[str, str]


def pretrain(job: Job, out: Path, progress: Progress = silent, command: str = "") -> CheckpointCard:
    """Train the reference of a job on its public split, or take it from the cache, and write it as a folder.

    Args:
        job: The resolved job.
        out: The folder; one that was made here is replaced.
        progress: Told how far each phase is.
        command: What the card calls the command that did this.

    Raises:
        ValueError: bad data, a model that cannot be built, a loss that is not finite, another folder of this name.
        OSError: a folder cannot be written.
    """
    check_replaceable(out, CARD_FILE)
    torch.set_num_threads(job.run.threads)
    torch_device_of(job.run.torch_device)  # what is not there is told before anything is done
    progress("data", 0, 1, job.data.source)
    samples = load_samples(job, progress)
    devices = {cluster: [a.device_id for a in members] for cluster, members in fleet_of(job).items()}
    public = share_out(samples, job.data, devices, job.seed).public
    progress("data", 1, 1, f"{len(public.train)} samples to train on")
    ledger = Ledger()
    cache = StepCache(job.run.cache_folder, ledger, progress, job.run.cache_limit)
    reference = cached_reference(job, public, cache, lambda done, total, note: progress("reference", done, total, note))
    progress("checkpoint", 0, 1)
    with whole_folder(out, CARD_FILE) as folder:
        card = _write(job, folder, reference, public, float(sum(ledger.seconds.values())), command)
        write_atomically(folder / "README.md", _readme(card, out))
    progress("checkpoint", 1, 1, str(out))
    return card


def _write(job: Job, folder: Path, reference: Reference, public: Split, seconds: float, command: str) -> CheckpointCard:
    labels, form = public.train.label_names, public.train.inputs.form
    model = classifier_of(job, reference, len(labels))
    with silence():
        model.backbone.model.half().save_pretrained(folder)  # type: ignore[operator]
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # Transformers leaves the weights, and nothing else, to their owner alone
    write_atomically(folder / HEADER_FILE, header_bytes(model.header, labels))
    if isinstance(form, Preprocessing):
        write_atomically(folder / "preprocessor_config.json", json.dumps(image_processor(form), indent=2) + "\n")
    if isinstance(form, TextPreprocessing):
        for name, content in tokenizer_files(form).items():
            write_atomically(folder / name, content)
    write_atomically(folder / "job.toml", job.to_toml())
    # What is told is that of the files, read as a job that starts from them reads them.
    backbone = load_pretrained(str(folder), job.model.family)
    header = load_header(str(folder), model.header.spec, backbone.feature_shape, labels)
    assert header is not None, "the header was just written"
    torch_device = torch_device_of(job.run.torch_device)
    written = Classifier(backbone, header).to(torch_device).eval()
    validation, test = (scores_of(written, part.to(torch_device)) for part in (public.validation, public.test))
    card = CheckpointCard(
        family=job.model.family,
        labels=labels,
        parameters=reference.parameters,
        size_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        validation_accuracy=validation.accuracy if validation.num_samples else None,
        test_accuracy=test.accuracy if test.num_samples else None,
        seconds=round(seconds, 1),
        hardware=reference.hardware or "unknown hardware",
        command=command,
        seed=job.seed,
        data=job.data.model_dump(mode="json"),
        model=job.model.model_dump(mode="json"),
        versions={
            "fleetfit": own_version(),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in LIBRARIES},
        },
    )
    write_atomically(folder / CARD_FILE, card.model_dump_json(indent=2) + "\n")
    return card


def _readme(card: CheckpointCard, out: Path) -> str:
    accuracies = (
        f"{'not known' if share is None else f'{share:.2%}'} on {name}"
        for name, share in (("validation", card.validation_accuracy), ("test", card.test_accuracy))
    )
    labels = ", ".join(card.labels[:20]) + (f", and {len(card.labels) - 20} more" if len(card.labels) > 20 else "")
    config = card.model["config"]
    start = f"from `{card.model['pretrained']}`" if card.model["pretrained"] else "from random weights"
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    return f"""# {out.name}

A {card.family} with a header for {len(card.labels)} classes ({labels}), {card.parameters:,} parameters in all,
trained by fleetfit {start}.

| | |
|---|---|
| accuracy | {", ".join(accuracies)}; samples of the public split that it was not trained on |
| data | `{card.data["source"]}`, split with seed {card.seed}; shares and all else are in `{CARD_FILE}` |
| training | {card.model["epochs"]} epochs, {card.seconds:,.0f} seconds on {card.hardware} |
| command | `{card.command or "not known"}` |
| versions | {versions} |
| weights | {card.size_bytes:,} bytes; the base model in 16 bits |
| configuration | {", ".join(f"{key} {value}" for key, value in config.items()) or "in `config.json`"} |

## Use

In a job of fleetfit. The header comes along where the data has the same classes and the job the same kind of header;
then `epochs = 0` takes all of it as it is:

```toml
[model]
family = "{card.family}"
pretrained = "{out}"
epochs = 0
```

In Transformers, without the header: `AutoModel.from_pretrained("{out}")`. `header.safetensors` says in its metadata
what the header is and what its classes are.
"""
