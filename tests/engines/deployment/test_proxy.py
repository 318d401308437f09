"""The door: whom it lets in, what it tells of those it does not, on both sides, and what it passes on to Flower."""

import base64
import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata
from flwr.proto.node_pb2 import Node
from ports import reserved_port

from fleetfit.core.encoding import Declined
from fleetfit.core.records import ValidationScores
from fleetfit.device.messages import RoundReply
from fleetfit.edge.messages import decode_any
from fleetfit.engines.deployment import client as member_module
from fleetfit.engines.deployment import proxy as gate_module
from fleetfit.engines.deployment.certificates import (
    Authority,
    client_context,
    make_authority,
    make_member_key,
    make_server,
    public_line,
    public_pem,
    read_member_key,
    sign,
)
from fleetfit.engines.deployment.client import Member
from fleetfit.engines.deployment.handshake import (
    Distrusted,
    Greeter,
    Greeting,
    NotThere,
    Refused,
    Status,
    Welcome,
    objection,
)
from fleetfit.engines.deployment.kit import Kit, read_kit
from fleetfit.engines.deployment.kit_file import kit_toml
from fleetfit.engines.deployment.provision import provision
from fleetfit.engines.deployment.proxy import MAX_CALL_BYTES, Gate, listen
from fleetfit.engines.deployment.server import check_certificate
from fleetfit.engines.deployment.start import start

NO_SCORES = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)


def with_port(kits: Path, upper: str, *lower: str) -> Kit:
    """The kit of a server, and those of its members, with a port of its own."""
    port = reserved_port()
    for name in (upper, *lower):
        kit = read_kit(kits / name)
        part = "server" if name == upper else "upstream"
        changed = getattr(kit.file, part).model_copy(update={"port": port})
        (kits / name / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={part: changed})))
    return read_kit(kits / upper)


@contextmanager
def opened(kit: Kit, inside: str = "127.0.0.1:1") -> Iterator[tuple[Gate, list[str]]]:
    told: list[str] = []
    gate = Gate(kit, inside, listen(kit), {"small-1": 5}, told.append)
    try:
        yield gate, told
    finally:
        gate.close()


def greeter(kits: Path, name: str, instance: str = "one") -> Greeter:
    kit = read_kit(kits / name)
    return Greeter(kit, read_member_key(kit.node_key), instance)


def authority(kits: Path) -> Authority:
    key = load_pem_private_key((kits / "ca" / "ca.key").read_bytes(), None)
    return Authority(key, x509.load_pem_x509_certificate((kits / "ca" / "ca.pem").read_bytes()))  # type: ignore[arg-type]


def test_a_member_comes_tells_how_far_it_is_and_leaves(kits: Path) -> None:
    with opened(with_port(kits, "small", "small-1")) as (gate, told):
        one = greeter(kits, "small-1")
        welcome = one.greet()
        assert (welcome.problem, welcome.instance, welcome.node) == ("", gate.instance, 5)
        status = Status(phase="refine", done=1, total=2, note="round 1 of 2")
        one.greet(status, node=17)
        (found,) = gate.present.values()
        assert (found.status, found.node, found.address) == (status, 17, "127.0.0.1")
        one.greet(leaves=True)
        assert gate.present == {}
    assert told == ["small-1 is there (127.0.0.1)", "small-1 has left"]


def test_greetings_share_a_connection_while_it_lasts(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    connect = http.client.HTTPSConnection.connect
    monkeypatch.setattr(http.client.HTTPSConnection, "connect", lambda self: (made.append("one"), connect(self))[1])
    door, one = with_port(kits, "small", "small-1"), greeter(kits, "small-1")
    with opened(door) as (gate, _):
        assert {one.greet().instance for _ in range(3)} == {gate.instance}
    assert len(made) == 1
    with pytest.raises(NotThere, match="does not answer"):
        one.greet()
    with opened(door) as (gate, _):
        assert {one.greet().instance for _ in range(3)} == {gate.instance}
        assert len(made) == 3
        one.close()
        assert one.greet().instance == gate.instance
    assert len(made) == 4


def test_a_member_that_is_silent_is_gone(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(with_port(kits, "small", "small-1")) as (gate, told):
        greeter(kits, "small-1").greet()
        gate.look()
        assert list(gate.present) == ["small-1"]
        monkeypatch.setattr(gate_module, "GONE_SECONDS", 0.0)
        gate.look()
        assert gate.present == {}
    assert told[1].startswith("small-1 is gone")


def test_two_with_one_name_are_told_apart_on_both_sides(kits: Path) -> None:
    with opened(with_port(kits, "small", "small-1")) as (gate, told):
        greeter(kits, "small-1", "one").greet()
        welcome = greeter(kits, "small-1", "two").greet()
        assert welcome.taken
        assert "'small-1' is taken: a program with the same kit is at work at 127.0.0.1" in welcome.problem
        assert gate.present["small-1"].instance == "one"
        greeter(kits, "small-1", "one").greet(leaves=True)
        assert greeter(kits, "small-1", "two").greet().problem == ""
    assert told[1] == f"refused (127.0.0.1): {welcome.problem}"


def test_who_is_started_again_at_once_waits_until_its_own_name_is_free(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program was killed, and the one above does not know it yet."""
    monkeypatch.setattr(member_module, "AGAIN_SECONDS", 0.02)
    with opened(with_port(kits, "small", "small-1")) as (_, told):
        greeter(kits, "small-1", "killed").greet()
        heard: list[str] = []
        again = Member(read_kit(kits / "small-1"), heard.append)
        assert again.knock()
        forgotten = threading.Timer(0.1, lambda: monkeypatch.setattr(gate_module, "GONE_SECONDS", 0.0))
        forgotten.start()
        again._enter()
        forgotten.join()
        assert heard == ["waiting: a program with this kit was here some seconds ago"]
    assert re.match(r"refused .*: 'small-1' is taken", told[1])
    assert told[2] == "small-1 is there (127.0.0.1)"


def test_two_that_stay_with_one_name_are_told(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_module, "GONE_SECONDS", 0.05)
    monkeypatch.setattr(member_module, "AGAIN_SECONDS", 0.02)
    with opened(with_port(kits, "small", "small-1")):
        greeter(kits, "small-1", "first").greet()
        second = Member(read_kit(kits / "small-1"), lambda text: None)
        second.knock()
        with pytest.raises(Refused, match="'small-1' is taken: a program with the same kit is at work"):
            second._enter()


def test_a_kit_of_another_fleet_is_refused_on_both_sides(
    kits: Path, tmp_path: Path, tiny: dict[str, Any], fleet: dict[str, Any], write: Any
) -> None:
    provision(write(tmp_path / "other", tiny, fleet), tmp_path / "others", split_data=True)
    kit = with_port(kits, "small")
    stranger = read_kit(tmp_path / "others" / "small-1")
    up = stranger.upstream.model_copy(update={"port": kit.server.port})
    (stranger.folder / "kit.toml").write_text(kit_toml(stranger.file.model_copy(update={"upstream": up})))
    with opened(kit) as (gate, told):
        with pytest.raises(Refused, match=r"is not signed by the authority of this kit .* another fleet"):
            greeter(tmp_path / "others", "small-1").greet()
        assert gate.present == {}
    assert len(told) == 1
    assert told[0].startswith("refused (127.0.0.1): 'small-1' has a kit from another fleet")


def test_an_expired_certificate_is_told_on_both_sides(kits: Path) -> None:
    kit = with_port(kits, "small", "small-1")
    certificate, key = make_server(authority(kits), "small", ["127.0.0.1"], days=0)
    kit.server_certificate.write_bytes(certificate)
    kit.server_key.write_bytes(key)
    with (
        opened(kit) as (_, told),
        pytest.raises(Refused, match=r"the certificate of small at .* has expired: provision"),
    ):
        greeter(kits, "small-1").greet()
    assert told[0].startswith("refused (127.0.0.1): small-1 cannot take part: the certificate of small")
    with pytest.raises(ValueError, match=r"server\.pem has expired on \d{4}-\d\d-\d\d: provision again"):
        check_certificate(kit, told.append)


def test_the_servers_certificate_must_be_of_its_own_kit(kits: Path) -> None:
    told: list[str] = []
    kit = read_kit(kits / "small")
    check_certificate(kit, told.append)
    assert told == []
    soon, key = make_server(authority(kits), "small", ["127.0.0.1"], days=3)
    kit.server_certificate.write_bytes(soon)
    kit.server_key.write_bytes(key)
    check_certificate(kit, told.append)
    assert "expires on" in told[0]
    kit.ca.write_bytes(make_authority("another", 9).certificate_pem)
    with pytest.raises(ValueError, match="files of two kits are mixed"):
        check_certificate(kit, told.append)


def test_nobody_there_is_not_a_refusal(kits: Path) -> None:
    with_port(kits, "small", "small-1")
    with pytest.raises(NotThere, match=r"small at 127\.0\.0\.1:\d+ does not answer: Connection refused"):
        greeter(kits, "small-1").greet()


def test_something_else_at_the_port_is_told(kits: Path) -> None:
    kit = with_port(kits, "small", "small-1")

    class Other(BaseHTTPRequestHandler):
        pass

    server = HTTPServer(("127.0.0.1", kit.server.port), Other)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with pytest.raises(Refused, match="speaks no TLS, or not ours"):
            greeter(kits, "small-1").greet()
        with pytest.raises(ValueError, match=r"small cannot listen at 127\.0\.0\.1:\d+: Address already in use"):
            listen(kit)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# -- what is wrong with a greeting, case by case ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ""),
        ({"fleet": "0" * 16}, "'small-1' has a kit from another fleet (0000000000000000); small is of fleet"),
        ({"name": "small-9"}, "'small-9' is not among the devices of small"),
        ({"name": "large-1"}, "'large-1' is not among the devices of small"),
        ({"role": "edge"}, "'small-1' is not among the devices of small"),
        ({"fleetfit": "9.9"}, "'small-1' has fleetfit 9.9 (messages 1), small has"),
        ({"messages": 99}, "install the same version on both"),
        ({"job": "0" * 16}, "'small-1' has another job than small: job.toml was changed"),
        ({"seconds": -3600.0}, "the clock of 'small-1' is 3600 seconds behind that of small"),
        ({"seconds": 3600.0}, "the clock of 'small-1' is 3600 seconds ahead of that of small"),
    ],
)
def test_each_objection_says_what_is_wrong(kits: Path, changed: dict[str, Any], told: str) -> None:
    kit = read_kit(kits / "small")
    now = time.time()
    right = honest(kits)
    moved = {k: (now + v if k == "seconds" else v) for k, v in changed.items()}
    greeting = right.model_copy(update={"seconds": now} | moved)
    body = greeting.model_dump_json().encode()
    signature = base64.b64encode(sign(read_member_key(kits / "small-1" / "node.key"), body)).decode()
    found = objection(kit, greeting, body, signature)
    assert told in found
    assert bool(told) == bool(found)


def honest(kits: Path) -> Greeting:
    kit = read_kit(kits / "small-1")
    from fleetfit.core.encoding import FORMAT_VERSION
    from fleetfit.core.files import own_version

    return Greeting(
        fleet=kit.file.fleet,
        name="small-1",
        role="device",
        fleetfit=own_version(),
        messages=FORMAT_VERSION,
        job=kit.job_hash,
        instance="one",
        seconds=time.time(),
    )


@pytest.mark.parametrize(
    ("changed", "key", "told"),
    [
        ({"name": "small-9"}, "small-1", "'small-9' is not among the devices of small: .* put it into FLEET.toml"),
        ({}, "small-2", "'small-1' does not have the key that small was given for it: .* Copy the kit again"),
        (
            {"fleetfit": "9.9"},
            "small-1",
            "'small-1' has fleetfit 9.9 .* small has .*: install the same version on both",
        ),
        (
            {"fleetfit": "9.9", "new": 1},
            "small-1",
            "'small-1' has fleetfit 9.9, small has .*: install the same version",
        ),
        (
            {"job": "0" * 16},
            "small-1",
            "'small-1' has another job than small: .* Provision again with --anew, or copy it",
        ),
        ({"seconds": 0.0}, "small-1", "the clock of 'small-1' is .* behind that of small: set both right"),
    ],
)
def test_each_objection_is_told_on_both_sides(kits: Path, changed: dict[str, Any], key: str, told: str) -> None:
    """Over the real door; the member's program ends with what it is told."""
    with opened(with_port(kits, "small", "small-1")) as (gate, heard):
        one = greeter(kits, "small-1")
        body = json.dumps(honest(kits).model_dump(mode="json") | changed).encode()
        signing = Greeter(one.kit, read_member_key(kits / key / "node.key"), "one")
        welcome = signing._post(body, client_context(one.kit.ca))
        assert re.match(told, welcome.problem)
        assert heard == [f"refused (127.0.0.1): {welcome.problem}"]
        assert gate.present == {}


def test_a_member_ends_with_what_it_is_told(kits: Path) -> None:
    """A key that is not its own: the program says it, and does not try again."""
    with opened(with_port(kits, "small", "small-1")) as (_, heard):
        shutil.copy(kits / "small-2" / "node.key", kits / "small-1" / "node.key")
        with pytest.raises(ValueError, match="'small-1' does not have the key") as error:
            start(read_kit(kits / "small-1"), True, heard.append, lambda: None)
    assert heard == [f"refused (127.0.0.1): {error.value}"]


def test_an_edge_that_cannot_listen_tells_the_cloud_too(kits: Path) -> None:
    edge = with_port(kits, "small")
    with opened(with_port(kits, "cloud", "small")) as (_, heard), socket.socket() as taken:
        taken.bind(("127.0.0.1", edge.server.port))
        taken.listen()
        with pytest.raises(ValueError, match=r"small cannot listen at .*: Address already in use\. Stop what has"):
            start(read_kit(kits / "small"), True, lambda text: None, lambda: None)
    assert (
        "refused (127.0.0.1): small cannot take part: it cannot listen for its devices: small cannot listen at"
        in heard[1]
    )


def test_an_expired_kit_is_told_by_who_has_it(kits: Path) -> None:
    """The one above does not even start with it, so that nobody else would tell."""
    (kits / "small-1" / "ca.pem").write_bytes(make_authority("old", 0).certificate_pem)
    with pytest.raises(ValueError, match=r"this kit has expired on \d{4}-\d\d-\d\d .*: provision again"):
        start(read_kit(kits / "small-1"), True, lambda text: None, lambda: None)


def test_a_wrong_key_is_told(kits: Path) -> None:
    kit, greeting = read_kit(kits / "small"), honest(kits)
    body = greeting.model_dump_json().encode()
    (kits / "other.key").write_bytes(make_member_key()[0])
    for signature in (base64.b64encode(sign(read_member_key(kits / "other.key"), body)).decode(), "", "%%%"):
        assert "does not have the key that small was given for it" in objection(kit, greeting, body, signature)


def test_another_job_is_noticed_but_not_another_machine(kits: Path) -> None:
    kit = read_kit(kits / "small-1")
    before = kit.job_hash
    for changed, same in (
        ({"run": {"threads": 7}}, True),
        ({"links": {"deadline_seconds": 7.0}}, True),
        ({"data": {"source": "/elsewhere"}}, True),
        ({"refine": {"rounds": 7}}, False),
        ({"seed": 7}, False),
        ({"data": {"alpha": 7.0}}, False),
    ):
        fields = kit.job.model_dump(mode="json", exclude_none=True)
        for key, value in changed.items():
            fields[key] = fields[key] | value if isinstance(value, dict) else value
        (kits / "small-1" / "job.toml").write_text(tomli_w.dumps(fields))
        assert (read_kit(kits / "small-1").job_hash == before) is same, changed


# -- what is passed on ------------------------------------------------------------------------------------------------


@pytest.fixture
def inside() -> Iterator[tuple[str, list[tuple[str, int, str]]]]:
    """In Flower's place: writes down what it is asked."""
    asked: list[tuple[str, int, str]] = []

    class SuperLink(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            self.rfile.read(length)
            asked.append((self.path, length, self.headers.get("flwr-public-key", "")))
            self.send_response(202)
            self.send_header("content-length", "5")
            self.send_header("flwr-answer", "yes")
            self.end_headers()
            self.wfile.write(b"there")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), SuperLink)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def insecure_kits(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any], fleet: Any, write: Any) -> Path:
    folder = tmp_path_factory.mktemp("insecure")
    links = {"links": {"max_message_bytes": 3_000_000}}
    provision(write(folder / "f", tiny | links, fleet), folder / "kits", split_data=True, insecure=True)
    return folder / "kits"


@pytest.fixture
def insecure(insecure_kits: Path) -> Kit:
    return with_port(insecure_kits, "small")


def post(kit: Kit, path: str, body: bytes = b"") -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection("127.0.0.1", kit.server.port, timeout=60)
    try:
        connection.request("POST", path, body, {"flwr-public-key": "mine"})
        response = connection.getresponse()
        return response.status, response.read(), response.headers.get("flwr-answer", "")
    except (BrokenPipeError, ConnectionResetError):  # it did not wait for the end
        return 413, b"", ""
    finally:
        connection.close()


def test_what_nodes_need_is_passed_on_and_nothing_else(insecure: Kit, inside: Any) -> None:
    address, asked = inside
    with opened(insecure, address):
        assert post(insecure, "/v1/fleet/pull-messages", b"ab") == (202, b"there", "yes")
        assert asked == [("/v1/fleet/pull-messages", 2, "mine")]
        for path in (
            "/v1/control/start-run",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e%2fcontrol%2fstart-run",
            "/v1/fleet/..%2fcontrol%2fstart-run",
            "/v1/fleet/",
            "/v1/fleet/a/b",
            "/v1/fleet/start-run",
            "/docs",
            "/health",
        ):
            assert post(insecure, path)[0] == 404, path
        assert len(asked) == 1


def test_sizes_are_bounded_before_flower_sees_anything(insecure: Kit, inside: Any) -> None:
    address, asked = inside
    with opened(insecure, address) as (_, told):
        assert post(insecure, "/v1/fleet/push-object", bytes(MAX_CALL_BYTES + 1))[0] == 413
        assert asked == []
        assert post(insecure, "/v1/fleet/push-messages", b"")[0] == 202
        assert post(insecure, "/v1/fleet/push-object", bytes(3_000_000))[0] == 202
        assert post(insecure, "/v1/fleet/push-object", bytes(2_000_000))[0] == 413
        for call in ("send-node-heartbeat", "pull-messages"):  # it is still a member, and can be asked again
            assert post(insecure, f"/v1/fleet/{call}", b"")[0] == 202
        assert post(insecure, "/v1/fleet/push-object", b"more of it")[0] == 413
        assert post(insecure, "/v1/fleet/push-messages", b"")[0] == 202
        assert post(insecure, "/v1/fleet/push-object", bytes(2_000_000))[0] == 202
    assert told[0] == "refused (127.0.0.1): a member sends more than links.max_message_bytes (push-object)"


def test_a_member_does_not_send_what_the_door_would_stop(insecure_kits: Path) -> None:
    told: list[str] = []
    member = Member(read_kit(insecure_kits / "small-1"), told.append)
    small = RoundReply(step=2, tensors={"header.x": torch.zeros(7)}, scores=NO_SCORES)
    sent = decode_any(member._encoded(small))
    assert isinstance(sent, RoundReply)
    assert torch.equal(sent.tensors["header.x"], small.tensors["header.x"])
    large = small.model_copy(update={"tensors": {"header.x": torch.zeros(750_001)}})
    reply = decode_any(member._encoded(large))
    assert isinstance(reply, Declined)
    assert re.fullmatch(r"its round_reply has 3000\d{3} bytes, links.max_message_bytes is 3000000", reply.reason)
    assert told == [f"a reply is not sent: {reply.reason}"]


def test_only_those_without_keys_may_register_themselves(insecure: Kit, kits: Path, inside: Any) -> None:
    address, asked = inside
    with opened(insecure, address):
        assert post(insecure, "/v1/fleet/register-node")[0] == 202
    assert len(asked) == 1
    kit = with_port(kits, "small")
    with opened(kit, address):
        connection = http.client.HTTPSConnection("127.0.0.1", kit.server.port, context=client_context(kit.ca))
        connection.request("POST", "/v1/fleet/register-node", b"")
        assert connection.getresponse().status == 404
        connection.close()


def test_a_key_that_is_not_a_members_gets_no_further_than_the_door(kits: Path) -> None:
    kit = with_port(kits, "small")
    stranger, member = (
        public_pem(line)
        for line in (public_line(ec.generate_private_key(ec.SECP384R1())), kit.file.members[0].public_key)
    )
    with opened(kit, f"127.0.0.1:{reserved_port()}") as (_, told):
        for key, status in ((stranger, 401), (b"", 401), (member, 503)):  # there is nobody inside
            connection = http.client.HTTPSConnection("127.0.0.1", kit.server.port, context=client_context(kit.ca))
            headers = {"flwr-public-key": base64.b64encode(key).decode()}
            connection.request("POST", "/v1/fleet/pull-messages", b"", headers)
            assert connection.getresponse().status == status
            connection.close()
    assert told == ["refused (127.0.0.1): a node whose key is not that of a member of small (pull-messages)"]


def test_nobody_answers_in_the_name_of_another(insecure: Kit, inside: Any) -> None:
    address, asked = inside

    def pushed(node: int, source: int) -> bytes:
        message = ProtoMessage(metadata=Metadata(src_node_id=source))
        return PushMessagesRequest(node=Node(node_id=node), messages_list=[message]).SerializeToString()

    with opened(insecure, address) as (_, told):
        assert post(insecure, "/v1/fleet/push-messages", pushed(7, 7))[0] == 202
        assert post(insecure, "/v1/fleet/push-messages", pushed(7, 8))[0] == 403
        assert post(insecure, "/v1/fleet/push-messages", b"\xff\xff")[0] == 403
    assert len(asked) == 1
    assert told == ["refused (127.0.0.1): a member answers in the name of another"]


def test_flower_that_is_not_up_yet_is_no_reason_to_give_up(insecure: Kit) -> None:
    with opened(insecure, f"127.0.0.1:{reserved_port()}"):
        assert post(insecure, "/v1/fleet/pull-messages")[0] == 503


def test_a_greeting_that_is_none_is_refused(insecure: Kit) -> None:
    with opened(insecure) as (gate, told):
        for body in (b"", b"[]", b'{"fleet": "x"}', b"{" * 10_000):
            assert post(insecure, "/fleetfit/greeting", body)[0] == 400
        assert post(insecure, "/fleetfit/greeting", bytes(20_000))[0] == 413
        assert gate.present == {}
    assert told[0].startswith("refused (127.0.0.1): the greeting cannot be read")


def test_tls_and_no_tls_do_not_meet_in_silence(kits: Path, insecure: Kit) -> None:
    kit = read_kit(insecure.folder.parent / "small-1")
    with opened(with_port(kits, "small")) as (_, _told):
        secure = read_kit(kits / "small")
        up = kit.upstream.model_copy(update={"port": secure.server.port})
        (kit.folder / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={"upstream": up})))
        with pytest.raises((Refused, NotThere), match="--insecure"):
            greeter(kit.folder.parent, "small-1").greet()


def test_a_closed_door_is_closed(insecure: Kit) -> None:
    with opened(insecure):
        pass
    with socket.socket() as trial:
        assert trial.connect_ex(("127.0.0.1", insecure.server.port)) != 0


def test_somebody_in_the_place_of_the_one_above_does_not_end_a_member_that_was_there(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is on the way may answer at any time; a member that has not been there yet is told of its own mistake."""
    monkeypatch.setattr(member_module, "EVERY_SECONDS", 0.01)
    told: list[str] = []
    member = Member(read_kit(kits / "small-1"), told.append)
    answers = iter([Distrusted("not signed by the authority"), Welcome(), Refused("small-1 is not among the devices")])

    def greet(*_: Any, **__: Any) -> Welcome:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(member._greeter, "greet", greet)
    member._keep_greeting()
    assert told[0] == "waiting: not signed by the authority"
    assert told[-1] == "small is back"
    assert isinstance(member._refusal, Refused)
    assert "not among" in str(member._refusal)
