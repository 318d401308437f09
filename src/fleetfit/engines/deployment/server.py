"""The server of a cloud or an edge: Flower's SuperLink on this machine, the door before it, and who may come in."""

import logging
import secrets
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import httpx
from pydantic import ValidationError

from fleetfit.core.files import write_atomically
from fleetfit.core.records import Record
from fleetfit.engines.deployment.certificates import client_context, public_pem, read_certificate
from fleetfit.engines.deployment.flower_api import Api, RunCarrier, check_version, register, unregister
from fleetfit.engines.deployment.handshake import Status
from fleetfit.engines.deployment.kit import Kit, running, write_secret
from fleetfit.engines.deployment.proxy import Gate, Tell, listen
from fleetfit.engines.deployment.subprocesses import Daemon
from fleetfit.engines.deployment.updates import UPDATE_FILE, changes, remember_update, with_update

log = logging.getLogger(__name__)

START_SECONDS = 90.0
LOOK_SECONDS = 1.0
STARTS = 5  # each at another port inside
TAKEN = "address already in use"
SOON = timedelta(days=14)


class HubMember(Record):
    """One of those below, as the hub knows it now."""

    node: int
    is_there: bool
    address: str = ""
    status: Status | None = None


class HubFile(Record):
    """state/hub.json: what a running hub tells other programs of its machine."""

    inside: str
    members: dict[str, HubMember]


class Server(Protocol):
    """A hub, or a way to one that runs in another process."""

    def members(self) -> dict[str, HubMember]:
        """Those below, in the order of the kit."""

    def carrier(self, run: str) -> RunCarrier:
        """What carries the messages of one run."""


class Hub:
    """A server while it runs.

    Args:
        kit: The cloud's or the edge's.
        tell: Told in words who comes, goes, and is not let in.

    Raises:
        ValueError: the port is taken, a certificate that is expired or does not belong here, Flower does not start.
    """

    def __init__(self, kit: Kit, tell: Tell) -> None:
        check_version()
        check_certificate(kit, tell)
        self.kit = kit
        secret = secrets.token_bytes(32)
        secret_file = kit.state / "secret"
        secret_file.unlink(missing_ok=True)
        write_secret(secret_file, secret)
        remember_update(kit.folder)
        self._nodes: dict[str, int] = {}
        self._registered: dict[str, str] = {}  # keys that Flower's program knows, by name
        self._tell = tell
        self._updated_at = _changed_at(kit)
        self._stop = threading.Event()
        door = listen(kit)
        try:
            self._start(secret, secret_file)
        except BaseException:
            door.close()
            raise
        try:
            self._register()
            self.gate = Gate(kit, self._inside, door, self._nodes, tell, secret)
        except BaseException:
            self._superlink.stop()
            door.close()
            raise
        self._watch = threading.Thread(target=self._look, name="hub", daemon=True)
        self._watch.start()

    def members(self) -> dict[str, HubMember]:
        """Those below, in the order of the kit."""
        present = self.gate.present
        found = {}
        for member in self.kit.file.members:
            here = present.get(member.name)
            connected = here.node if here else 0
            found[member.name] = HubMember(
                node=self._nodes.get(member.name, connected),
                is_there=connected != 0,
                address=here.address if here else "",
                status=here.status if here else None,
            )
        return found

    def carrier(self, run: str) -> RunCarrier:
        """What carries the messages of one run."""
        return RunCarrier(self._api, run)

    def check(self) -> None:
        """Raises ValueError if Flower's program has ended by itself."""
        if not self._superlink.is_running:
            raise ValueError(
                f"Flower's SuperLink has ended by itself; {self._superlink.log_file} has all it said, the last being\n"
                f"{self._superlink.words()}"
            )

    def close(self) -> None:
        """Stop everything."""
        self._stop.set()
        self._watch.join()
        self.gate.close()
        self._superlink.stop()
        (self.kit.state / "hub.json").unlink(missing_ok=True)

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, secret: bytes, secret_file: Path) -> None:
        """Start Flower's program at a port inside that is free, and at another if somebody takes it just then."""
        for left in reversed(range(STARTS)):
            self._inside = f"127.0.0.1:{free_port()}"
            self._api = Api(self._inside, secret, None if self.kit.file.insecure else self.kit.ca)
            self._superlink = Daemon("flower-superlink", self._arguments(secret_file), self.kit.state)
            try:
                self._wait()
                return
            except BaseException as error:
                self._superlink.stop()
                if not (left and isinstance(error, ValueError) and TAKEN in self._superlink.words()):
                    raise

    def _arguments(self, secret_file: Path) -> list[str]:
        kit = self.kit
        host, _, port = self._inside.partition(":")
        keys = ["--insecure"]
        if not kit.file.insecure:
            keys = ["--ssl-ca-certfile", str(kit.ca), "--ssl-certfile", str(kit.server_certificate)]
            keys += ["--ssl-keyfile", str(kit.server_key), "--enable-supernode-auth"]
        isolation = ["--isolation", "process", "--superexec-auth-secret-file", str(secret_file)]
        return ["--host", host, "--port", port, *keys, *isolation, "--disable-runtime-dependency-installation"]

    def _wait(self) -> None:
        """Until Flower's program answers."""
        insecure = self.kit.file.insecure
        verify: ssl.SSLContext | bool = False if insecure else client_context(self.kit.ca)
        ends = time.monotonic() + START_SECONDS
        with httpx.Client(verify=verify) as client:
            while True:
                self.check()
                try:
                    client.get(f"{'http' if insecure else 'https'}://{self._inside}/health")
                    return
                except httpx.TransportError as error:
                    if time.monotonic() > ends:
                        raise ValueError(
                            f"Flower's SuperLink did not start in {START_SECONDS:.0f} seconds ({error}); "
                            f"{self._superlink.log_file} has what it said"
                        ) from None
                time.sleep(0.1)

    def update(self) -> None:
        """Take in an update of the kit, if one has come: those who are new may come in, those who are gone no more.

        What is wrong with one is told once; then everything stays as it is.
        """
        if (changed_at := _changed_at(self.kit)) == self._updated_at:
            self._register()
            return
        self._updated_at = changed_at
        before = self.kit.file.members
        try:
            self.kit.file = with_update(self.kit.folder, self.kit.file)
        except ValueError as error:
            self._tell(str(error))
            return
        new, changed, gone = changes(before, self.kit.file.members)
        self.gate.know_members(gone=(*changed, *gone))
        remember_update(self.kit.folder)
        self._register()
        said = ((new, "may come in"), (changed, "changed"), (gone, "may not come in any more"))
        words = [f"{', '.join(names)} {what}" for names, what in said if names]
        self._tell(f"the kit was updated: {'; '.join(words) or 'nothing is different'}")

    def _register(self) -> None:
        """Tell Flower's program of the members' keys, where it does not know them, and of those that are gone."""
        if self.kit.file.insecure:
            return
        keys = {m.name: m.public_key for m in self.kit.file.members}
        for name in [name for name, key in self._registered.items() if keys.get(name) != key]:
            unregister(self._api, [self._nodes[name]])
            del self._registered[name], self._nodes[name]
        fresh = {name: key for name, key in keys.items() if name not in self._registered}
        if fresh:
            self._nodes |= register(self._api, {name: public_pem(key) for name, key in fresh.items()})
            self._registered |= fresh

    def _look(self) -> None:
        """Every second or so: who is there, for other programs of this machine too."""
        path, before, failed = self.kit.state / "hub.json", "", ""
        while not self._stop.wait(LOOK_SECONDS):
            try:
                self.gate.look()
                self.update()
                now = HubFile(inside=self._inside, members=self.members()).model_dump_json()
                if now != before:
                    write_atomically(path, now)
                    before = now
                failed = ""
            except (OSError, httpx.HTTPError) as error:  # no descriptor, no room on the disk: later there may be
                if str(error) != failed:
                    log.warning("this program's state cannot be written, or Flower's is not there: %s", error)
                failed = str(error)


def _changed_at(kit: Kit) -> tuple[int, int]:
    """Tells one update file of a kit from the next."""
    try:
        found = (kit.folder / UPDATE_FILE).stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


class Attached:
    """The way to a hub that another process of this machine runs.

    Args:
        kit: The hub's.
    """

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self._path = kit.state / "hub.json"

    def members(self) -> dict[str, HubMember]:
        """Those below, in the order of the kit.

        Raises:
            ValueError: the hub is gone.
        """
        return self._read().members

    def carrier(self, run: str) -> RunCarrier:
        """What carries the messages of one run."""
        secret = (self.kit.state / "secret").read_bytes()
        return RunCarrier(Api(self._read().inside, secret, None if self.kit.file.insecure else self.kit.ca), run)

    def _read(self) -> HubFile:
        ends = time.monotonic() + START_SECONDS
        while running(self.kit.folder):
            try:
                return HubFile.model_validate_json(self._path.read_bytes())
            except FileNotFoundError:
                if time.monotonic() > ends:
                    raise ValueError(f"{self.kit.folder} is started, but its server does not come up") from None
            except ValidationError as error:
                raise ValueError(f"{self._path} is corrupt: {error}") from None
            time.sleep(0.2)
        raise ValueError(f"`fleetfit start {self.kit.folder}` has ended")


def check_certificate(kit: Kit, tell: Tell) -> None:
    """Tell of a certificate that ends soon.

    Raises:
        ValueError: the server's certificate has expired, or is not of this kit.
    """
    if kit.file.insecure:
        tell(
            "INSECURE: this fleet was made with --insecure. Nothing is encrypted, and anyone on this machine can join."
        )
        return
    own, ca = read_certificate(kit.server_certificate), read_certificate(kit.ca)
    try:
        own.verify_directly_issued_by(ca)
    except Exception as error:  # of cryptography: wrong issuer, wrong type, wrong signature
        raise ValueError(
            f"{kit.server_certificate} is not signed by the authority in {kit.ca}: files of two kits are mixed; copy "
            "the kit again"
        ) from error
    now, ends = datetime.now(UTC), own.not_valid_after_utc
    if ends < now:
        raise ValueError(
            f"the certificate {kit.server_certificate} has expired on {ends:%Y-%m-%d}: provision again "
            "with --anew, and copy the new kits to all"
        )
    if (begins := own.not_valid_before_utc) > now:
        raise ValueError(
            f"the certificate {kit.server_certificate} is valid from {begins:%Y-%m-%d %H:%M} UTC on: is the clock of "
            "this machine right?"
        )
    if ends < now + SOON:
        tell(f"the certificate of this kit expires on {ends:%Y-%m-%d}: provision again with --anew before")


def check_authority(kit: Kit) -> None:
    """Whether a member's kit is still good. The one above, whose certificate ends no later, may not even start.

    Raises:
        ValueError: the fleet's authority has expired; says what to do.
    """
    if kit.file.insecure:
        return
    ends = read_certificate(kit.ca).not_valid_after_utc
    if ends < datetime.now(UTC):
        raise ValueError(
            f"this kit has expired on {ends:%Y-%m-%d} ({kit.ca}): provision again with --anew, and "
            "copy the new kits to all"
        )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
    return port
