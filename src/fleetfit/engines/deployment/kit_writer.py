"""Writes kits: each participant's folder, and the authority's."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetfit.config.job import Job
from fleetfit.core.files import own_version
from fleetfit.core.records import DeviceAttributes
from fleetfit.data.participant import Cut, write_owned
from fleetfit.data.partition import FleetData, Split
from fleetfit.data.sources import Origin
from fleetfit.engines.deployment.certificates import Authority, make_member_key, make_server
from fleetfit.engines.deployment.kit import job_hash, write_secret
from fleetfit.engines.deployment.kit_file import (
    KIT_FILE,
    KIT_FORMAT,
    KitData,
    KitDevice,
    KitFile,
    KitMember,
    KitPrivacy,
    KitServer,
    KitUpstream,
    Role,
    Task,
    kit_toml,
)
from fleetfit.engines.deployment.updates import FleetRecord, write_record

CLOUD = "cloud"


@dataclass(frozen=True)
class FleetPlan:
    """A fleet as its file has it: servers by participant, devices with what they can do by edge, sources by name."""

    job: Job
    servers: Mapping[str, KitServer]
    devices: Mapping[str, tuple[DeviceAttributes, ...]]
    sources: Mapping[str, str]
    privacy: KitPrivacy
    days: int
    insecure: bool

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which to start them."""
        return (*self.servers, *(d.device_id for own in self.devices.values() for d in own))


@dataclass(frozen=True)
class Making:
    """What all kits share while they are made."""

    folder: Path
    plan: FleetPlan
    fleet: str
    task: Task
    authority: Authority
    split: FleetData | None = None
    origin: Origin | None = None


def write_authority(home: Path, making: Making, record: FleetRecord) -> None:
    """Write the authority's folder; one that was there before is no more."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / "ca.key").unlink(missing_ok=True)
    write_secret(home / "ca.key", making.authority.key_pem)
    (home / "ca.pem").write_bytes(making.authority.certificate_pem)
    (home / "README.txt").write_text(CA_README)
    write_record(home, record)


def record_of(making: Making, members: Mapping[str, KitMember]) -> FleetRecord:
    """What is remembered of a new fleet."""
    plan = making.plan
    return FleetRecord(
        fleet=making.fleet,
        days=plan.days,
        job=job_hash(plan.job),
        task=making.task,
        servers=dict(plan.servers),
        members={
            CLOUD: tuple(members[edge] for edge in plan.devices),
            **{edge: tuple(members[d.device_id] for d in own) for edge, own in plan.devices.items()},
        },
    )


def write_kits(making: Making, names: Collection[str]) -> dict[str, KitMember]:
    """Write the kits of some participants; what those above know of them."""
    plan, data = making.plan, making.split
    keys = {name: make_member_key() for name in plan.names if name != CLOUD and name in names}
    able = {d.device_id: able_of(d) for own in plan.devices.values() for d in own}
    members = {n: KitMember(name=n, public_key=line, device=able.get(n)) for n, (_, line) in keys.items()}
    if CLOUD in names:
        known = {"server": plan.servers[CLOUD], "members": tuple(members[edge] for edge in plan.devices)}
        _write_kit(making, CLOUD, "cloud", known, None, data.public if data else None)
    for edge, own in plan.devices.items():
        if edge in names:
            known = {
                "server": plan.servers[edge],
                "upstream": upstream_of(CLOUD, plan.servers[CLOUD]),
                "members": tuple(members[d.device_id] for d in own),
            }
            _write_kit(making, edge, "edge", known, keys[edge][0], data.edges[edge] if data else None)
        for device in own:
            name = device.device_id
            if name in names:
                known = {
                    "upstream": upstream_of(edge, plan.servers[edge]),
                    "device": able[name],
                    "privacy": plan.privacy,
                }
                _write_kit(making, name, "device", known, keys[name][0], data.devices[name] if data else None)
    return members


def able_of(device: DeviceAttributes) -> KitDevice:
    """What a device can do, as kits say it."""
    return KitDevice(storage_limit_bytes=device.storage_limit_bytes, energy=device.energy.model_dump())


def _write_kit(
    making: Making, name: str, role: Role, known: dict[str, Any], key: bytes | None, split: Split | None
) -> None:
    """Write one participant's folder; what it knows of others depends on its role."""
    plan = making.plan
    cut: Cut = "own" if making.split is None else "given"
    fields = {
        "format": KIT_FORMAT,
        "fleet": making.fleet,
        "name": name,
        "role": role,
        "fleetfit": own_version(),
        "insecure": plan.insecure,
        "data": KitData(source=plan.sources.get(name) or "data", cut=cut),
    }
    file = KitFile.model_validate(fields | known)
    folder = making.folder / name
    folder.mkdir(mode=0o700)
    (folder / KIT_FILE).write_text(kit_toml(file))
    (folder / "job.toml").write_text(plan.job.to_toml())
    (folder / "task.json").write_text(making.task.model_dump_json() + "\n")
    if not plan.insecure:
        (folder / "ca.pem").write_bytes(making.authority.certificate_pem)
        if file.server is not None:
            certificate, private = make_server(making.authority, name, [file.server.address], plan.days)
            (folder / "server.pem").write_bytes(certificate)
            write_secret(folder / "server.key", private)
    if key is not None:
        write_secret(folder / "node.key", key)
    if split is not None and making.origin is not None:
        write_owned(folder / "data", plan.job, split, making.origin)


def upstream_of(name: str, server: KitServer) -> KitUpstream:
    """The one above, as the kits below have it."""
    return KitUpstream(name=name, address=server.address, port=server.port)


CA_README = """\
ca.key signs the certificates of this fleet: whoever has it can pass for its cloud or for any of its edges, and say
who belongs to it. No participant needs it. Keep the folder where no participant is, offline: `fleetfit provision
--authority <this folder>` needs it to add, replace or remove a device. fleet.json says who belongs to the fleet.
"""
