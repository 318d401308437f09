"""The job's fleet: groups of like devices, their storage, hardware and energy."""

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from fleetfit.config.inventory import read_inventory
from fleetfit.config.profiles import Profile, find_profile
from fleetfit.config.types import Bytes, Seconds, Section, Steps, Watts, as_tuple


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
