"""Device profiles: the constants of Eqs. 1-2 of a real device, with their source. Ready ones, and files.

A profile's T is the time that 1,000 samples take to pass once through the model, in the place of an epoch. Ready
profiles are facts that vendors publish, put through one rule (``PublishedDevice``); what ``fleetfit profile`` writes is
measured.
"""

import difflib
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ConfigDict, Field, ValidationError

from fleetfit.core.records import EnergyModel, Record

SAMPLES_PER_EPOCH = 1000
SHARE_OF_PEAK = 0.3


class Profile(EnergyModel):
    """What Eqs. 1-2 need to know of a device, and where that is from; T is for 1,000 samples."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    hardware: str = Field(min_length=1)
    source: str = Field(min_length=1, description="where the numbers come from: measured, derived, or published")
    power_watts: float = Field(ge=0, description="G_n, power at (w, d) -> 0")
    power_slope_watts: float = Field(ge=0, description="dG, more power per unit of width x depth")
    patch_power_watts: float = Field(ge=0, description="G_beta, power per patch")
    latency_seconds: float = Field(ge=0, description="L, time at (w, d) -> 0")
    latency_slope_seconds: float = Field(ge=0, description="dL, more time per unit of width x depth")
    layer_operations: float | None = Field(
        None,
        gt=0,
        description="of a layer of the model that T is of, for one sample; where T is derived",
    )

    @property
    def seconds_per_operation(self) -> float | None:
        """By which T of another model is told; None: T was measured, and is that of the measured model."""
        if self.layer_operations is None:
            return None
        return self.latency_slope_seconds / SAMPLES_PER_EPOCH / self.layer_operations

    @property
    def energy(self) -> EnergyModel:
        """The constants alone, as a device tells them."""
        return EnergyModel(**self.model_dump(include=set(EnergyModel.model_fields)))


class PublishedDevice(Record):
    """What a vendor publishes of a device, and the rule that makes a profile of it.

    Beyond: power is what is published, whatever runs. Time is derived: the operations of a ViT-B/16 on 1,000 images of
    224x224, at ``SHARE_OF_PEAK`` of the device's peak in 32 bits. That share is our assumption, the same for all, so
    that ratios between devices are those of their peaks. Patch embedding gives L, a layer gives dL.
    """

    hardware: str
    published: str = Field(min_length=1)
    watts: float = Field(gt=0)
    gigaflops: float = Field(gt=0)

    def profile(self, name: str) -> Profile:
        """The device as constants of Eqs. 1-2."""
        embedding, layer = vit_operations(
            hidden_size=768, neurons=3072, num_patches=196, patch_inputs=3 * 16 * 16, prefix_tokens=1
        )
        seconds = SAMPLES_PER_EPOCH / (SHARE_OF_PEAK * self.gigaflops * 1e9)
        return Profile(
            name=name,
            hardware=self.hardware,
            source=(
                f"Published: {self.published} Derived, not measured: constant power of {self.watts:g} W; time of a "
                f"ViT-B/16 on 1,000 images at {SHARE_OF_PEAK:.0%} of {self.gigaflops:g} GFLOP/s."
            ),
            power_watts=self.watts,
            power_slope_watts=0.0,
            patch_power_watts=0.0,
            latency_seconds=float(f"{embedding * seconds:.4g}"),
            latency_slope_seconds=float(f"{layer * seconds:.4g}"),
            layer_operations=layer,
        )


def vit_operations(
    hidden_size: int, neurons: int, num_patches: int, patch_inputs: int, prefix_tokens: int
) -> tuple[float, float]:
    """Floating-point operations of one image in a ViT's matrix products: (patch embedding, one layer of full width).

    A multiplication and its addition count as two. A layer's operations are proportional to its width, as Eq. 2 has
    it: projections, attention and MLP all shrink with the heads and neurons that are kept.
    """
    tokens = num_patches + prefix_tokens
    embedding = 2.0 * num_patches * patch_inputs * hidden_size
    projections = 2.0 * tokens * (4 * hidden_size**2 + 2 * hidden_size * neurons)
    attention = 2.0 * 2 * tokens**2 * hidden_size
    return embedding, projections + attention


@cache
def ready_profiles() -> dict[str, Profile]:
    """The profiles that come with fleetfit, by name."""
    tables = tomllib.loads(resources.files("fleetfit.config").joinpath("profiles.toml").read_text(encoding="utf-8"))
    return {
        name: PublishedDevice(**table).profile(name) if "published" in table else Profile(name=name, **table)
        for name, table in tables.items()
    }


def read_profile(path: str | Path) -> Profile:
    """A profile that ``fleetfit profile`` or a person wrote.

    Raises:
        ValueError: no profile; names file and first problem.
        OSError: the file cannot be read.
    """
    try:
        return Profile.model_validate(tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise ValueError(f"{path} is no device profile: {problem}{more}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def find_profile(named: str) -> Profile:
    """The ready profile of that name, or the one in the file: what ends in .toml is a file.

    Raises:
        ValueError: neither; names the nearest ready profile, and all of them.
    """
    if named.endswith(".toml"):
        try:
            return read_profile(named)
        except OSError as error:
            raise ValueError(f"is a file that cannot be read: {error.strerror}, got {named!r}") from None
    ready = ready_profiles()
    if named not in ready:
        near = difflib.get_close_matches(named, ready, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"must be a ready profile or a .toml file, got {named!r}; {hint}ready profiles: {', '.join(ready)}"
        )
    return ready[named]


def profile_toml(profile: Profile, notes: Sequence[str] = ()) -> str:
    """A profile as a file that ``read_profile`` reads; notes become comments above it."""
    fields: dict[str, Any] = profile.model_dump(exclude_none=True)
    order = [*(key for key in fields if key not in EnergyModel.model_fields), *EnergyModel.model_fields]
    comments = "".join(f"# {line}".rstrip() + "\n" for line in notes)
    return comments + tomli_w.dumps({key: fields[key] for key in order})
