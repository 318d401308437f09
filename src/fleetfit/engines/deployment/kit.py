"""A kit: the folder of one participant, all that it needs to take part, and nothing of any other.

kit.toml     who it is, whom it knows, its data        ca.pem          what it trusts
job.toml     the resolved job                          server.pem|key  cloud and edges: for those below
task.json    the labels, and how inputs are made       node.key        edges and devices: for the one above
state/       what it keeps while it works: finished steps, memories, logs, Flower's own files
model/       a device's model, when it is finished
"""

import os
import re
import tomllib
from pathlib import Path
from typing import IO, Any, Literal

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from fleetfit.config.errors import explain
from fleetfit.config.job import Job, load_job
from fleetfit.config.types import Section
from fleetfit.core.encoding import first_problem
from fleetfit.core.files import content_hash, locked
from fleetfit.core.records import DeviceAttributes, Record
from fleetfit.data.participant import Cut
from fleetfit.data.preprocessing import Form
from fleetfit.engines.deployment.fleet_file import Name, Port

KIT_FORMAT = 1
KIT_FILE = "kit.toml"
Role = Literal["cloud", "edge", "device"]
RUN_ID = re.compile(r"[0-9a-f]{16}")


class KitData(Section):
    """This participant's samples."""

    source: str = Field(min_length=1, description="a file or folder; relative to this folder")
    cut: Cut = Field(description="given: it has splits train, validation and test; own: cut by the job's shares")


class KitServer(Section):
    """Where those below connect."""

    address: str = Field(description="as they reach it; the certificate is made out to it")
    port: Port
    listen: str = Field(description="the address of this machine to listen at; 0.0.0.0: all")


class KitUpstream(Section):
    """The one above."""

    name: Name
    address: str
    port: Port

    @property
    def host_port(self) -> str:
        """As in a URL."""
        return f"{bracketed(self.address)}:{self.port}"


class KitDevice(Section):
    """What a device can do, as it tells its edge."""

    storage_limit_bytes: int = Field(gt=0)
    energy: dict[str, float]


class KitPrivacy(Section):
    """What this device promises itself, of a job with [privacy]."""

    lifetime_epsilon: float | None = Field(
        None, gt=0, description="the most that all its runs together may promise; default: what one run does"
    )


class KitMember(Section):
    """One of those below, and the key that it must prove to have."""

    name: Name
    public_key: str
    device: KitDevice | None = Field(
        None, description="what it can do, if it is a device: this counts, not what it says"
    )


class KitFile(Section):
    """kit.toml."""

    format: int
    fleet: str = Field(pattern=r"^[0-9a-f]{16}$", description="drawn anew for each fleet")
    name: Name
    role: Role
    fleetfit: str = Field(description="the version that made it")
    insecure: bool = False
    data: KitData
    server: KitServer | None = None
    upstream: KitUpstream | None = None
    device: KitDevice | None = None
    privacy: KitPrivacy = KitPrivacy()
    members: tuple[KitMember, ...] = ()

    @model_validator(mode="after")
    def _what_its_role_needs(self) -> "KitFile":
        needs = {"cloud": {"server"}, "edge": {"server", "upstream"}, "device": {"upstream", "device"}}[self.role]
        for key in ("server", "upstream", "device"):
            if (getattr(self, key) is not None) != (key in needs):
                raise ValueError(f"{key} must {'be given' if key in needs else 'be left out'} with role {self.role!r}")
        if (self.role != "device") != bool(self.members):
            raise ValueError(f"members must {'be given' if self.role != 'device' else 'be left out'}")
        return self


class Task(Record):
    """task.json: what all participants must agree on about samples."""

    labels: tuple[str, ...] = Field(min_length=2)
    form: Form
    raw_bytes_per_sample: int = Field(ge=0)


class Kit:
    """A kit as it was read.

    Attributes:
        folder: Where it is.
        file: kit.toml.
        job: job.toml.
        task: task.json.
    """

    def __init__(self, folder: Path, file: KitFile, job: Job, task: Task) -> None:
        self.folder = folder
        self.file = file
        self.job = job
        self.task = task

    @property
    def ca(self) -> Path:
        """What it trusts."""
        return self.folder / "ca.pem"

    @property
    def server_certificate(self) -> Path:
        """For those below."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """Of the server's certificate."""
        return self.folder / "server.key"

    @property
    def node_key(self) -> Path:
        """What it proves to the one above."""
        return self.folder / "node.key"

    @property
    def state(self) -> Path:
        """What it keeps while it works."""
        return self.folder / "state"

    @property
    def server(self) -> KitServer:
        """Where those below connect; of a cloud or an edge."""
        assert self.file.server is not None, "checked with the role"
        return self.file.server

    @property
    def upstream(self) -> KitUpstream:
        """The one above; of an edge or a device."""
        assert self.file.upstream is not None, "checked with the role"
        return self.file.upstream

    @property
    def data_source(self) -> str:
        """The data, from wherever the command was given."""
        inside = self.folder / Path(self.file.data.source).expanduser()
        return str(inside) if inside.exists() else self.file.data.source

    @property
    def job_hash(self) -> str:
        """Changes with all that participants must agree on about the job."""
        return job_hash(self.job)

    def without_path(self, error: Exception) -> str:
        """What another machine may hear of an error here: no file of this one by its place."""
        return (
            str(error).replace(str(self.folder), "the kit") if isinstance(error, ValueError) else type(error).__name__
        )

    def attributes(self, num_samples: int) -> DeviceAttributes:
        """What a device tells its edge."""
        assert self.file.device is not None, "checked with the role"
        return _attributes(self.file.name, self.file.device, num_samples)

    @property
    def lifetime_file(self) -> Path:
        """What a device with [privacy] has promised in all runs."""
        return self.state / "privacy.json"

    @property
    def known_devices(self) -> dict[str, DeviceAttributes]:
        """What an edge's devices can do, as far as its kit says."""
        return {m.name: _attributes(m.name, m.device, 0) for m in self.file.members if m.device is not None}

    def of_run(self, run: str) -> Path:
        """What it keeps of one run; of all others but the one before, it keeps nothing.

        Args:
            run: The run's id, which came with a message.

        Raises:
            ValueError: it is no id.
        """
        if not RUN_ID.fullmatch(run):
            raise ValueError(f"a run's id must be 16 hexadecimal digits, got {run[:40]!r}")
        return self.state / "runs" / run


def _attributes(name: str, device: KitDevice, num_samples: int) -> DeviceAttributes:
    return DeviceAttributes.model_validate({"device_id": name, "num_samples": num_samples} | device.model_dump())


def job_hash(job: Job) -> str:
    """Changes with all that participants must agree on about a job."""
    return content_hash(job_fields(job))


def job_fields(job: Job) -> dict[str, Any]:
    """What participants must agree on about a job; how and where it runs, and from what data, may differ."""
    fields = job.model_dump(exclude={"run", "links", "fleet"})
    return fields | {"data": job.data.model_dump(exclude={"source", "root"})}


def read_kit(folder: str | Path, *roles: Role) -> Kit:
    """Read a kit.

    Args:
        folder: Where it is.
        roles: Which would do; none: any.

    Raises:
        ValueError: no kit, a damaged one, one of another format or for another role; names the file and what to do.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    path = folder / KIT_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no kit: {path} is missing; `fleetfit provision` makes kits")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    if fields.get("format") != KIT_FORMAT:
        raise ValueError(f"{path} has format {fields.get('format')}, this fleetfit reads {KIT_FORMAT}; provision again")
    try:
        file = KitFile.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{path}:\n{explain(error, KitFile)}") from None
    if roles and file.role not in roles:
        raise ValueError(f"{folder} is the kit of {_a(file.role)}; the kit of {' or '.join(map(_a, roles))} is needed")
    kit = Kit(folder, file, load_job(folder / "job.toml"), _read_task(folder / "task.json"))
    needed = [] if file.insecure else [kit.ca]
    needed += [kit.server_certificate, kit.server_key] if file.server is not None and not file.insecure else []
    needed += [kit.node_key] if file.upstream is not None else []
    for needed_path in needed:
        if not needed_path.is_file():
            raise ValueError(f"{needed_path} is missing: the kit is not complete; copy it again, or provision again")
    return kit


def _read_task(path: Path) -> Task:
    try:
        return TypeAdapter(Task).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the kit is not complete; copy it again, or provision again") from None
    except ValidationError as error:
        raise ValueError(f"{path} is corrupt: {first_problem(error)}") from None


def _a(role: Role) -> str:
    return f"{'an' if role == 'edge' else 'a'} {role}"


def kit_toml(file: KitFile) -> str:
    """kit.toml for a person: what each part is for, and what may be changed."""
    fields: dict[str, Any] = file.model_dump(exclude_none=True, mode="json")
    if not fields["privacy"]:
        del fields["privacy"]
    if not fields["members"]:
        del fields["members"]
    heads = {
        "[data]": "# May be changed: where this participant's samples are. They are read here and never sent.",
        "[server]": "# Where those below connect; they have the same address in their kits.",
        "[upstream]": "# The one above.",
        "[device]": "# What this device tells its edge about itself.",
        "[privacy]": "# May be changed. The most that all runs of this device together promise.",
    }
    lines = [f"# The kit of {file.name}, {_a(file.role)}. Start it with: fleetfit start <this folder>"]
    for line in tomli_w.dumps(fields).splitlines():
        if line in heads:
            lines.append(heads[line])
        lines.append(line)
    return "\n".join(lines) + "\n"


def hold(folder: Path) -> IO[bytes]:
    """Take a kit for this process, until the file is closed or the process ends.

    Raises:
        ValueError: another process has it.
    """
    state = folder / "state"
    state.mkdir(mode=0o700, exist_ok=True)
    try:
        return locked(state / ".lock")
    except ValueError:
        raise ValueError(f"{folder} is started already, by another process of this machine") from None


def running(folder: Path) -> bool:
    """Whether a process of this machine has a kit."""
    if not (folder / "state" / ".lock").exists():
        return False
    try:
        hold(folder).close()
    except ValueError:
        return True
    return False


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def bracketed(address: str) -> str:
    """An address as it stands before a port."""
    return f"[{address}]" if ":" in address else address
