"""The job's other tables, with their defaults: fleetfit's own choices, made by measurement (benchmarks/results/)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from fleetfit.config.families import FAMILIES, names_of
from fleetfit.config.types import Bytes, Section, Share, Steps, as_tuple
from fleetfit.core.records import OPERATIONS, FixedHeaderKind, Operation

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]


class ModelConfig(Section):
    """The reference Transformer: built from its Hugging Face configuration, or pre-trained."""

    family: FamilyName = Field("vit", description=f"{names_of('image')} read images, {names_of('text')} texts")
    pretrained: str = Field(
        "", description="start from these weights: a folder written by save_pretrained, or a hub id; empty: from config"
    )
    config: dict[str, Any] = Field(
        FAMILIES["vit"].small,
        description="keys of the family's Hugging Face configuration; those left out are a small model's",
    )
    header: Literal["pooled", "linear"] = Field(
        "pooled",
        description="the reference's own header, which is distilled with the backbone. linear: reads [CLS]; pooled: "
        "reads a pooled grid of projected tokens too, without which narrow and shallow backbones are far worse",
    )
    vocabulary: Literal["trimmed", "full"] = Field(
        "trimmed", description="of a pre-trained text model: keep the tokens that public texts use, or all"
    )
    frequent_tokens: int = Field(
        2000, ge=0, description="trimmed: how many other tokens are kept, the most frequent ones"
    )
    epochs: int = Field(
        60, ge=0, description="training epochs of the reference on the public split; 0: pretrained as it is"
    )
    batch_size: Steps = 32
    learning_rate: float = Field(1.5e-3, gt=0)
    warmup_share: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising rate; then a cosine")
    weight_decay: float = Field(0.05, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    shift_pixels: int = Field(1, ge=0, description="augmentation: random shifts of up to this many pixels")
    flip: bool = Field(False, description="augmentation: left and right may be swapped")
    cutout_pixels: int = Field(0, ge=0, description="of the reference: side of a square of each image that is blanked")
    mixup: float = Field(0.0, ge=0, description="of the reference: alpha of mixup; 0: none")
    cutmix: float = Field(0.0, ge=0, description="of the reference: alpha of cutmix; with mixup, by turns; 0: none")
    ema: float = Field(
        0.0, ge=0, lt=1, description="of the reference: keep the moving average of its weights; its decay, 0: none"
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_config(cls, value: object) -> object:
        """Keys that a job gives, over the small model's of its family; a pre-trained model has its own."""
        if not isinstance(value, dict) or not isinstance(value.get("config", {}), dict):
            return value
        given = value.get("config", {})
        if value.get("epochs") == 0 and not value.get("pretrained"):
            raise ValueError("epochs must be >= 1 without pretrained, got 0")
        if value.get("pretrained"):
            if given:
                raise ValueError("config must be left out with pretrained, which has its own")
            return {**value, "config": {}}
        family = value.get("family", "vit")
        small = FAMILIES[family].small if isinstance(family, str) and family in FAMILIES else {}
        return {**value, "config": {**small, **given}}


class DataConfig(Section):
    """Where samples come from and who gets which; the splits never overlap."""

    source: Annotated[str, Field(min_length=1)] = Field(
        "digits",
        description="digits: scikit-learn's 8x8 handwritten digits; or a file, a folder, a pattern of files, the id of "
        "a data set on the Hugging Face hub, or module:function",
    )
    root: str = Field(
        "",
        description="a data set of the hub that lies in this folder under its name is read from there; empty: the "
        "folder that the variable FLEETFIT_DATA names, if it is set",
    )
    subset: str = Field("", description="which configuration, of a data set that has several")
    splits: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="which of the source's splits are used, joined; empty: all that there are"
    )
    input_column: str = Field("", description="column of images or texts; empty: found by its type and name")
    label_column: str = Field("", description="column of labels; empty: found by its type and name")
    label_names: tuple[str, ...] = Field((), description="names of the labels 0, 1, ...; empty: as the source has them")
    user_column: str = Field("", description='with split = "natural": whose a sample is')
    separator: str = Field(
        "", description="of CSV files: one character, or tab; empty: found, by the header and all rows"
    )
    encoding: str = Field(
        "", description="of CSV and JSON files, as Python calls it; empty: what a mark says, else UTF-8, else cp1252"
    )
    class_folder: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="of folders of images: which folder of a path is the class, 1 for the first; default: the first "
        "whose names differ, where no deeper one could be meant",
    )
    limit: Annotated[int, Field(ge=2)] | None = Field(
        None, description="use so many samples at most, drawn by the seed, each class by its share"
    )
    max_tokens: Annotated[int, Field(ge=3)] | None = Field(
        None,
        description="longer texts are cut; default: long enough for 99 of 100 public texts, at most 128, and what the "
        "model has positions for",
    )
    bad_image_share: Share = Field(0.01, description="images that cannot be read are left out, up to this share of all")
    empty_text_share: Share = Field(0.01, description="the same for texts of nothing but space")
    missing_label_share: Share = Field(0.01, description="the same for samples without a label")
    public_share: Share = Field(0.40, description="cloud's public set D_c, of all samples")
    test_share: Share = Field(0.10, description="held-out public samples, for reporting only")
    edge_share: Share = Field(0.08, description="edges' shared sets together; the rest is the devices' private data")
    validation_share: float = Field(0.2, gt=0, lt=1, description="cut from each training side, to make all choices on")
    device_test_share: Share = Field(0.3, description="a device's private test split, for reporting only")
    split: Literal["iid", "classes", "dirichlet", "natural", "groups"] = Field(
        "classes",
        description="among devices; natural: the samples of one user to one device; groups: hidden groups of devices, "
        "each with classes of its own",
    )
    groups: int = Field(4, ge=1, description='hidden groups of each cluster, with split = "groups" or a shift')
    shift: Literal["none", "labels", "inputs"] = Field(
        "none",
        description="what hidden groups have otherwise than the first. labels: pairs of classes mean each other; "
        "inputs: images are turned, inverted or otherwise coloured, texts are misspelt",
    )
    unlabelled_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="of each device's training samples, whose labels are taken away: for refine.unlabelled",
    )
    classes_per_device: int = Field(5, ge=1, description='with split = "classes"')
    alpha: float = Field(0.5, gt=0, description='with split = "dirichlet"')

    @model_validator(mode="after")
    def _shares(self) -> "DataConfig":
        total = self.public_share + self.test_share + self.edge_share
        if total >= 1:
            raise ValueError(f"public_share + test_share + edge_share must be < 1, got {total:g}")
        return self

    @model_validator(mode="after")
    def _whose(self) -> "DataConfig":
        if self.split == "natural" and not self.user_column:
            raise ValueError('user_column must be given with split = "natural": the column that says whose a sample is')
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "DataConfig":
        if len(set(self.label_names)) < len(self.label_names) or len(self.label_names) == 1:
            raise ValueError(f"label_names must be two or more different names, got {list(self.label_names)}")
        return self


class BackboneConfig(Section):
    """Phase 1, in the cloud."""

    widths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.25, 0.5, 0.75, 1.0), min_length=1)
    depths: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="default: 1 to the reference's layers")
    importance: Literal["second_order", "taylor", "exact", "random"] = Field(
        "second_order",
        description="of heads and neurons. taylor: Eq. 8; second_order: with the loss's curvature; exact: Eqs. 6-7, "
        "slow; random: for comparison",
    )
    importance_samples: Steps = 512
    depth_order: Literal["auto", "spread", "first"] = Field("auto", description="which layers a shallower model keeps")
    distillation: Literal["joint", "paper"] = Field("joint", description="joint: one stage; paper: Eq. 9's two stages")
    steps: Steps = Field(600, description="optimiser steps of elastic training; paper: divided between its two stages")
    batch_size: Steps = 64
    learning_rate: float = Field(5e-3, gt=0)
    weight_logits: float = Field(1.0, ge=0, description="lambda_1 of Eq. 9")
    weight_embeddings: float = Field(1.0, ge=0, description="lambda_2 of Eq. 9")
    choice: Literal["pareto_grid", "greedy_accuracy", "greedy_size", "random"] = "pareto_grid"
    size: Literal["exact", "zeta"] = Field("exact", description="objective f3: bytes as shipped, or the paper's zeta")
    gamma_p: float = Field(0.04, gt=0, description="Eq. 11: the loss difference that does not matter")
    grid_distance: Literal["euclidean", "l1"] = Field("euclidean", description="Eq. 13")
    grid_ties: Literal["cheaper", "loss"] = Field("cheaper", description="Eq. 13, of candidates in equally near cells")
    specialise_steps: int = Field(150, ge=0, description="training of the chosen sub-network alone before it is sent")


class HeaderConfig(Section):
    """Phase 2-1, on each edge."""

    search: Literal["halving", "random", "enas", "distilled"] | FixedHeaderKind = Field(
        "halving", description="distilled: keep the header that came with the backbone; or a fixed header's name"
    )
    budget_steps: Steps = Field(1500, description="training steps of headers in all; the same for every search")
    batch_size: Steps = 32
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    views: Steps = Field(4, description="shifted copies of each shared image, the image itself included")
    max_blocks: Annotated[int, Field(ge=1, le=8)] = Field(3, description="B")
    repeats: Annotated[int, Field(ge=1, le=4)] = Field(1, description="U")
    channels: Steps = 16
    pooling: Annotated[int, Field(ge=1)] = Field(
        2, description="enas, random: final pooling, to so many cells a side; 1 where no header fits otherwise"
    )
    hidden: int = Field(
        0,
        ge=0,
        description="enas, random: hidden units of the MLP behind the blocks; 0, or where none fits: one linear layer",
    )
    operations: tuple[Operation, ...] = Field(OPERATIONS, min_length=1)
    room: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the storage limit that the backbone leaves free for a header"
    )
    quick_test: bool = Field(
        True,
        description="halving, with warm_start: search only where a few candidates, trained a little on folds of the "
        "shared set, are better than the distilled header on what was held out",
    )
    warm_start: bool = Field(True, description="halving: headers start as the distilled header computes")
    keep_distilled: bool = Field(
        True,
        description="the header distilled with the backbone is shipped, unless a found one is clearly better on "
        "held-out folds of the shared set",
    )
    freeze_backbone: bool = Field(
        True, description="false: enas trains the backbone too, as the paper does; other searches never do"
    )
    backbone_learning_rate: float = Field(
        5e-4,
        gt=0,
        description="with freeze_backbone = false: of the backbone; far below the header's, as it is trained",
    )
    children: Steps = Field(2, description="enas: M, headers drawn for a step of the shared weights or the policy")
    controller_interval: Steps = Field(5, description="enas: steps of the shared weights to one of the policy")
    controller_learning_rate: float = Field(3.5e-3, gt=0)
    controller_entropy: float = Field(1e-4, ge=0)
    controller_baseline_decay: float = Field(0.99, ge=0, lt=1)
    final_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="enas: share of the budget that trains the winner alone; random trains each header fully"
    )


class RefineConfig(Section):
    """Phase 2-2, between each edge and its devices."""

    rounds: Steps = Field(10, le=10_000, description="T, the most rounds of training and averaging")
    settle: bool = Field(
        True, description="end the rounds when the pooled validation loss has settled; else all are done"
    )
    epochs: Steps = Field(10, le=100_000, description="local epochs of the first round, and of fine-tuning alone")
    later_epochs: int = Field(
        3, ge=0, le=100_000, description="local epochs of each later round; 0: as many as of the first"
    )
    batch_size: Steps = Field(16, le=10**6)
    learning_rate: float = Field(5e-3, gt=0, le=1e3)
    exchange: Literal["weights", "importance"] = Field("weights", description="what is aggregated by similarity")
    bits: int = Field(8, ge=8, le=32, description="8 or 32: of each value of a header change, on its way to the edge")
    similarity: Literal["updates", "labels", "calibrated", "wasserstein", "js", "average", "alone", "oracle"] = Field(
        "updates",
        description="whom a device's average is made of. updates: groups found from the header changes; labels: cosine "
        "of class counts, which devices then send; the next three: the paper's, of features; oracle: the hidden groups "
        "of a simulated fleet",
    )
    temperature: float = Field(0.5, gt=0, le=1e6, description="tau of the calibrated similarity")
    sketch: Literal["samples", "sliced"] = Field("samples", description="what a device shows of its features")
    sketch_samples: Annotated[int, Field(ge=2, le=100_000)] = 24
    fine_tune: bool = Field(False, description="one more local round after the last aggregation")
    anchor: float = Field(0.0, ge=0, le=1e6, description="mu, pull to the shipped header; 0 = free")
    class_prior: bool = Field(True, description="empirical-Bayes class prior in the last bias")
    prior_estimate: Literal["support", "dirichlet"] = Field(
        "support",
        description="of a device's class shares: a number of the classes that it has, and those alike; or all classes, "
        "as the public data has them. What either needs is chosen by pooled validation",
    )
    unlabelled: bool = Field(
        False,
        description="use a device's inputs without labels too: its class prior is re-estimated on them, where the "
        "pooled validation says that this helps",
    )
    balanced_training: bool = Field(
        True, description="with class_prior: train with the prior in the logits, so that weights need not learn it"
    )
    importance: Literal["gate", "neuron", "parameter"] = Field("gate", description="Eqs. 16-18 or beyond")
    prune_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of header neurons dropped in all; the few channels of a pooled header are all needed"
    )
    guard: bool = Field(True, description="never ship what the cluster's validation splits say is worse")

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: int) -> int:
        if value not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, got {value}")
        return value

    @property
    def shows_sketch(self) -> bool:
        """Whether the edge compares devices by their sketches."""
        return self.similarity not in ("updates", "labels", "average", "alone", "oracle")

    def epochs_of(self, number: int) -> int:
        """Local epochs of the n-th round."""
        return self.epochs if number == 1 or self.later_epochs == 0 else self.later_epochs

    @property
    def scores_importance(self) -> bool:
        """Whether devices send importance sets: something is dropped by them, or they are all that is sent."""
        return self.prune_share > 0 or self.exchange == "importance"


class PrivacyConfig(Section):
    """Clipping and noise on what a device sends to its edge (docs/security.md); off by default."""

    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="z, standard deviation of the noise over the most that a device's data can change; 0: off",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="of the promise (epsilon, delta); epsilon is in the summary")
    clip_header: float = Field(
        0.5, gt=0, description="largest L2 norm of a header's difference to the one that was sent first"
    )
    clip_sketch: float = Field(1.0, gt=0, description="largest root mean square of a sketch's values")
    clip_loss: float = Field(
        0.5, gt=0, description="largest L2 norm of the ways' validation losses, less the first one's; nats a sample"
    )

    @property
    def on(self) -> bool:
        """Whether anything is clipped and noised."""
        return self.noise_multiplier > 0

    def noise_of(self, clip_norm: float) -> float:
        """Standard deviation of the noise on vectors of at most this norm: replacing one moves it by twice that."""
        return self.noise_multiplier * 2 * clip_norm


class MembersConfig(Section):
    """What one member of a fleet can do to the others."""

    robust: bool = Field(
        True,
        description="an edge bounds each device's header changes and its vote, so that one that lies cannot decide for "
        "others",
    )


class LinksConfig(Section):
    """Between cloud, edges and devices: what may go wrong without stopping a cluster."""

    quorum: float = Field(
        0.5, gt=0, le=1, description="share of a cluster's devices whose valid replies a round needs to go on"
    )
    deadline_seconds: float = Field(600.0, gt=0, description="how long a round waits for devices that do not reply")
    max_message_bytes: Bytes = Field(10**9, description="longer messages are refused unread; bytes or '300 MB'")
    send_models: bool = Field(
        False, description="of a deployment: devices send their finished models up, and do not only write them"
    )


class RunConfig(Section):
    """How to run, not what."""

    threads: Steps = Field(1, description="CPU threads; on small models one is fastest")
    torch_device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="hardware of all phases; auto: a GPU with CUDA where there is one, and else the CPU"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the cloud's training; auto: bfloat16 on a GPU that has it, and else float32"
    )
    cache: str = Field(
        "~/.cache/fleetfit",
        description="what the cloud trained, headers that edges found, and decoded images, each by what it was made of",
    )
    cache_limit: Bytes = Field(
        20 * 10**9,
        description="the most that results of steps in the cache take; what was used longest ago is cleared first",
    )
    track: Literal["", "tensorboard", "mlflow", "trackio"] = Field(
        "", description="a program that follows runs is told losses and results; its files are in the run folder"
    )

    @property
    def cache_folder(self) -> Path:
        """Of the cache."""
        return Path(self.cache).expanduser()
