"""kit.toml: who a participant is, whom it knows, and where its data is; task.json: what all say of samples."""

from typing import Any, Literal

import tomli_w
from pydantic import Field, model_validator

from fleetfit.config.types import Section
from fleetfit.core.records import Record
from fleetfit.data.participant import Cut
from fleetfit.data.preprocessing import Form
from fleetfit.engines.deployment.fleet_file import Name, Port

KIT_FORMAT = 1
KIT_FILE = "kit.toml"
Role = Literal["cloud", "edge", "device"]


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


def a_role(role: Role) -> str:
    """A role with its article."""
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
    lines = [f"# The kit of {file.name}, {a_role(file.role)}. Start it with: fleetfit start <this folder>"]
    for line in tomli_w.dumps(fields).splitlines():
        if line in heads:
            lines.append(heads[line])
        lines.append(line)
    return "\n".join(lines) + "\n"


def bracketed(address: str) -> str:
    """An address as it stands before a port."""
    return f"[{address}]" if ":" in address else address
