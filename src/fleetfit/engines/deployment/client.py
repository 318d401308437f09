"""An edge's or a device's connection to the one above: greetings, Flower's SuperNode, the messages that it brings."""

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable

import httpx
from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict

from fleetfit.core.bounds import FROM_ABOVE, MAX_MESSAGE_RULE, FewLines
from fleetfit.core.encoding import Declined, Message, encode, printable
from fleetfit.edge.messages import decode_any
from fleetfit.engines.deployment.certificates import read_member_key
from fleetfit.engines.deployment.flower_api import TASK_POLL_SECONDS, Api, NodeTasks, check_version, sign_off
from fleetfit.engines.deployment.handshake import (
    EVERY_SECONDS,
    GONE_SECONDS,
    Distrusted,
    Greeter,
    NotThere,
    Refused,
    Status,
    Welcome,
)
from fleetfit.engines.deployment.kit import Kit, write_secret
from fleetfit.engines.deployment.proxy import Tell
from fleetfit.engines.deployment.server import check_authority, free_port
from fleetfit.engines.deployment.subprocesses import Daemon
from fleetfit.engines.flower.codec import pack, unpack

log = logging.getLogger(__name__)
log.addFilter(FewLines(300))

NODE_ID = re.compile(r"SuperNode ID: (\d+)")
SENT = "Sent successfully"
AGAIN_SECONDS = 3.0
SENT_SECONDS = 60.0

Handle = Callable[[str, Message], Message]  # the run's id, and a message of it -> the reply


class Member:
    """A participant below another, while it takes part.

    Args:
        kit: The edge's or the device's.
        tell: Told in words what happens.

    Raises:
        ValueError: the kit's key cannot be read, or its certificates have expired.
    """

    def __init__(self, kit: Kit, tell: Tell) -> None:
        check_version()
        check_authority(kit)
        self.kit = kit
        self.status: Status | None = None
        self._tell = tell
        self._greeter = Greeter(kit, read_member_key(kit.node_key), secrets.token_hex(8))
        self._above = ""  # the instance of the one above, once it has welcomed us
        self._number = 0  # ours there, if it says so
        self._renewed = threading.Event()  # it was started anew: Flower's program there knows ours no longer
        self._refusal: Refused | None = None
        self._stop = threading.Event()
        self._node = 0
        self._sent = 0
        self._few = FewLines()
        self._supernode: Daemon | None = None
        self._tasks: NodeTasks | None = None
        self._keeper: threading.Thread | None = None

    # -- greetings ----------------------------------------------------------------------------------------------------

    def knock(self) -> bool:
        """Greet once, so that what is wrong is known before anything is done. Whether anyone answered.

        A name that is taken is no reason to stop yet: it may be our own, of a program that was killed seconds ago.

        Raises:
            Refused: we may not take part, or the other cannot be trusted.
        """
        try:
            welcome = self._greeter.greet()
            if not welcome.taken:
                self._taken_in(welcome)
        except NotThere as error:
            self._tell(f"waiting: {error}")
            return False
        return True

    def give_up(self, problem: str) -> None:
        """Tell the one above why we cannot take part, if it hears."""
        try:
            self._greeter.greet(problem=problem)
        except (NotThere, Refused) as error:
            log.info("%s", error)

    def _taken_in(self, welcome: Welcome) -> None:
        if welcome.problem:
            raise Refused(welcome.problem)
        if self._above and welcome.instance != self._above:
            self._renewed.set()
        self._above, self._number = welcome.instance, welcome.node

    def _enter(self) -> None:
        """Greet until we are welcome; a name that is taken may be free soon."""
        told, until = "", time.monotonic() + 2 * GONE_SECONDS
        while True:
            try:
                welcome = self._greeter.greet()
                if not (welcome.taken and time.monotonic() < until):
                    self._taken_in(welcome)
                    return
                words = "waiting: a program with this kit was here some seconds ago"
            except NotThere as error:
                words = f"waiting: {error}"
            if words != told:
                self._tell(words)
                told = words
            time.sleep(AGAIN_SECONDS)

    def _keep_greeting(self) -> None:
        """In a thread of its own, until the end."""
        silent = False
        while not self._stop.wait(EVERY_SECONDS):
            try:
                self._taken_in(self._greeter.greet(self.status, node=self._node))
                if silent:
                    self._tell(f"{self.kit.upstream.name} is back")
                silent = False
            except (Distrusted, OSError) as error:
                # It is not there, or there is no descriptor here. Or somebody else answers in its place, who is not to
                # be the end of us: it was there before.
                if not silent:
                    self._tell(f"waiting: {error}")
                silent = True
            except Refused as error:
                self._refusal = error
                return

    # -- Flower's program ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start Flower's program for this node, which connects to the one above."""
        kit = self.kit
        if self._number:
            try:
                sign_off(kit.upstream.host_port, kit.ca, self._greeter.key, self._number)
            except httpx.HTTPError as error:
                log.info("signing off: %s", error)
        secret = secrets.token_bytes(32)
        secret_file = kit.state / "node-secret"
        secret_file.unlink(missing_ok=True)
        write_secret(secret_file, secret)
        port = free_port()
        self._tasks = NodeTasks(Api(f"127.0.0.1:{port}", secret, None))
        trust = ["--root-certificates", str(kit.ca), "--auth-supernode-private-key", str(kit.node_key)]
        arguments = [
            *("--superlink", kit.upstream.host_port),
            *(["--insecure"] if kit.file.insecure else trust),
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret_file)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
        self._renewed.clear()
        self._node = 0
        self._supernode = Daemon("flower-supernode", arguments, kit.state, self._hear)

    def _leave(self) -> None:
        """Stop Flower's program without its goodbye, at which the one above would drop a reply not yet fetched."""
        if self._supernode is not None and self._tasks is not None:
            self._tasks.close()
            self._supernode.stop(at_once=True)

    def _hear(self, line: str) -> None:
        if found := NODE_ID.search(line):
            self._node = int(found[1])
            self._tell(f"connected to {self.kit.upstream.name} at {self.kit.upstream.host_port}")
        self._sent += SENT in line

    def _is_well(self) -> bool:
        return self._supernode is not None and self._supernode.is_running and not self._renewed.is_set()

    # -- messages -----------------------------------------------------------------------------------------------------

    def serve(self, handle: Handle, until: Callable[[], bool], check: Callable[[], None] = lambda: None) -> None:
        """Answer messages until it is enough.

        Args:
            handle: Answers one.
            until: Whether it is enough; asked after each reply.
            check: Called often; raises to stop.

        Raises:
            Refused: the one above does not let us take part any more.
        """
        self._enter()
        self._keeper = threading.Thread(target=self._keep_greeting, name="greetings", daemon=True)
        self._keeper.start()
        self._start()
        while True:
            check()
            if self._refusal is not None:
                raise self._refusal
            if not self._is_well():
                self._start_again()
            sent = self._sent
            if self._answer(handle) and until():
                self._wait_until_sent(sent)
                return

    def _answer(self, handle: Handle) -> bool:
        assert self._tasks is not None
        try:
            answered = self._tasks.answer_one(lambda message: pack(self._encoded(self._reply(handle, message))))
        except httpx.HTTPError as error:  # it is not up yet, or was stopped meanwhile
            log.info("SuperNode: %s", error)
            answered = False
        except Exception as error:  # Flower rebuilds what the one above sent, and may stumble over anything in it
            log.warning("what %s sent cannot be read", self.kit.upstream.name, exc_info=error)
            time.sleep(AGAIN_SECONDS)
            answered = False
        if not answered:
            time.sleep(TASK_POLL_SECONDS)
        return answered

    def _reply(self, handle: Handle, message: FlowerMessage) -> Message:
        """The reply, or a word that there is none; whatever came, the program goes on."""
        above, most = self.kit.upstream.name, self.kit.job.links.max_message_bytes
        request: Message | None = None
        try:
            content = message.content if message.has_content() else RecordDict()
            request = decode_any(unpack(content, most, "it"), "it", FROM_ABOVE.within(most, MAX_MESSAGE_RULE))
            begin = time.monotonic()
            reply = handle(message.metadata.group_id, request)
            log.info("a %s is answered in %.3f s", request.kind, time.monotonic() - begin)
            return reply
        except Exception as error:  # of a message, which may ask for anything
            kind = request.kind if request is not None else "message"
            log.warning("%s of %s", kind, above, exc_info=error)
            if self._few.passes(kind):
                self._tell(printable(f"a {kind} of {above} cannot be answered: {error}"))
            return Declined(reason=printable(self.kit.without_path(error)))

    def _encoded(self, reply: Message) -> bytes:
        """A reply that the one above would stop at its door is not sent: a word of why is."""
        blob, most = encode(reply), self.kit.job.links.max_message_bytes
        if len(blob) <= most:
            return blob
        reason = f"its {reply.kind} has {len(blob)} bytes, links.max_message_bytes is {most}"
        self._tell(f"a reply is not sent: {reason}")
        return encode(Declined(reason=reason))

    def _start_again(self) -> None:
        """Flower's program has ended, or the one above was started anew and knows it no longer."""
        assert self._supernode is not None
        if not self._supernode.is_running and not self._renewed.is_set():
            log.warning("SuperNode has ended: %s", self._supernode.words())
            self._tell(f"connecting again; {self._supernode.log_file} has why Flower's SuperNode ended")
            time.sleep(AGAIN_SECONDS)
        self._leave()
        self._enter()
        self._start()

    def _wait_until_sent(self, before: int) -> None:
        """The last reply is still with Flower's program."""
        ends = time.monotonic() + SENT_SECONDS
        while self._is_well() and self._sent == before and time.monotonic() < ends:
            time.sleep(TASK_POLL_SECONDS)

    def close(self) -> None:
        """Stop everything, and say so."""
        self._stop.set()
        self._leave()
        if self._keeper is not None:
            self._keeper.join()
            try:
                self._greeter.greet(leaves=True)
            except (NotThere, Refused) as error:
                log.info("%s", error)
        self._greeter.close()

    def __enter__(self) -> "Member":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
