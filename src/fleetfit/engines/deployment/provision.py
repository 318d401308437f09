"""FLEET.toml -> one kit for each participant: its keys and certificates, whom it knows, the job, and maybe its data."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetfit.config.job import Job
from fleetfit.core.files import own_version, whole_folder
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import DeviceAttributes
from fleetfit.data.participant import Cut, write_owned
from fleetfit.data.partition import FleetData, Split, share_out
from fleetfit.data.sources import Origin, load_source
from fleetfit.engines.deployment.certificates import Authority, make_authority, make_member_key, make_server
from fleetfit.engines.deployment.fleet_file import FleetFile, Place, devices_of, load_fleet_file, ports_of
from fleetfit.engines.deployment.kit import (
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
    running,
    write_secret,
)

MARK = "fleet.id"
CLOUD = "cloud"


@dataclass(frozen=True)
class Provisioned:
    """What was made.

    Attributes:
        folder: Where the kits are.
        fleet: The fleet's id.
        kits: Folders in the order in which to start them: cloud, edges, devices.
        days: How long the certificates are valid.
    """

    folder: Path
    fleet: str
    kits: tuple[Path, ...]
    days: int


@dataclass(frozen=True)
class _Making:
    """What all kits of one fleet share while they are made."""

    folder: Path
    fleet: str
    job: Job
    task: Task
    insecure: bool
    days: int
    authority: Authority
    split: FleetData | None
    origin: Origin


def provision(
    path: Path, out: Path, split_data: bool = False, insecure: bool = False, progress: Progress = silent
) -> Provisioned:
    """Make the kits of a fleet; kits of an earlier time in the same folder are replaced.

    Args:
        path: FLEET.toml.
        out: Where the kits go.
        split_data: Put a part of the job's data into each kit, exactly as the local engine shares it out.
        insecure: No TLS and no keys; at loopback addresses only.
        progress: Told how far the phase "data" is.

    Raises:
        ValueError: a bad fleet or job, data that cannot be read, something else in the folder, kits that are running.
        OSError: a file cannot be read, or the folder cannot be written.
    """
    fleet, job = load_fleet_file(path)
    _check_addresses(fleet, insecure)
    ports = ports_of(fleet)
    job, devices = devices_of(fleet, job)
    _check_data(fleet, devices, split_data)
    _check_simulated(job)
    for kit in out.glob(f"*/{KIT_FILE}"):
        if running(kit.parent):
            raise ValueError(f"{kit.parent} is running; stop it before its kit is replaced")
    progress("data", 0, 1, job.data.source)
    public_job = job if split_data else _public(job, _source(path, fleet.cloud.data))
    samples, origin = load_source(public_job, progress)
    if samples.inputs.form is None:
        raise ValueError(f"data.source = {job.data.source!r} gives inputs that are ready: a kit needs images or texts")
    task = Task(labels=samples.label_names, form=samples.inputs.form, raw_bytes_per_sample=samples.raw_bytes_per_sample)
    names = {cluster: [d.device_id for d in members] for cluster, members in devices.items()}
    split = share_out(samples, job.data, names, job.seed) if split_data else None
    progress("data", 1, 1, f"{len(samples):,} samples")
    for line in (*(samples.summary.lines if samples.summary else ()), *(split.notes if split else ())):
        progress("data", 0, 0, line)
    days = fleet.certificates.days
    made_id = secrets.token_hex(8)
    with whole_folder(out, MARK) as folder:
        making = _Making(folder, made_id, job, task, insecure, days, make_authority(made_id, days), split, origin)
        kits = _write_all(making, path, fleet, ports, devices)
        (folder / MARK).write_text(f"{made_id}\n")
    return Provisioned(out, made_id, tuple(out / name for name in kits), days)


def _check_simulated(job: Job) -> None:
    """Raises ValueError for keys that only a simulated fleet can have: kits hold rows of the source as they are."""
    simulated = {
        "data.shift": (job.data.shift, "none"),
        "data.unlabelled_share": (job.data.unlabelled_share, 0.0),
    }
    for key, (got, must) in simulated.items():
        if got != must:
            raise ValueError(f"{key} must be {must!r} for real machines, got {got!r}: it is for simulated fleets")
    if job.refine.similarity == "oracle":
        raise ValueError('refine.similarity must not be "oracle" for real machines: nobody knows their groups')


def _write_all(
    making: _Making, path: Path, fleet: FleetFile, ports: list[int], devices: Mapping[str, tuple[DeviceAttributes, ...]]
) -> list[str]:
    """Write all kits; their names in the order in which to start them."""
    ca = making.folder / "ca"
    ca.mkdir(mode=0o700)
    (ca / "ca.pem").write_bytes(making.authority.certificate_pem)
    write_secret(ca / "ca.key", making.authority.key_pem)
    (ca / "README.txt").write_text(CA_README)
    names, places = (CLOUD, *devices), (fleet.cloud, *fleet.edges)
    servers = {n: _server(place, port) for n, place, port in zip(names, places, ports, strict=True)}
    keys = {name: make_member_key() for name in (*devices, *(d.device_id for own in devices.values() for d in own))}
    able = {
        d.device_id: KitDevice(storage_limit_bytes=d.storage_limit_bytes, energy=d.energy.model_dump())
        for own in devices.values()
        for d in own
    }
    members = {n: KitMember(name=n, public_key=line, device=able.get(n)) for n, (_, line) in keys.items()}
    data = making.split
    _write_kit(
        making,
        _kit_file(making, CLOUD, "cloud", _source(path, fleet.cloud.data))
        | {"server": servers[CLOUD], "members": tuple(members[edge] for edge in devices)},
        None,
        data.public if data else None,
    )
    for edge in fleet.edges:
        own = devices[edge.name]
        _write_kit(
            making,
            _kit_file(making, edge.name, "edge", _source(path, edge.data))
            | {
                "server": servers[edge.name],
                "upstream": _upstream(CLOUD, servers[CLOUD]),
                "members": tuple(members[d.device_id] for d in own),
            },
            keys[edge.name][0],
            data.edges[edge.name] if data else None,
        )
    for edge in fleet.edges:
        entries = edge.devices or (None,) * len(devices[edge.name])
        for attributes, entry in zip(devices[edge.name], entries, strict=True):
            energy = attributes.energy.model_dump()
            limit = attributes.storage_limit_bytes
            _write_kit(
                making,
                _kit_file(making, attributes.device_id, "device", _source(path, entry.data if entry else ""))
                | {
                    "upstream": _upstream(edge.name, servers[edge.name]),
                    "device": KitDevice(storage_limit_bytes=limit, energy=energy),
                    "privacy": KitPrivacy(lifetime_epsilon=fleet.privacy.lifetime_epsilon),
                },
                keys[attributes.device_id][0],
                data.devices[attributes.device_id] if data else None,
            )
    return [CLOUD, *devices, *(d.device_id for own in devices.values() for d in own)]


def _kit_file(making: _Making, name: str, role: Role, source: str) -> dict[str, Any]:
    """The fields of kit.toml that all roles have."""
    cut: Cut = "own" if making.split is None else "given"
    return {
        "format": KIT_FORMAT,
        "fleet": making.fleet,
        "name": name,
        "role": role,
        "fleetfit": own_version(),
        "insecure": making.insecure,
        "data": KitData(source=source or "data", cut=cut),
    }


def _write_kit(making: _Making, fields: dict[str, Any], key: bytes | None, split: Split | None) -> None:
    """Write one participant's folder."""
    file = KitFile.model_validate(fields)
    folder = making.folder / file.name
    folder.mkdir(mode=0o700)
    (folder / KIT_FILE).write_text(kit_toml(file))
    (folder / "job.toml").write_text(making.job.to_toml())
    (folder / "task.json").write_text(making.task.model_dump_json() + "\n")
    if not making.insecure:
        (folder / "ca.pem").write_bytes(making.authority.certificate_pem)
        if file.server is not None:
            certificate, private = make_server(making.authority, file.name, [file.server.address], making.days)
            (folder / "server.pem").write_bytes(certificate)
            write_secret(folder / "server.key", private)
    if key is not None:
        write_secret(folder / "node.key", key)
    if split is not None:
        write_owned(folder / "data", making.job, split, making.origin)


def _server(place: Place, port: int) -> KitServer:
    everywhere = "::" if ":" in place.address else "0.0.0.0"
    listen = place.address if place.is_loopback else everywhere
    return KitServer(address=place.address, port=port, listen=listen)


def _upstream(name: str, server: KitServer) -> KitUpstream:
    return KitUpstream(name=name, address=server.address, port=server.port)


def _source(path: Path, data: str) -> str:
    """Data as a kit names it: what lies beside FLEET.toml by its whole path, all else as it is."""
    beside = path.parent / Path(data).expanduser()
    return str(beside.resolve()) if data and beside.exists() else data


def _public(job: Job, source: str) -> Job:
    """The job that reads the cloud's own data, all of which is public."""
    shares = {"public_share": 1.0, "test_share": 0.0, "edge_share": 0.0}
    return job.model_copy(update={"data": job.data.model_copy(update={"source": source, **shares})})


def _check_addresses(fleet: FleetFile, insecure: bool) -> None:
    places = {"cloud": fleet.cloud} | {f"edges.{i}": edge for i, edge in enumerate(fleet.edges)}
    for key, place in places.items():
        if insecure and not place.is_loopback:
            raise ValueError(
                f"{key}.address must be a loopback address with --insecure, got {place.address!r}: without TLS, "
                "everyone on the way could read and change what is sent"
            )


def _check_data(fleet: FleetFile, devices: Mapping[str, tuple[DeviceAttributes, ...]], split_data: bool) -> None:
    owners = {"cloud.data": fleet.cloud.data}
    for i, edge in enumerate(fleet.edges):
        owners[f"edges.{i}.data"] = edge.data
        for j, _ in enumerate(devices[edge.name]):
            owners[f"edges.{i}.devices.{j}.data"] = edge.devices[j].data if edge.devices else ""
    for key, data in owners.items():
        if split_data and data:
            raise ValueError(f"{key} must be left out with --split-data, which gives each a part of the job's data")
        if not split_data and not data:
            raise ValueError(
                f"{key} must be given: the file or folder of its samples. For a trial on one machine, --split-data "
                "gives each a part of the job's data"
            )


CA_README = """\
ca.key signs the certificates of this fleet: whoever has it can pass for its cloud or for any of its edges.
No participant needs it. Keep it where no participant is, offline, or delete it: to provision again makes a new one.
"""
