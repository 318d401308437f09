"""The job: one TOML file says everything. Validated, immutable, and the only home of defaults.

Defaults are fleetfit's own choices, made by measurement (benchmarks/results/). ``method = "paper"`` puts every choice
to the paper's own; a key that a job states itself wins over both.
"""

import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from fleetfit.config.errors import explain
from fleetfit.config.fleet import FleetConfig
from fleetfit.config.presets import merged, preset_of
from fleetfit.config.sections import (
    BackboneConfig,
    DataConfig,
    HeaderConfig,
    LinksConfig,
    MembersConfig,
    ModelConfig,
    PrivacyConfig,
    RefineConfig,
    RunConfig,
)
from fleetfit.config.types import Section
from fleetfit.core.records import MAX_SEED
from fleetfit.recipes import job_path


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
    def _unlabelled(self) -> "Job":
        if self.refine.unlabelled and (self.privacy.on or not self.refine.class_prior):
            rule = "privacy.noise_multiplier = 0" if self.privacy.on else "refine.class_prior = true"
            raise ValueError(f"refine.unlabelled needs {rule}, got true: inputs say nothing but what the prior is")
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


def reads_of(job: Job, keys: Iterable[str]) -> dict[str, object]:
    """The values of some keys (``seed``, ``backbone.steps``), as JSON has them."""
    fields = job.model_dump(mode="json")
    found: dict[str, object] = {}
    for key in keys:
        section, _, name = key.partition(".")
        found[key] = fields[section][name] if name else fields[section]
    return found


def narrowed(job: Job, keys: Iterable[str]) -> Job:
    """A job in which only these keys, and how it is run, are as in this one, and all others have their defaults.

    What is computed with it cannot depend on anything else, so a hash of these keys stands for it.
    """
    base = Job()
    sections: dict[str, dict[str, object]] = {}
    whole: dict[str, object] = {"run": job.run}
    for key in keys:
        section, _, name = key.partition(".")
        if not name:
            whole[section] = getattr(job, section)
        elif section != "run":
            sections.setdefault(section, {})[name] = getattr(getattr(job, section), name)
    whole |= {name: getattr(base, name).model_copy(update=values) for name, values in sections.items()}
    return base.model_copy(update=whole)


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
