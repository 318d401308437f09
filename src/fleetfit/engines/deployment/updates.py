"""Who belongs to a fleet changes while it is at work: what the authority remembers, and updates of kits that it signs.

An update is one small file, ``update.json``, for the kit of a cloud or an edge: all of those below, and a number that
only grows. Put into the kit's folder it counts at once, also for a program that is at work with the kit.
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, ValidationError

from fleetfit.config.types import Section
from fleetfit.core.encoding import first_problem
from fleetfit.core.files import write_atomically
from fleetfit.core.records import Record
from fleetfit.engines.deployment.certificates import Authority, read_certificate, sign
from fleetfit.engines.deployment.kit_file import KitFile, KitMember, KitServer, Task

UPDATE_FILE, NUMBER_FILE = "update.json", "update.number"
RECORD_FILE = "fleet.json"
FORMAT = 1


class FleetRecord(Section):
    """fleet.json, beside the authority's key: the fleet as it was provisioned last."""

    format: int = FORMAT
    fleet: str
    number: int = Field(0, ge=0, description="of the last update")
    days: int
    job: str = Field(description="changes with all that participants must agree on about the job")
    task: Task
    servers: dict[str, KitServer] = Field(description="of the cloud and the edges")
    members: dict[str, tuple[KitMember, ...]] = Field(description="of the cloud and the edges: those below")


class _Content(Section):
    format: int
    fleet: str
    name: str
    number: int = Field(ge=1)
    members: tuple[KitMember, ...] = Field(min_length=1)


class _Signed(Record):
    content: str
    signature: str


def read_record(folder: Path) -> FleetRecord | None:
    """What an authority remembers; None: nothing.

    Raises:
        ValueError: the file is damaged, or of another format.
        OSError: it cannot be read.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        record = FleetRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path} is corrupt: {first_problem(error)}") from None
    if record.format != FORMAT:
        raise ValueError(f"{path} has format {record.format}, this fleetfit reads {FORMAT}")
    return record


def write_record(folder: Path, record: FleetRecord) -> None:
    """Remember a fleet as it is now."""
    write_atomically(folder / RECORD_FILE, record.model_dump_json(indent=1) + "\n")


def write_update(path: Path, authority: Authority, record: FleetRecord, name: str) -> None:
    """A signed update for the kit of a cloud or an edge.

    Args:
        path: The file.
        authority: Who signs.
        record: The fleet as it is now.
        name: Whose kit.
    """
    content = _Content(
        format=FORMAT, fleet=record.fleet, name=name, number=record.number, members=record.members[name]
    ).model_dump_json()
    signature = base64.b64encode(sign(authority.key, content.encode())).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"content": content, "signature": signature}) + "\n")


def with_update(folder: Path, file: KitFile) -> KitFile:
    """A kit's file with the update that lies in its folder, if one does.

    Raises:
        ValueError: it is damaged, not signed by the fleet's authority, of another fleet or participant, or older than
            one that counted before; says what to do.
    """
    path = folder / UPDATE_FILE
    if not path.exists():
        if seen := _seen(folder):
            raise ValueError(f"{path} is missing, and number {seen} has been in use: copy it again")
        return file
    wrong = f"{path} cannot be used, and the kit stays as it was:"
    if file.insecure:
        raise ValueError(f"{wrong} a fleet made with --insecure has no authority; provision again with --anew")
    try:
        signed = _Signed.model_validate_json(path.read_bytes())
        signature = base64.b64decode(signed.signature, validate=True)
        content = _Content.model_validate_json(signed.content)
    except ValueError as error:  # of pydantic too
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{wrong} it is damaged ({problem}); copy it again") from None
    key = read_certificate(folder / "ca.pem").public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey), "made by make_authority"
    if content.fleet != file.fleet:
        raise ValueError(f"{wrong} it is of fleet {content.fleet}, the kit is of {file.fleet}")
    try:
        key.verify(signature, signed.content.encode(), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise ValueError(f"{wrong} the fleet's authority has not signed it") from None
    if content.name != file.name:
        raise ValueError(f"{wrong} it is for {content.name}, this is the kit of {file.name}")
    if content.format != FORMAT:
        raise ValueError(f"{wrong} it has format {content.format}, this fleetfit reads {FORMAT}")
    if content.number < (seen := _seen(folder)):
        raise ValueError(f"{wrong} it is number {content.number}, and number {seen} has been in use; copy the newest")
    return file.model_copy(update={"members": content.members})


def remember_update(folder: Path) -> None:
    """From now on no older update than the one in this kit counts. Called by the program that holds the kit."""
    path = folder / UPDATE_FILE
    if path.exists():
        number = json.loads(json.loads(path.read_text())["content"])["number"]
        write_atomically(folder / "state" / NUMBER_FILE, f"{max(number, _seen(folder))}\n")


def _seen(folder: Path) -> int:
    path = folder / "state" / NUMBER_FILE
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0
    except ValueError:
        raise ValueError(f"{path} is corrupt: it must hold the number of an update") from None


def changes(before: Iterable[KitMember], after: Iterable[KitMember]) -> tuple[list[str], list[str], list[str]]:
    """Names that are new, that have another key or can do something else, and that are gone."""
    old, new = ({m.name: m for m in members} for members in (before, after))
    return (
        [name for name in new if name not in old],
        [name for name in new if name in old and new[name] != old[name]],
        [name for name in old if name not in new],
    )
