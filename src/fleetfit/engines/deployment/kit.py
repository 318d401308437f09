"""A kit: the folder of one participant, all that it needs to take part, and nothing of any other.

kit.toml     who it is, whom it knows, its data        ca.pem          what it trusts
job.toml     the resolved job                          server.pem|key  cloud and edges: for those below
task.json    the labels, and how inputs are made       node.key        edges and devices: for the one above
update.json  cloud and edges: who belongs to those below now, if that has changed
state/       what it keeps while it works: finished steps, memories, logs, Flower's own files
model/       a device's model, when it is finished
"""

import os
import re
import tomllib
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError

from fleetfit.config.errors import explain
from fleetfit.config.job import Job, load_job
from fleetfit.core.encoding import first_problem
from fleetfit.core.files import content_hash, locked
from fleetfit.core.records import DeviceAttributes
from fleetfit.engines.deployment.kit_file import (
    KIT_FILE,
    KIT_FORMAT,
    KitDevice,
    KitFile,
    KitServer,
    KitUpstream,
    Role,
    Task,
    a_role,
)
from fleetfit.engines.deployment.updates import with_update

NOT_WHOLE = "the kit is not complete; copy it again, or make another with `fleetfit provision ... --replace`"
RUN_ID = re.compile(r"[0-9a-f]{16}")


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
        raise ValueError(
            f"{path} has format {fields.get('format')}, this fleetfit reads {KIT_FORMAT}; provision again with --anew"
        )
    try:
        file = KitFile.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{path}:\n{explain(error, KitFile)}") from None
    if roles and file.role not in roles:
        raise ValueError(
            f"{folder} is the kit of {a_role(file.role)}; the kit of {' or '.join(map(a_role, roles))} is needed"
        )
    kit = Kit(folder, file, load_job(folder / "job.toml"), _read_task(folder / "task.json"))
    needed = [] if file.insecure else [kit.ca]
    needed += [kit.server_certificate, kit.server_key] if file.server is not None and not file.insecure else []
    needed += [kit.node_key] if file.upstream is not None else []
    for needed_path in needed:
        if not needed_path.is_file():
            raise ValueError(f"{needed_path} is missing: {NOT_WHOLE}")
    kit.file = with_update(folder, file)
    return kit


def _read_task(path: Path) -> Task:
    try:
        return TypeAdapter(Task).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {NOT_WHOLE}") from None
    except ValidationError as error:
        raise ValueError(f"{path} is corrupt: {first_problem(error)}") from None


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
