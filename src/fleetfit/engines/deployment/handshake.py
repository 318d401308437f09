"""What a member says to the one above, before Flower speaks and every few seconds after: who it is, and how far.

A greeting is signed with the member's key. It is where mistakes are told: a kit of another fleet, a wrong key, another
version or job, a name that is taken, a clock that is off. Flower itself would try again in silence.
"""

import base64
import http.client
import json
import socket
import ssl
import threading
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, ValidationError

from fleetfit.core.encoding import FORMAT_VERSION, MAX_REASON, first_problem, printable
from fleetfit.core.files import own_version
from fleetfit.core.records import Record
from fleetfit.engines.deployment.certificates import client_context, is_signed, sign
from fleetfit.engines.deployment.fleet_file import Name
from fleetfit.engines.deployment.kit import Kit
from fleetfit.engines.deployment.kit_file import KitUpstream, Role

PATH = "/fleetfit/greeting"
SIGNATURE = "fleetfit-signature"
MAX_BYTES = 16 * 2**10
EVERY_SECONDS = 3.0
GONE_SECONDS = 10.0  # without a greeting; then another may take the name
CLOCK_SECONDS = 240.0  # Flower refuses signatures that are older than 300
TIMEOUT_SECONDS = 10.0


class Status(Record):
    """How far a member is."""

    phase: str = Field(max_length=64)
    done: int = Field(ge=0)
    total: int = Field(ge=1)
    note: str = Field("", max_length=200)


class Greeting(Record):
    """Member to the one above."""

    fleet: str = Field(pattern=r"^[0-9a-f]{16}$")
    name: Name
    role: Role
    fleetfit: str = Field(max_length=40)
    messages: int = Field(description="format version")
    job: str = Field(max_length=64)
    instance: str = Field(max_length=64, description="drawn when the program started")
    seconds: float = Field(description="the member's clock, since 1970")
    node: int = Field(0, description="its number in Flower, once it knows it; believed only without TLS")
    status: Status | None = None
    problem: str = Field("", max_length=MAX_REASON, description="why it cannot take part, for the other's log")
    leaves: bool = False


class Welcome(Record):
    """The answer: whether the member may take part, and if not, why."""

    instance: str = Field("", max_length=64, description="drawn when the one above started; a new one knows nobody")
    problem: str = Field("", max_length=1000)
    taken: bool = Field(False, description="the name is in use; that may be over in some seconds")
    node: int = Field(0, description="the member's number in Flower; 0 without TLS, where it gets one each time")


class Refused(ValueError):
    """The one above does not let this member take part, or cannot be trusted; waiting does not help."""


class Distrusted(Refused):
    """Who answers there cannot show that it is the one above: anybody on the way may do that, at any time."""


class NotThere(OSError):
    """The one above does not answer; it may be started later."""


class Greeter:
    """Says a member's greetings, over one connection while it holds: most bytes of a new one are TLS's handshake.

    Args:
        kit: The member's.
        key: Its private key.
        instance: Drawn when the program started.
    """

    def __init__(self, kit: Kit, key: ec.EllipticCurvePrivateKey, instance: str) -> None:
        self.kit = kit
        self.key = key
        self.instance = instance
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()  # greetings come from several threads

    def greet(self, status: Status | None = None, problem: str = "", node: int = 0, leaves: bool = False) -> Welcome:
        """Say it, and hear the answer.

        Raises:
            Refused: a certificate that cannot be trusted, or something else answers there.
            NotThere: nobody answers.
        """
        with self._lock:
            return self._greet(status, problem, node, leaves)

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            self._hang_up()

    def _greet(self, status: Status | None, problem: str, node: int, leaves: bool) -> Welcome:
        file = self.kit.file
        greeting = Greeting(
            fleet=file.fleet,
            name=file.name,
            role=file.role,
            fleetfit=own_version(),
            messages=FORMAT_VERSION,
            job=self.kit.job_hash,
            instance=self.instance,
            seconds=time.time(),
            status=status,
            problem=problem[:MAX_REASON],
            node=node,
            leaves=leaves,
        )
        body = greeting.model_dump_json().encode()
        if self._connection is not None:
            try:
                return self._said(self._connection, body)
            except (OSError, http.client.HTTPException):  # it was closed meanwhile, which says nothing
                self._hang_up()
        context = None if file.insecure else client_context(self.kit.ca)
        try:
            return self._post(body, context)
        except ssl.SSLCertVerificationError as error:
            why = distrust(self.kit.upstream, self.kit.ca, error)
            self._tell_the_other_side(greeting, why)
            raise Distrusted(why) from None

    def _post(self, body: bytes, context: ssl.SSLContext | None) -> Welcome:
        """Over a new connection, which is kept if all goes well."""
        above = self.kit.upstream
        said = f"{above.name} at {above.host_port}"
        self._connection = (
            http.client.HTTPConnection(above.address, above.port, timeout=TIMEOUT_SECONDS)
            if context is None
            else http.client.HTTPSConnection(above.address, above.port, timeout=TIMEOUT_SECONDS, context=context)
        )
        try:
            return self._said(self._connection, body)
        except ssl.SSLCertVerificationError:
            raise
        except ssl.SSLEOFError:  # a full door ends connections at any time
            raise NotThere(f"{said} broke off while keys were exchanged") from None
        except ssl.SSLError as error:
            raise Distrusted(
                f"{said} speaks no TLS, or not ours: {error.reason or error}. Is another program at this port, or was "
                "its kit made with --insecure and this one not?"
            ) from None
        except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as error:
            if context is None:
                raise Distrusted(
                    f"{said} does not answer in HTTP: {error or type(error).__name__}. This kit was made with "
                    "--insecure; was the other one not?"
                ) from None
            raise NotThere(f"{said} broke off: {error or type(error).__name__}") from None
        except (OSError, socket.gaierror) as error:
            raise NotThere(f"{said} does not answer: {error.strerror or error}") from None

    def _said(self, connection: http.client.HTTPConnection, body: bytes) -> Welcome:
        """One greeting and its answer over this connection, which is closed unless it can take another."""
        above = self.kit.upstream
        said = f"{above.name} at {above.host_port}"
        signature = base64.b64encode(sign(self.key, body)).decode()
        lasts = False
        try:
            connection.request("POST", PATH, body, {"content-type": "application/json", SIGNATURE: signature})
            response = connection.getresponse()
            content = response.read(MAX_BYTES)
            lasts = response.isclosed() and response.status == 200  # isclosed: read to its end
        finally:
            if not lasts:
                self._hang_up()
        if response.status != 200:
            raise Refused(
                f"{said} is no fleetfit cloud or edge, or has another version of it: it answers with HTTP status "
                f"{response.status}"
            )
        try:
            return Welcome.model_validate_json(content)
        except ValidationError:
            raise Refused(
                f"{said} is no fleetfit cloud or edge, or has another version of it: its answer cannot be read"
            ) from None

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _tell_the_other_side(self, greeting: Greeting, why: str) -> None:
        """Its log should say who did not trust it. Nothing of the answer is believed."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        body = greeting.model_copy(update={"problem": why[:MAX_REASON]}).model_dump_json().encode()
        try:
            self._post(body, context)
        except (OSError, ValueError):
            return
        finally:
            self._hang_up()


def distrust(above: KitUpstream, ca: Path, error: ssl.SSLCertVerificationError) -> str:
    """Why a server's certificate is not believed, and what to do."""
    said = f"{above.name} at {above.host_port}"
    again = "provision again with --anew, and copy the new kits to all"
    if error.verify_code == 10:
        return f"the certificate of {said} has expired: {again}"
    if error.verify_code == 9:
        return f"the certificate of {said} is not valid yet: are the clocks of both machines right?"
    if error.verify_code in (62, 64):
        return (
            f"the certificate of {said} is made out to another address ({error.verify_message}): put its address into "
            f"FLEET.toml and {again}"
        )
    return (
        f"the certificate of {said} is not signed by the authority of this kit ({ca}): is it the cloud or edge of "
        f"another fleet, or were the kits made at different times? If so, {again}"
    )


def read_greeting(body: bytes) -> Greeting:
    """A greeting as it came.

    Raises:
        ValueError: it is none.
    """
    try:
        return Greeting.model_validate_json(body)
    except ValidationError as error:
        raise ValueError(f"the greeting cannot be read: {first_problem(error)}") from None


def other_version(kit: Kit, body: bytes) -> str:
    """What a greeting that cannot be read says of its version, if it is another than ours; else empty."""
    try:
        fields = json.loads(body)
        name, theirs = str(fields["name"])[:64], str(fields["fleetfit"])[:40]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    if theirs == own_version():
        return ""
    return printable(
        f"{name!r} has fleetfit {theirs}, {kit.file.name} has {own_version()}: install the same version on both"
    )


def objection(kit: Kit, greeting: Greeting, body: bytes, signature: str) -> str:
    """Why a member may not take part; empty if it may.

    Args:
        kit: Of the one above.
        greeting: What was said.
        body: The same as it came.
        signature: What came with it.
    """
    file, name = kit.file, greeting.name
    if greeting.fleet != file.fleet:
        return (
            f"{name!r} has a kit from another fleet ({greeting.fleet}); {file.name} is of fleet {file.fleet}. Kits go "
            "together that were made together: copy the kit again from where this fleet was provisioned"
        )
    keys = {member.name: member.public_key for member in file.members}
    below: Role = "edge" if file.role == "cloud" else "device"
    if name not in keys or greeting.role != below:
        return (
            f"{name!r} is not among the {below}s of {file.name}: is upstream in its kit.toml right? To add it, put it "
            "into FLEET.toml and provision again"
        )
    try:
        signed = is_signed(keys[name], base64.b64decode(signature), body)
    except ValueError:
        signed = False
    if not signed:
        return (
            f"{name!r} does not have the key that {file.name} was given for it: was node.key changed, or taken from "
            "another kit? Copy the kit again from where this fleet was provisioned"
        )
    versions = (greeting.fleetfit, greeting.messages), (own_version(), FORMAT_VERSION)
    if versions[0] != versions[1]:
        theirs, ours = (f"{version} (messages {number})" for version, number in versions)
        return f"{name!r} has fleetfit {theirs}, {file.name} has {ours}: install the same version on both"
    if greeting.job != kit.job_hash:
        return (
            f"{name!r} has another job than {file.name}: job.toml was changed in one of the two kits. Provision again "
            "with --anew, or copy it; only its [run] may differ"
        )
    late = time.time() - greeting.seconds
    if abs(late) > CLOCK_SECONDS:
        return (
            f"the clock of {name!r} is {abs(late):.0f} seconds {'behind' if late > 0 else 'ahead of'} that of "
            f"{file.name}: set both right, signatures are good for some minutes only"
        )
    return ""
