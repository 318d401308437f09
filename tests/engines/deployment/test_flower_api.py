"""A node's tasks over a pretended program of Flower: what ends while it is worked at is no reason to end."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, ObjectUnavailableError
from flwr.supercore.task_identity import TaskIdentity

from fleetfit.engines.deployment import flower_api as runtime
from fleetfit.engines.deployment.flower_api import NodeTasks


class PretendedNode:
    """Has one message."""

    done = 0

    def client(self, kind: object, token: str = "") -> Any:
        return self

    def __getattr__(self, call: str) -> Callable[[Any], Any]:
        answers = {
            "AcquireTask": SimpleNamespace(token="token"),
            "PullTaskInput": SimpleNamespace(run=SimpleNamespace(run_id=1), context=SimpleNamespace(node_id=2)),
            "PullMessages": SimpleNamespace(
                messages_list=[0], message_object_trees=[SimpleNamespace(object_id="message")]
            ),
        }
        return lambda request=None: answers.get(call)

    def PushTaskOutput(self, request: object) -> None:
        self.done += 1


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> PretendedNode:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    asked = Message(RecordDict({"a": ConfigRecord({"b": 1})}), 2, "query")
    monkeypatch.setattr(runtime, "pull_and_inflate_object_from_tree", lambda *_, **__: asked)
    monkeypatch.setattr(runtime, "context_from_proto", lambda context: context)
    monkeypatch.setattr(runtime, "push_message", lambda *_: None)
    return PretendedNode()


def test_a_message_is_answered_once(node: PretendedNode) -> None:
    asked: list[str] = []

    def answer(message: Message) -> RecordDict:
        asked.append(message.metadata.message_id)
        return RecordDict()

    assert NodeTasks(node).answer_one(answer)  # type: ignore[arg-type]
    assert (asked, node.done) == (["message"], 1)


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("push_message", ObjectPushError("object", 1, "session")),
        ("pull_and_inflate_object_from_tree", ObjectPullError("object", "gone")),
        ("pull_and_inflate_object_from_tree", ObjectUnavailableError("object")),
    ],
)
def test_a_run_that_has_ended_meanwhile_is_not_the_nodes_end(
    node: PretendedNode, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception
) -> None:
    """The one above was killed, and its run with it: the reply is nobody's, and the next message is waited for."""

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(runtime, part, fails)
    with pytest.raises(httpx.HTTPError, match="object"):
        NodeTasks(node).answer_one(lambda message: RecordDict())  # type: ignore[arg-type]
    assert node.done == 0
