"""FLEET.toml: where a job's fleet really is. It names the job, the cloud, the edges and the devices behind each edge.

The method's settings stay in the job; here is only who is there, by what address, and with what data.
"""

import ipaddress
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.errors import explain
from fleetfit.config.fleet import DeviceGroup
from fleetfit.config.inventory import read_inventory
from fleetfit.config.job import Job, load_job
from fleetfit.config.profiles import SAMPLES_PER_EPOCH, Profile, find_profile
from fleetfit.config.types import Bytes, Seconds, Section, Steps, Watts
from fleetfit.core.records import DeviceAttributes

FIRST_PORT = 9400
RESERVED = ("ca", "cloud")
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61})?)*")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class Place(Section):
    """Where others reach a server."""

    address: str = Field("127.0.0.1", description="a host name or an IP address, as those below reach it")
    port: Port | None = Field(None, description="default: 9400, and the next free numbers at the same address")
    data: str = Field("", description="a file or folder on that machine; relative to the folder of the kit")

    @field_validator("address")
    @classmethod
    def _an_address(cls, value: str) -> str:
        try:
            return str(ipaddress.ip_address(value))
        except ValueError:
            if HOST_NAME.fullmatch(value) and not re.fullmatch(r"[\d.]+", value):
                return value.lower()
        raise ValueError(f"must be a host name or an IP address, without a port, got {value!r}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.address)


class DeviceEntry(Section):
    """A device. What it can do is said here, or else by the job, of its device of the same name."""

    name: Name | None = Field(None, description="default: <edge>-<number>")
    storage_limit: Bytes | None = Field(None, description="bytes or '300 KB'")
    memory_limit: Bytes | None = Field(None, description="bytes or '64 MB', of one forward pass of one sample")
    latency_limit: Seconds | None = Field(None, description="seconds or '50 ms' of one sample, by the profile")
    gpu_capacity: Watts | None = Field(None, description="watts")
    profile: Profile | None = Field(None, description="in place of gpu_capacity: a ready profile's name or a file")
    data: str = Field("", description="a file or folder on the device, which it reads and never sends")

    @field_validator("profile", mode="before")
    @classmethod
    def _whole_profile(cls, value: object) -> object:
        return find_profile(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _all_or_nothing(self) -> "DeviceEntry":
        powers = [key for key in ("gpu_capacity", "profile") if getattr(self, key) is not None]
        if len(powers) == 2:
            raise ValueError("gpu_capacity must be left out with profile, which has the power of the device")
        limits = [key for key in ("memory_limit", "latency_limit") if getattr(self, key) is not None]
        if (powers or limits) and self.storage_limit is None:
            raise ValueError(f"storage_limit must be given with {(powers + limits)[0]}")
        if self.latency_limit is not None and self.profile is None:
            raise ValueError("profile must be given with latency_limit: it says how long the device takes")
        return self


class EdgeEntry(Place):
    """An edge; its name is the cluster's."""

    name: Name
    devices: tuple[DeviceEntry, ...] = Field((), description="default: the job's devices of this cluster")


class CertificatesConfig(Section):
    """How long kits are good for."""

    days: Steps = Field(365, le=3650, description="after these, provision again with --anew")


class PrivacyEntry(Section):
    """Of a job with [privacy]: what every device promises over all runs."""

    lifetime_epsilon: float | None = Field(
        None, gt=0, description="the most that all runs of one device together may promise; default: what one does"
    )


class FleetFile(Section):
    """The file."""

    job: str = Field(min_length=1, description="the job's file, relative to this one")
    cloud: Place = Place()
    edges: tuple[EdgeEntry, ...] = Field(min_length=1)
    certificates: CertificatesConfig = CertificatesConfig()
    privacy: PrivacyEntry = PrivacyEntry()
    inventory: str = Field("", description="a CSV file of all devices, whose clusters are the edges; relative to this")
    columns: dict[str, str] = Field({}, description="titles of the inventory's columns, where names do not tell")

    @model_validator(mode="after")
    def _everyone_has_a_name_of_his_own(self) -> "FleetFile":
        seen: dict[str, str] = {}
        for key, name in self._names():
            if name.lower() in RESERVED:
                raise ValueError(f"{key} must not be {name!r}, which is the folder of another kit")
            if name.lower() in seen:
                raise ValueError(f"{key} must not be {name!r}, which {seen[name.lower()]} is called already")
            seen[name.lower()] = key
        return self

    def _names(self) -> Iterator[tuple[str, str]]:
        for i, edge in enumerate(self.edges):
            yield f"edges.{i}.name", edge.name
            for j, device in enumerate(edge.devices):
                yield f"edges.{i}.devices.{j}.name", device.name or f"{edge.name}-{j + 1}"


def is_loopback(address: str) -> bool:
    """Whether an address reaches this machine only."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def load_fleet_file(path: Path) -> tuple[FleetFile, Job]:
    """Read a fleet's file and the job that it names.

    Raises:
        ValueError: not TOML, or not a valid fleet or job; one line for each problem.
        OSError: a file cannot be read.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    if named := fields.pop("inventory", None):
        _take_inventory(path, named, fields)
    try:
        fleet = FleetFile.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{path}:\n{explain(error, FleetFile)}") from None
    return fleet, load_job(path.parent / fleet.job)


def _take_inventory(path: Path, named: object, fields: dict[str, Any]) -> None:
    """The devices of an inventory, each to the edge that its cluster is called like; of edges that list none."""
    columns, edges = fields.pop("columns", {}), fields.get("edges")
    if not isinstance(named, str) or not isinstance(columns, dict) or not isinstance(edges, list):
        raise ValueError(f"{path}: inventory must be a file, columns a table, and edges must be given")
    found = read_inventory(path.parent / named, columns)
    names = {str(edge.get("name")) for edge in edges if isinstance(edge, dict)}
    for device in found.devices:
        if device.get("cluster") not in names:
            raise ValueError(
                f"{path.parent / named}: the cluster of {device['name']!r} must be the name of an edge of {path}, "
                f"{', '.join(sorted(names))}, got {device.get('cluster')!r}"
            )
    for edge in edges:
        own = [device for device in found.devices if device["cluster"] == edge.get("name")]
        if own and edge.get("devices"):
            raise ValueError(f"{path}: edges.devices must be left out of {edge.get('name')!r}: the inventory has them")
        if own:
            edge["devices"] = [{k: v for k, v in device.items() if k != "cluster"} for device in own]


def devices_of(fleet: FleetFile, job: Job) -> tuple[Job, dict[str, tuple[DeviceAttributes, ...]]]:
    """Every edge's devices with what they can do, and the job with this fleet in place of its own.

    Raises:
        ValueError: the job has no devices of an edge's name, or does not say what a device can do.
    """
    known = fleet_of(job)
    groups: list[DeviceGroup] = []
    names: dict[str, list[str]] = {}
    for i, edge in enumerate(fleet.edges):
        entries = edge.devices or tuple(DeviceEntry() for _ in known.get(edge.name, ()))
        if not entries:
            there = ", ".join(known)
            raise ValueError(f"edges.{i}.devices must be given: the job has no cluster {edge.name!r}, only {there}")
        names[edge.name] = [d.name or f"{edge.name}-{j + 1}" for j, d in enumerate(entries)]
        by_name = {a.device_id: a for a in known.get(edge.name, ())}
        for j, (entry, name) in enumerate(zip(entries, names[edge.name], strict=True)):
            if entry.storage_limit is None and name not in by_name:
                raise ValueError(
                    f"edges.{i}.devices.{j}.storage_limit must be given: the job has no device {name!r} in its "
                    f"cluster {edge.name!r}"
                )
            groups.append(_group(entry, edge.name, by_name.get(name)))
    job = job.model_copy(
        update={"fleet": job.fleet.model_copy(update={"devices": tuple(groups), "num_clusters": None})}
    )
    found = {
        cluster: tuple(
            a.model_copy(update={"device_id": name}) for a, name in zip(members, names[cluster], strict=True)
        )
        for cluster, members in fleet_of(job).items()
    }
    return job, found


def _group(entry: DeviceEntry, cluster: str, known: DeviceAttributes | None) -> DeviceGroup:
    """A device as a job says it."""
    if entry.storage_limit is None:
        assert known is not None
        power = Profile(name="job", hardware="as in the job", source="the job", **known.energy.model_dump())
        memory = None if known.memory_limit_bytes is None else (known.memory_limit_bytes,)
        if known.latency is not None:
            # A layer's operations such that the profile tells the same time for an operation.
            each = known.latency.seconds_per_operation
            slope = known.energy.latency_slope_seconds
            power = power.model_copy(
                update={"layer_operations": slope / SAMPLES_PER_EPOCH / each if each and slope else None}
            )
        return DeviceGroup(
            name=entry.name,
            cluster=cluster,
            storage_limit=(known.storage_limit_bytes,),
            profile=(power,),
            memory_limit=memory,
            latency_limit=None if known.latency is None else (known.latency.seconds,),
        )
    memory = None if entry.memory_limit is None else (entry.memory_limit,)
    group = DeviceGroup(name=entry.name, cluster=cluster, storage_limit=(entry.storage_limit,), memory_limit=memory)
    if entry.profile is not None:
        latency = None if entry.latency_limit is None else (entry.latency_limit,)
        return group.model_copy(update={"profile": (entry.profile,), "gpu_capacity": None, "latency_limit": latency})
    if entry.gpu_capacity is not None:
        return group.model_copy(update={"gpu_capacity": (entry.gpu_capacity,)})
    return group


def ports_of(fleet: FleetFile) -> list[int]:
    """The ports of the cloud and of each edge, in this order: those that are given, else free ones at that address.

    Raises:
        ValueError: two at one address have the same port.
    """
    places: list[Place] = [fleet.cloud, *fleet.edges]
    keys = ["cloud", *(f"edges.{i}" for i in range(len(fleet.edges)))]
    taken: dict[tuple[str, int], str] = {}
    for key, place in zip(keys, places, strict=True):
        if place.port is not None:
            other = taken.setdefault((_machine(place), place.port), key)
            if other != key:
                raise ValueError(f"{key}.port must not be {place.port}, which {other} has at the same address")
    found = []
    for key, place in zip(keys, places, strict=True):
        port = place.port
        if port is None:
            port = FIRST_PORT
            while (_machine(place), port) in taken:
                port += 1
            taken[_machine(place), port] = key
        found.append(port)
    return found


def _machine(place: Place) -> str:
    return "this machine" if place.is_loopback else place.address
