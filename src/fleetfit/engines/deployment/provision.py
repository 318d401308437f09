"""FLEET.toml -> one kit for each participant: its keys and certificates, whom it knows, the job, and maybe its data."""

import itertools
import secrets
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from fleetfit.config.job import Job
from fleetfit.core.files import whole_folder
from fleetfit.core.progress import Progress, silent
from fleetfit.data.partition import share_out
from fleetfit.data.sources import load_source
from fleetfit.engines.deployment.certificates import (
    make_authority,
    read_authority,
)
from fleetfit.engines.deployment.fleet_file import FleetFile, Place, devices_of, load_fleet_file, ports_of
from fleetfit.engines.deployment.kit import job_hash, running
from fleetfit.engines.deployment.kit_file import (
    KIT_FILE,
    KitMember,
    KitPrivacy,
    KitServer,
    Task,
)
from fleetfit.engines.deployment.kit_writer import (
    CLOUD,
    FleetPlan,
    Making,
    able_of,
    record_of,
    write_authority,
    write_kits,
)
from fleetfit.engines.deployment.updates import UPDATE_FILE, FleetRecord, read_record, write_record, write_update

MARK = "fleet.id"


@dataclass(frozen=True)
class Provisioned:
    """What was made.

    Attributes:
        folder: Where the kits are.
        fleet: The fleet's id.
        kits: Folders of the kits that were made, in the order in which to start them: cloud, edges, devices.
        days: How long the certificates are valid.
        updates: Of a fleet that changed: files for the kits of its cloud and edges.
        gone: Of a fleet that changed: who does not belong to it any more.
        authority: Where the authority is.
        is_new: Whether it is another fleet than the one that was there, if one was.
    """

    folder: Path
    fleet: str
    kits: tuple[Path, ...]
    days: int
    updates: tuple[Path, ...]
    gone: tuple[str, ...]
    authority: Path
    is_new: bool


def provision(
    path: Path,
    out: Path,
    split_data: bool = False,
    insecure: bool = False,
    progress: Progress = silent,
    *,
    authority: Path | None = None,
    replace: Collection[str] = (),
    anew: bool = False,
) -> Provisioned:
    """Make the kits of a fleet; of one that was made here before, those that are new, and updates for those above them.

    Args:
        path: FLEET.toml.
        out: Where the kits go.
        split_data: Put a part of the job's data into each kit, exactly as the local engine shares it out.
        insecure: No TLS and no keys; at loopback addresses only.
        progress: Told how far the phase "data" is.
        authority: Where the fleet's authority is kept; by default in ``out``.
        replace: Devices that get new kits; their old keys are no good any more.
        anew: Make another fleet; all kits in ``out`` are replaced.

    Raises:
        ValueError: a bad fleet or job, data that cannot be read, something else in the folder, kits that are running;
            a fleet whose job or addresses have changed, or whose authority is not there.
        OSError: a file cannot be read, or the folder cannot be written.
    """
    plan = _plan(path, insecure)
    home = authority or out / "ca"
    record = None if anew or insecure else _record(out, home)
    if record is None and replace:
        raise ValueError(f"--replace {next(iter(replace))}: no fleet was made in {out} before")
    made = set(plan.names) if record is None else _to_make(plan, record, replace)
    if record is not None:
        _check_same(path, plan, record, replace, split_data and bool(made))
    _check_data(plan, split_data, made)
    for kit in out.glob(f"*/{KIT_FILE}"):
        if running(kit.parent) and kit.parent.name in (made if record else {kit.parent.name}):
            raise ValueError(f"{kit.parent} is running; stop it before its kit is replaced")
    if record is not None:
        with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as temporary:
            # What labels are and how inputs are made is as all others have it; no data is needed.
            making = Making(Path(temporary), plan, record.fleet, record.task, read_authority(home))
            members = write_kits(making, made)
            return _updated(out, home, plan, record, members, sorted(made, key=plan.names.index), Path(temporary))
    job = plan.job
    progress("data", 0, 1, job.data.source)
    samples, origin = load_source(job if split_data else _public(job, plan.sources[CLOUD]), progress)
    if samples.inputs.form is None:
        raise ValueError(f"data.source = {job.data.source!r} gives inputs that are ready: a kit needs images or texts")
    task = Task(labels=samples.label_names, form=samples.inputs.form, raw_bytes_per_sample=samples.raw_bytes_per_sample)
    names = {cluster: [d.device_id for d in members] for cluster, members in plan.devices.items()}
    split = share_out(samples, job.data, names, job.seed) if split_data else None
    progress("data", 1, 1, f"{len(samples):,} samples")
    for line in (*(samples.summary.lines if samples.summary else ()), *(split.notes if split else ())):
        progress("data", 0, 0, line)
    fleet = secrets.token_hex(8)
    with whole_folder(out, MARK) as folder:
        making = Making(folder, plan, fleet, task, make_authority(fleet, plan.days), split, origin)
        members = write_kits(making, made)
        if authority is None:
            write_authority(folder / "ca", making, record_of(making, members))
        (folder / MARK).write_text(f"{fleet}\n")
    if authority is not None:  # of the kits that were there before, until these are
        write_authority(authority, making, record_of(making, members))
    return Provisioned(out, fleet, tuple(out / name for name in plan.names), plan.days, (), (), home, is_new=True)


def _plan(path: Path, insecure: bool) -> FleetPlan:
    fleet, job = load_fleet_file(path)
    _check_addresses(fleet, insecure)
    ports = ports_of(fleet)
    job, devices = devices_of(fleet, job)
    _check_simulated(job)
    names, places = (CLOUD, *devices), (fleet.cloud, *fleet.edges)
    sources = {name: _source(path, place.data) for name, place in zip(names, places, strict=True)}
    for edge in fleet.edges:
        for device, entry in zip(devices[edge.name], edge.devices, strict=False):
            sources[device.device_id] = _source(path, entry.data)
    return FleetPlan(
        job=job,
        servers={n: _server(place, port) for n, place, port in zip(names, places, ports, strict=True)},
        devices=devices,
        sources=sources,
        privacy=KitPrivacy(lifetime_epsilon=fleet.privacy.lifetime_epsilon),
        days=fleet.certificates.days,
        insecure=insecure,
    )


# -- a fleet that was made before -------------------------------------------------------------------------------------


def _record(out: Path, home: Path) -> FleetRecord | None:
    """The fleet that was made in a folder, if one was.

    Raises:
        ValueError: its authority is not where it should be.
    """
    if not (out / MARK).exists():
        return None
    record = read_record(home)
    if record is None or not (home / "ca.key").exists():
        raise ValueError(
            f"a fleet was made in {out} before, but its authority is not in {home}: --authority says where it is. With "
            "--anew another fleet is made, and all kits have to be copied to their machines again"
        )
    return record


def _to_make(plan: FleetPlan, record: FleetRecord, replace: Collection[str]) -> set[str]:
    """Who needs a kit: who is new, or can do something else now, or is to be replaced."""
    known = {m.name: m for members in record.members.values() for m in members}
    if strangers := [name for name in replace if name not in known or name not in plan.names]:
        raise ValueError(f"--replace {strangers[0]}: the fleet has no device and no edge of this name")
    new = {name for name in plan.names if name not in known and name != CLOUD}
    upper = {m.name: edge for edge, members in record.members.items() for m in members}
    for edge, own in plan.devices.items():
        for device in own:
            before = known.get(device.device_id)
            if before and (before.device != able_of(device) or upper[device.device_id] != edge):
                new.add(device.device_id)
    return new | set(replace)


def _check_same(path: Path, plan: FleetPlan, record: FleetRecord, replace: Collection[str], split_data: bool) -> None:
    """Whether the participants that keep their kits can go on with them.

    Raises:
        ValueError: the job, or an address, is another one; or new kits would need parts of data that others have.
    """
    again = "with --anew all kits are made again, to be copied to all machines"
    if job_hash(plan.job) != record.job:
        raise ValueError(f"{path}: the job is not the one that the fleet's kits were made for; {again}")
    for name, server in record.servers.items():
        if name in plan.servers and plan.servers[name] != server and name not in replace:
            raise ValueError(
                f"{path}: {name} was at {server.address}:{server.port}, as those below have it in their kits; {again}"
            )
    if edges := [name for name in replace if name in plan.servers]:
        raise ValueError(f"--replace {edges[0]}: its devices would go on trusting the edge's old certificate; {again}")
    if split_data:
        raise ValueError(
            f"--split-data: the others have all parts of the job's data already. Name new data, or {again}"
        )


def _updated(
    out: Path,
    home: Path,
    plan: FleetPlan,
    record: FleetRecord,
    members: Mapping[str, KitMember],
    made: Collection[str],
    new: Path,
) -> Provisioned:
    """Put new kits in place, write updates for those above whose members are others now, and remember it."""
    known = {m.name: m for own in record.members.values() for m in own} | dict(members)
    below = {
        CLOUD: tuple(known[edge] for edge in plan.devices),
        **{edge: tuple(known[d.device_id] for d in own) for edge, own in plan.devices.items()},
    }
    for name in made:
        _set_aside(out, name)
        (new / name).rename(out / name)
    changed = [name for name in below if name not in made and below[name] != record.members.get(name)]
    gone = tuple(n for n in known if n not in plan.names)
    after = record
    if made or changed or gone:
        update = {"number": record.number + 1, "servers": dict(plan.servers), "members": below}
        after = record.model_copy(update=update)
    files = {name: out / name / UPDATE_FILE for name in changed}
    for name, file in files.items():
        write_update(file, read_authority(home), after, name)
    if after is not record:
        write_record(home, after)
    kits = tuple(out / name for name in made)
    return Provisioned(out, record.fleet, kits, record.days, tuple(files.values()), gone, home, is_new=False)


def _set_aside(out: Path, name: str) -> None:
    """Keep a kit that is replaced, with what its participant has left in it."""
    if not (out / name).exists():
        return
    aside = out / "replaced"
    aside.mkdir(mode=0o700, exist_ok=True)
    number = next(n for n in itertools.count(1) if not (aside / f"{name}.{n}").exists())
    (out / name).rename(aside / f"{name}.{number}")


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


def _server(place: Place, port: int) -> KitServer:
    everywhere = "::" if ":" in place.address else "0.0.0.0"
    listen = place.address if place.is_loopback else everywhere
    return KitServer(address=place.address, port=port, listen=listen)


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


def _check_data(plan: FleetPlan, split_data: bool, names: Collection[str]) -> None:
    """Raises ValueError where a kit that is to be made names data with --split-data, or names none without it."""
    keys = {CLOUD: "cloud.data"}
    for i, (edge, own) in enumerate(plan.devices.items()):
        keys[edge] = f"edges.{i}.data"
        keys |= {d.device_id: f"edges.{i}.devices.{j}.data" for j, d in enumerate(own)}
    for name, key in keys.items():
        if split_data and plan.sources.get(name):
            raise ValueError(f"{key} must be left out with --split-data, which gives each a part of the job's data")
        if name in names and not split_data and not plan.sources.get(name):
            raise ValueError(
                f"{key} must be given: the file or folder of its samples. For a trial on one machine, --split-data "
                "gives each a part of the job's data"
            )
