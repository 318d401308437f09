"""The job: one TOML file says everything. Validated, immutable, and the only home of defaults.

Defaults are fleetfit's own choices, made by measurement (benchmarks/results/). ``method = "paper"`` puts every choice
to the paper's own; a key that a job states itself wins over both.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fleetfit.config_errors import explain
from fleetfit.inventory import read_inventory
from fleetfit.presets import SMALL_CONFIGS, merged, preset_of
from fleetfit.profiles import Profile, find_profile
from fleetfit.recipes import job_path
from fleetfit.records import MAX_SEED, OPERATIONS, FixedHeaderKind, Operation, Record
from fleetfit.units import parse_bytes, parse_seconds


def as_tuple(value: object) -> object:
    """A single value stands for a list of one."""
    return value if isinstance(value, (list, tuple)) else (value,)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=1)]
Watts = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]


class Section(Record):
    """Base of the job's tables: a number is a finite number; neither true nor '2' is one."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[str(info.field_name)]
        kind, is_read = field.annotation, any(isinstance(m, BeforeValidator) for m in field.metadata)
        if kind in (int, float) and not is_read and isinstance(value, (bool, str)):
            raise ValueError(f"must be {'an integer' if kind is int else 'a number'}")
        return value


class ModelConfig(Section):
    """The reference Transformer: built from its Hugging Face configuration, or pre-trained."""

    family: Literal["vit", "deit", "dinov2", "bert", "roberta", "distilbert"] = Field(
        "vit", description="which family of models/families.py: the first three read images, the others text"
    )
    pretrained: str = Field(
        "", description="start from these weights: a folder written by save_pretrained, or a hub id; empty: from config"
    )
    config: dict[str, Any] = Field(
        SMALL_CONFIGS["vit"],
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
        small = SMALL_CONFIGS.get(family, {}) if isinstance(family, str) else {}
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
    unlabelled_share: Share = Field(
        0.0, description="of each device's training samples, whose labels are taken away: for refine.unlabelled"
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


class DeviceGroup(Section):
    """``count`` devices alike; a list is dealt out in turn, so [60, 100] alternates."""

    count: Annotated[int, Field(ge=1)] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)] | None = Field(
        None, description="of the device, or of several <name>-<number>; default: <cluster>-<number>"
    )
    cluster: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] | None = Field(
        None, description="left out: clusters are made (fleet.clustering)"
    )
    storage_limit: Annotated[tuple[Bytes, ...], BeforeValidator(as_tuple), Field(min_length=1)] = Field(
        description="C_n, bytes or '300 KB'"
    )
    memory_limit: Annotated[tuple[Bytes, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = Field(
        None, description="bytes or '64 MB': weights, and what one forward pass of one sample holds at a time"
    )
    latency_limit: Annotated[tuple[Seconds, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = Field(
        None, description="seconds or '50 ms': of one sample, by the device's profile, which must be given"
    )
    gpu_capacity: Annotated[tuple[Watts, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = Field(
        (100.0,), description="G_n, watts; the other constants are those of fleet.energy"
    )
    profile: Annotated[tuple[Profile, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = Field(
        None, description="in place of gpu_capacity: a ready profile's name, a profile's .toml file, or its table"
    )

    @model_validator(mode="before")
    @classmethod
    def _power_from_one_place(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("profile") is None:
            return value
        if value.get("gpu_capacity") is not None:
            raise ValueError("gpu_capacity must be left out with profile, which has the power of the device")
        return {**value, "gpu_capacity": None}

    @field_validator("profile", mode="before")
    @classmethod
    def _whole_profile(cls, value: object) -> object:
        """A name or a file becomes what it stands for, so that the resolved job needs neither."""
        if isinstance(value, (list, tuple)):
            return [find_profile(v) if isinstance(v, str) else v for v in value]
        return find_profile(value) if isinstance(value, str) else value

    @property
    def names(self) -> tuple[str | None, ...]:
        """Of each device; None: it has none of its own."""
        if self.name is None or self.count == 1:
            return (self.name,) * self.count
        return tuple(f"{self.name}-{i}" for i in range(1, self.count + 1))

    @model_validator(mode="after")
    def _some_power(self) -> "DeviceGroup":
        if self.gpu_capacity is None and self.profile is None:
            raise ValueError("gpu_capacity must be given where there is no profile")
        if self.latency_limit is not None and self.profile is None:
            raise ValueError("profile must be given with latency_limit: it says how long the device takes")
        return self


class EnergyConfig(Section):
    """Constants of Eqs. 1-2, relative to each device's G_n and L; a device with a profile has its own."""

    power_slope_share: float = Field(0.1, ge=0, description="dG / G_n")
    patch_power_share: float = Field(0.5, ge=0, description="G_beta / G_n")
    latency_seconds: float = Field(1.0, gt=0, description="L")
    latency_slope_share: float = Field(0.1, ge=0, description="dL / L")
    epochs: Steps = Field(10, description="k, epochs whose energy is counted")


class FleetConfig(Section):
    """Who is there. Devices are named <cluster>-<number>."""

    devices: tuple[DeviceGroup, ...] = Field(
        default_factory=lambda: (
            DeviceGroup(count=5, cluster="phones", storage_limit=(160_000,), gpu_capacity=(40, 50, 60)),
            DeviceGroup(count=5, cluster="boxes", storage_limit=(400_000,), gpu_capacity=(80, 100, 120)),
            DeviceGroup(count=5, cluster="servers", storage_limit=(1_000_000,), gpu_capacity=(160, 200, 240)),
        ),
        min_length=1,
    )
    inventory: str = Field(
        "", description="in place of devices: a CSV file, one line a device; the resolved job has its devices instead"
    )
    columns: dict[str, str] = Field(
        {}, description="titles of the inventory's columns, where names do not tell: name, storage_limit, profile, ..."
    )
    clustering: Literal["storage", "kmeans"] = Field(
        "storage",
        description="where devices name no cluster. storage: none shares its limit with one of less than half its "
        "room; kmeans: the paper's, on watts and bytes as they are",
    )
    num_clusters: Annotated[int, Field(ge=1)] | None = Field(
        None, description="default: storage: as many as are needed, at most 8; kmeans: up to 3"
    )
    read_from: tuple[str, ...] = Field((), description="how the inventory was read; written by fleetfit")
    energy: EnergyConfig = EnergyConfig()

    @model_validator(mode="before")
    @classmethod
    def _devices_of_inventory(cls, value: object) -> object:
        """The devices of a file become the job's own, so that the resolved job does not need it."""
        if not isinstance(value, dict):
            return value
        path, columns = value.get("inventory"), value.get("columns") or {}
        if not path:
            if columns:
                raise ValueError("columns must be left out without inventory")
            return value
        if value.get("devices") is not None:
            raise ValueError("devices must be left out with inventory, which has them")
        if not isinstance(path, str) or not isinstance(columns, dict):
            return value
        try:
            found = read_inventory(path, {str(k): str(v) for k, v in columns.items()})
        except OSError as error:
            raise ValueError(f"inventory is a file that cannot be read: {error.strerror}, got {path!r}") from None
        devices = [{k: v for k, v in device.items() if k != "data"} for device in found.devices]
        rest = {k: v for k, v in value.items() if k not in ("inventory", "columns")}
        return {**rest, "devices": devices, "read_from": found.notes}

    @model_validator(mode="after")
    def _clusters(self) -> "FleetConfig":
        named = [g.cluster is not None for g in self.devices]
        if any(named) and not all(named):
            raise ValueError("devices.cluster must be given for all groups or for none (none: clusters are made)")
        if all(named) and self.num_clusters is not None:
            raise ValueError("num_clusters must be left out where every group of devices names its cluster")
        names = [name.casefold() for g in self.devices for name in g.names if name]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"devices.name must be another one for each device, {twice!r} is there twice")
        total = sum(g.count for g in self.devices)
        if self.num_clusters is not None and self.num_clusters > total:
            raise ValueError(f"num_clusters must be <= the number of devices ({total}), got {self.num_clusters}")
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
    cache: str = Field("~/.cache/fleetfit", description="trained references and decoded images, by content hash")
    track: Literal["", "tensorboard", "mlflow", "trackio"] = Field(
        "", description="a program that follows runs is told losses and results; its files are in the run folder"
    )


class Job(Section):
    """The resolved job."""

    method: Literal["fleetfit", "paper"] = "fleetfit"
    seed: int = Field(0, ge=0, le=MAX_SEED)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    fleet: FleetConfig = FleetConfig()
    backbone: BackboneConfig = BackboneConfig()
    header: HeaderConfig = HeaderConfig()
    refine: RefineConfig = RefineConfig()
    members: MembersConfig = MembersConfig()
    links: LinksConfig = LinksConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _private(self) -> "Job":
        if self.privacy.on and self.refine.shows_sketch and self.refine.sketch == "samples":
            raise ValueError(
                'refine.sketch must be "sliced" with privacy.noise_multiplier > 0, got "samples": what it shows are '
                "samples' own features"
            )
        if self.privacy.on and self.links.send_models:
            raise ValueError(
                "links.send_models must be false with privacy.noise_multiplier > 0, got true: a finished model is "
                "what its device has learned, without noise"
            )
        return self

    @model_validator(mode="after")
    def _groups(self) -> "Job":
        if self.refine.similarity == "oracle" and self.data.split != "groups" and self.data.shift == "none":
            raise ValueError(
                'refine.similarity must not be "oracle" without hidden groups: data.split = "groups", or a data.shift'
            )
        return self

    @model_validator(mode="after")
    def _depths(self) -> "Job":
        config = self.model.config  # of a pre-trained model it is not known yet
        layers = config.get("num_hidden_layers", config.get("n_layers"))
        if isinstance(layers, int) and max(self.backbone.depths, default=1) > layers:
            deepest = max(self.backbone.depths)
            raise ValueError(f"backbone.depths must be <= the reference's {layers} layers, got {deepest}")
        return self

    def to_toml(self) -> str:
        """The resolved job as TOML; reading it gives an equal job."""
        return tomli_w.dumps(json.loads(self.model_dump_json(exclude_none=True)))


def make_job(fields: dict[str, Any]) -> Job:
    """A job from plain nested fields, as TOML gives them: defaults < presets of method and start < the fields.

    Raises:
        ValueError: one line for each problem, with key, rule, what it got, and the nearest key.
    """
    try:
        return Job.model_validate(merged(preset_of(fields), fields))
    except ValidationError as error:
        raise ValueError(explain(error, Job)) from None


def parse_override(text: str) -> dict[str, Any]:
    """'header.search=enas' -> {'header': {'search': 'enas'}}; the value is TOML, or else a plain string."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"--set must be KEY=VALUE, got {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if not isinstance(parsed, str) and _is_text(key.strip()):  # a folder may be called 2024-11-25
        parsed = value.strip()
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _of_windows(path: Path) -> str:
    """A hint, if a value looks like a path of Windows in quotes in which backslashes begin signs."""
    if re.search(rb'"[A-Za-z]:\\', path.read_bytes()):
        return "; write a path of Windows in single quotes, or with /: in double quotes a backslash begins a sign"
    return ""


def _is_text(key: str) -> bool:
    """Whether a job's key, as header.search, takes any text."""
    fields: Any = Job
    for name in key.split("."):
        known = getattr(fields, "model_fields", {})
        if name not in known:
            return False
        fields = known[name].annotation
    return fields is str


def _find_beside(path: Path, fields: dict[str, Any]) -> None:
    """An inventory that is not there from here may lie beside the job."""
    fleet = fields.get("fleet")
    named = fleet.get("inventory") if isinstance(fleet, dict) else None
    if isinstance(named, str) and named and not Path(named).exists() and (path.parent / named).is_file():
        fields["fleet"] = {**fields["fleet"], "inventory": str(path.parent / named)}


def load_job(path: str | Path, overrides: tuple[str, ...] = ()) -> Job:
    """Read and resolve a job file, or the recipe of that name.

    Raises:
        ValueError: not TOML, or not a valid job.
        OSError: the file cannot be read.
    """
    path = job_path(path)
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}{_of_windows(path)}") from None
    _find_beside(path, fields)
    for text in overrides:
        fields = merged(fields, parse_override(text))
    try:
        return make_job(fields)
    except ValueError as error:
        raise ValueError(f"{path}:\n{error}") from None
