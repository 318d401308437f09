"""Plain values that the tiers speak of; immutable, validated, JSON in and out."""

import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fleetfit.core.bounds import check_free

Operation = Literal["conv1", "conv3", "conv5", "identity", "downsample", "avg_pool", "max_pool"]
FixedHeaderKind = Literal["linear", "mlp", "cnn_ignore", "cnn_add", "cnn_project", "vit_block", "mlp_mixer", "resmlp"]
HeaderKind = Literal["blocks"] | FixedHeaderKind
HeaderKept = Literal["coarse", "quarter", "half", "refined", "own", "local"]
MOST_CLASSES = 12  # named in a line
MAX_SEED = 2**63 - 1
MAX_LAYERS = 512  # of a Transformer
MAX_BLOCKS = 16  # of a header's cell, and the like for the rest of it
MAX_REPEATS = 8
MAX_CELLS = 4096  # a side
MAX_UNITS = 2**17  # channels, neurons or hidden units of a layer
MAX_COUNT = 2**53  # whatever is counted: beyond it, not every integer is a double
MAX_WATTS_OR_SECONDS = 1e9
ONE_CLASS_NOTE = "one class in its training data"  # of a device's report; readers of the report look for it
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
FIXED_HEADERS: tuple[FixedHeaderKind, ...] = get_args(FixedHeaderKind)


def _not_finite(value: object) -> object:
    """NaN and infinities, as ``Record`` writes them; null is what earlier versions wrote."""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") else value


# What a field of a message may hold, whoever sent it. Of a plain float, infinity and NaN are refused by its bounds.
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Real = Annotated[float, BeforeValidator(_not_finite)]  # a loss may be infinite or NaN
Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0, le=1)]  # a share that is never nothing
Cost = Annotated[float, Field(ge=0, le=MAX_WATTS_OR_SECONDS)]
JsonDict = Annotated[dict[str, Any], AfterValidator(check_free)]


class Record(BaseModel):
    """Base of all plain values: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, ser_json_inf_nan="strings")


class EnergyModel(Record):
    """Constants of Eqs. 1-2 for one device; watts and seconds, per training epoch."""

    power_watts: Cost = Field(100.0, description="G_n, power at (w, d) -> 0")
    power_slope_watts: Cost = Field(10.0, description="dG, more power per unit of width x depth")
    patch_power_watts: Cost = Field(50.0, description="G_beta, power per patch")
    latency_seconds: Cost = Field(1.0, description="L, time at (w, d) -> 0")
    latency_slope_seconds: Cost = Field(0.1, description="dL, more time per unit of width x depth")

    @model_validator(mode="after")
    def _something_is_spent(self) -> "EnergyModel":
        """Constants fitted to a real device may be 0 one by one, but no work is free."""
        if self.power_watts + self.power_slope_watts + self.patch_power_watts <= 0:
            raise ValueError("power_watts, power_slope_watts and patch_power_watts must not all be 0")
        if self.latency_seconds + self.latency_slope_seconds <= 0:
            raise ValueError("latency_seconds and latency_slope_seconds must not both be 0")
        return self


class LatencyLimit(Record):
    """How long one sample may take, and how long an operation does: None: as the profile was measured (T / 1,000)."""

    seconds: float = Field(gt=0, le=MAX_WATTS_OR_SECONDS)
    seconds_per_operation: float | None = Field(None, gt=0, le=MAX_WATTS_OR_SECONDS)


class DeviceAttributes(Record):
    """What a device tells about itself: hardware and volume, nothing about its samples."""

    device_id: str
    storage_limit_bytes: int = Field(gt=0, le=MAX_COUNT, description="C_n, largest model it can store")
    energy: EnergyModel
    num_samples: Count
    memory_limit_bytes: int | None = Field(None, gt=0, le=MAX_COUNT, description="of one forward pass of one sample")
    latency: LatencyLimit | None = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Limits that are not given take no room in a message."""
        fields: dict[str, Any] = dump(self)
        return {k: v for k, v in fields.items() if v is not None}


class BackboneShape(Record):
    """(w, d): share of attention heads and MLP neurons kept, number of layers kept."""

    width: float = Field(gt=0, le=1)
    depth: int = Field(ge=1, le=MAX_LAYERS)


class SizedShape(Record):
    """One sub-network with the header that is distilled with it, as far as the configuration alone tells it."""

    shape: BackboneShape
    parameters: Count
    size_bytes: Count
    zeta: Finite
    operations: Finite = Field(0.0, description="floating-point operations of one sample, header not counted")
    memory_bytes: Count = Field(0, description="weights, and all that one forward pass of one sample holds at a time")


class Candidate(Record):
    """One sub-network of the elastic backbone with its objectives, evaluated once for the whole fleet."""

    shape: BackboneShape
    loss: Real
    accuracy: Real
    parameters: Count
    size_bytes: Count
    zeta: Finite


class Block(Record):
    """One block of a searched header: (I1, I2, O1, O2, add), Section III-C.

    Inputs count from 0: 0 = the previous cell's output (first cell: the backbone's output), 1 = the one before it
    (first cell: the penultimate layer's output), 2 + i = the output of block i of this cell.
    """

    input_1: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    input_2: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    operation_1: Operation
    operation_2: Operation


class HeaderSpec(Record):
    """All that is needed to build a header: a searched one (kind "blocks") or one of the fixed ones."""

    kind: HeaderKind = "linear"
    blocks: tuple[Block, ...] = Field((), max_length=MAX_BLOCKS)
    repeats: int = Field(1, ge=1, le=MAX_REPEATS, description="U, how often the cell of B blocks is repeated")
    channels: int = Field(16, ge=1, le=MAX_UNITS, description="channels inside the header")
    pooling: int = Field(1, ge=1, le=MAX_CELLS, description="final pooling to pooling x pooling cells")
    hidden: int = Field(0, ge=0, le=MAX_UNITS, description="units of the MLP's hidden layer; 0 = one linear layer")

    @property
    def name(self) -> str:
        """What people call it: searched, pooled (one of no block), or the fixed kind."""
        if self.kind != "blocks":
            return self.kind
        return "searched" if self.blocks else "pooled"


class ValidationScores(Record):
    """Sums over a validation split, so that those of several devices add up: samples, nats, and right answers."""

    num_samples: Count
    loss_sum: Real
    num_correct: Count


NO_SCORES = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)


class Way(Record):
    """A way to ship: which header a device takes, how sharp its logits are made, and with which class prior.

    Headers: ``coarse`` is the one that was sent; ``refined`` what the edge made of the devices' for this one (Eq. 21);
    ``quarter`` and ``half`` are so far on the way from the former to the latter; ``own`` is the device's after its last
    training from there; ``local`` has never met another's.
    """

    header: HeaderKept
    temperature: float = Field(1.0, ge=0.01, le=100, description="logits are divided by it, before the prior")
    prior_strength: float | None = Field(None, gt=0, le=1e6, description="k of the class prior; None: no prior")
    prior_classes: float | None = Field(
        None, gt=0, le=2**31, description="K, how many of the classes a device is taken to have; None: all of them"
    )
    shift_concentration: float | None = Field(
        None, gt=0, le=1e6, description="a of the prior's re-estimate on inputs without labels; None: there is none"
    )

    @property
    def name(self) -> str:
        """In one word, for a table."""
        parts: list[str] = [self.header]
        if self.temperature != 1:
            parts.append(f"T={self.temperature:g}")
        if self.prior_strength is not None:
            parts.append(f"k={self.prior_strength:g}")
        if self.prior_classes is not None:
            parts.append(f"K={self.prior_classes:g}")
        if self.shift_concentration is not None:
            parts.append(f"a={self.shift_concentration:g}")
        return "/".join(parts)


class DeviceReport(Record):
    """What a device reports at the end; accuracies on its private test split, shares in 0..1."""

    device_id: str
    accuracy_coarse: Fraction | None = Field(description="the model as it was sent; None without test samples")
    accuracy_local: Fraction | None = Field(description="fine-tuned alone: same header, same epochs, no collaboration")
    accuracy: Fraction | None
    num_train: Count
    num_test: Count
    parameters: Count
    size_bytes: Count
    limit_bytes: Count
    kept_neurons: Count
    neurons: Count
    notes: tuple[str, ...] = ()


class Fault(Record):
    """Why a device's reply was missing in a step."""

    device_id: str
    step: str = Field(description="attributes, coarse model, round 1, round 2, ..., proposal or finish")
    reason: str = Field(description='"no reply", or why the reply was refused')
    times: int = Field(ge=1, le=MAX_COUNT, description="how often in this step")
    recovered: bool = Field(description="it was asked again in this step, and then its reply was good")


class AbsentDevice(Record):
    """A device that did not finish."""

    device_id: str
    since: str = Field(description="the first of the steps that it missed without coming back")


class LeftOut(Record):
    """A device that no model fits, so that none was made for it; the others of the fleet went on."""

    device_id: str
    cluster: str
    limit_bytes: int
    reason: str


class HeaderTrial(Record):
    """One header that the edge's search looked at, for the comparison table; scores on the edge's validation split."""

    name: str
    spec: HeaderSpec
    loss: Real
    accuracy: Real
    parameters: Count
    chosen: bool = Field(False, description="it is the one that is sent")


def counted(number: int, what: str) -> str:
    """'1 blank row', '2 blank rows'; '1 file that is no data here', '2 files that are no data here'."""
    if number == 1:
        what = re.sub(r"\b(row|file|image|text|sample)s\b", r"\1", what, count=1).replace(" that are ", " that is ")
    return f"{number:,} {what}"


class DataSummary(Record):
    """What was read of a source, what was left out and why, and what was found by itself."""

    source: str
    origin: str = Field(description="the file, folder, local copy, hub or function")
    kind: Literal["image", "text"]
    num_files: int = Field(0, ge=0, description="0: not of files")
    num_rows: int = Field(ge=0, description="found, before any was left out")
    num_samples: int = Field(ge=0, description="used")
    left_out: dict[str, int] = Field(default_factory=dict, description="how many, by what they are")
    input_column: str = ""
    input_why: str = Field("", description="why this column was taken")
    label_column: str = ""
    label_why: str = ""
    classes: dict[str, int] = Field(description="samples by class, in the order of the classes")
    values: dict[str, float] = Field(
        default_factory=dict, description="images: smallest and largest pixel; texts: characters and tokens"
    )
    notes: tuple[str, ...] = ()
    fingerprint: str = Field("", description="changes with the content, however files are called or dated")
    form: str = Field("", description="changes with how inputs are made of it")

    @property
    def unit(self) -> str:
        """What a sample of the source is called."""
        return "images" if self.kind == "image" else "rows"

    @property
    def lines(self) -> tuple[str, ...]:
        """All of it for a person, a line each; no line has a colon before its first number or name."""
        files = f" in {counted(self.num_files, 'files')}" if self.num_files not in (0, self.num_rows) else ""
        used = "all used" if self.num_samples == self.num_rows else f"{self.num_samples:,} used"
        lines = [f"{counted(self.num_rows, self.unit)}{files}, {used} ({self.origin})"]
        if self.left_out:
            lines.append("left out " + ", ".join(counted(number, why) for why, number in self.left_out.items()))
        if self.input_column:
            lines.append(f"inputs from column {self.input_column!r} ({self.input_why})")
        if self.label_column:
            lines.append(f"labels from column {self.label_column!r} ({self.label_why})")
        elif self.label_why:
            lines.append(f"labels from {self.label_why}")
        shown = [f"{name} {number:,}" for name, number in list(self.classes.items())[:MOST_CLASSES]]
        more = f", and {len(self.classes) - MOST_CLASSES} more" if len(self.classes) > MOST_CLASSES else ""
        lines.append(f"{len(self.classes)} classes ({', '.join(shown)}{more})")
        if self.values:
            lines.append(", ".join(f"{name} {value:g}" for name, value in self.values.items()))
        return (*lines, *self.notes)
