"""A device's folder: model.safetensors, and model.json, which makes the tensors loadable."""

import json
import logging
import math
from pathlib import Path

import safetensors.torch
import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError

from fleetfit.core.encoding import first_problem, take
from fleetfit.core.files import write_atomically
from fleetfit.core.records import Record
from fleetfit.data.preprocessing import Form, TextPreprocessing
from fleetfit.data.tokenizer_files import tokenizer_files, with_tokenizer
from fleetfit.method.class_prior import ShiftPrior
from fleetfit.models.classifier import Classifier
from fleetfit.models.packed import PackedModel
from fleetfit.models.weights import first_few, not_finite

log = logging.getLogger(__name__)
MODEL_FORMAT = 1
EXPORT_FILE = "export.json"
ONNX_FILE = "model.onnx"
TORCH_FILE = "model.pt2"


class Adaptation(Record):
    """What ``fleetfit adapt`` found, on inputs without labels; the last bias moves by it when the model is loaded."""

    class_shares: tuple[float, ...] = Field(description="of the classes, in the data to come")
    num_inputs: int = Field(ge=1)
    strength: float = Field(
        gt=0, allow_inf_nan=False, description="how many inputs the shares that were expected before are worth"
    )
    concentration: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="below 1: classes that hardly any input speaks for are taken to be absent",
    )
    gain: float = Field(allow_inf_nan=False, description="nats an input, on inputs that it was not estimated on")
    gain_error: float = Field(ge=0, allow_inf_nan=False, description="standard error of the gain")


MOST_SHIFTS = 1000  # each is tried when a model is adapted
SMALLEST = 1e-9  # share of a class: its logarithm must be one in single precision
SUM_ERROR = 1e-3  # of shares, as people round


class ModelCard(PackedModel):
    """model.json: all that rebuilds and uses a device's model beside its tensors."""

    format: int = MODEL_FORMAT
    device_id: str
    cluster: str
    width: float
    depth: int
    inputs: str = Field(description="what the model expects")
    preprocessing: Form | None = Field(None, description="the same for programs; None: not known")
    size_bytes: int
    limit_bytes: int
    accuracy: float | None = Field(description="on the device's private test split")
    trained_on: tuple[str, ...] = Field((), description="classes in the device's training data; empty: not said")
    expected_shares: tuple[float, ...] = Field(
        (), description="of the classes, as the weights in the file take them; empty: not said"
    )
    shifts: tuple[ShiftPrior, ...] = Field(
        (),
        max_length=MOST_SHIFTS,
        description="with which they may be estimated anew on inputs alone, as known labels say; empty: not to trust",
    )
    adapted: Adaptation | None = Field(None, description="None: the model is as it was shipped")

    @model_validator(mode="after")
    def _shares(self) -> "ModelCard":
        """One share above 0 a label, and no adaptation from shares that are not known."""
        for shares in (self.expected_shares, self.adapted.class_shares if self.adapted else ()):
            if shares and (len(shares) != len(self.labels) or not all(SMALLEST <= share <= 1 for share in shares)):
                raise ValueError(f"class shares must be {len(self.labels)} numbers in 0..1, one a label")
            if shares and abs(sum(shares) - 1) > SUM_ERROR:
                raise ValueError(f"class shares must add up to 1, got {sum(shares):.4g}")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(
                f"labels must be different from each other, got {len(self.labels)}, of which some are alike"
            )
        if not all(0 < number < math.inf for known in self.shifts for number in known):
            raise ValueError("shifts must be pairs of numbers that are finite and > 0")
        if self.adapted and not (self.adapted.class_shares and self.expected_shares):
            raise ValueError("an adapted model must say which class shares it expected before and expects now")
        return self


def write_model(folder: Path, model: Classifier, card: ModelCard) -> None:
    """Write a device's model: the tensors first, then the card that makes them loadable.

    The tokenizer of a text model goes into files of its own, not into the card. What the same model was adapted to in
    this folder stays.
    """
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    if card.adapted is None and (adapted := _adapted_before(folder, content, card)):
        card = card.model_copy(update={"adapted": adapted})
    write_atomically(folder / "model.safetensors", content)
    if isinstance(card.preprocessing, TextPreprocessing):
        for name, content in tokenizer_files(card.preprocessing).items():
            write_atomically(folder / name, content)
    write_card(folder, card)


def write_card(folder: Path, card: ModelCard) -> None:
    """Write model.json alone; what it says of a tokenizer is in files of its own."""
    fields = card.model_dump_json(indent=2, exclude={"preprocessing": {"tokenizer"}})
    write_atomically(folder / "model.json", fields + "\n")


def _adapted_before(folder: Path, content: bytes, card: ModelCard) -> Adaptation | None:
    """What the model that lies in a folder was adapted to, if it is the one that is about to be written."""
    try:
        before = read_card(folder)
        same = (folder / "model.safetensors").read_bytes() == content
    except (ValueError, OSError):
        return None
    if before.adapted and not (same and before.expected_shares == card.expected_shares):
        log.info("%s: the model is another one, so what the earlier one was adapted to is gone", folder)
        return None
    return before.adapted


def load_model(folder: str | Path, as_shipped: bool = False) -> Classifier:
    """Rebuild a device's model from its folder: inputs -> logits [sample class].

    Inputs are pixels [sample channel row column], or the numbers of texts' tokens [sample token].

    Args:
        folder: The device's.
        as_shipped: Without what the model was adapted to since.

    Raises:
        ValueError: a file is missing, corrupt or of another format, or a weight is not finite; the folder holds an
            export that needs no fleetfit.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        for name, how in (
            (ONNX_FILE, "run it with onnxruntime, as the README.md beside it shows, or use `fleetfit predict`"),
            (TORCH_FILE, "it may hold pickles, which can run code; if you trust it, torch.export.load(...).module()"),
        ):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} is an exported model: {how}")
    card = read_card(folder)
    path = folder / "model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (SafetensorError, KeyError, RuntimeError) as error:  # an unknown dtype, or sizes beyond 64 bits
        raise ValueError(f"{path} is corrupt: {error}") from None
    try:
        for name in tensors:
            if not name.startswith(("backbone.model.", "header.")):
                raise ValueError(f"tensor {name!r} is unexpected")
        backbone = card.backbone_of(take(tensors, "backbone.model"))
        header = card.header_of(take(tensors, "header"))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {folder / 'model.json'}: {error}") from None
    if wrong := not_finite(tensors):
        raise ValueError(f"{path} has wrong weights: {first_few(wrong)}")
    if card.adapted and not as_shipped:
        with torch.no_grad():
            now, before = torch.tensor(card.adapted.class_shares), torch.tensor(card.expected_shares)
            header.last_linear.bias.add_(now.log() - before.log())
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
