"""Counts what passes a door: HTTP with its heads, before TLS, whatever it is for."""

from http import HTTPStatus
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

FIRST_LINE_BYTES = len("POST  HTTP/1.1\r\n\r\n")  # around the path, and the empty line behind the head
ANSWER_BYTES = len("HTTP/1.1 200 \r\ndate: Fri, 20 Nov 2026 12:00:00 GMT\r\n\r\n")  # what the server adds itself


class Passed(NamedTuple):
    """Bytes since a door was opened."""

    down: int = 0
    up: int = 0


class Meter:
    """An application, and the bytes of all its requests and answers.

    Args:
        app: Whose.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.down = self.up = 0

    @property
    def passed(self) -> Passed:
        """So far."""
        return Passed(self.down, self.up)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            self.up += FIRST_LINE_BYTES + len(scope["raw_path"]) + _size(scope["headers"])

        async def received() -> Message:
            message = await receive()
            self.up += len(message.get("body", b""))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                words = len(HTTPStatus(message["status"]).phrase)
                self.down += ANSWER_BYTES + words + _size(message.get("headers", []))
            self.down += len(message.get("body", b""))
            await send(message)

        await self.app(scope, received, sent)


def _size(headers: Any) -> int:
    return sum(len(name) + len(value) + len(": \r\n") for name, value in headers)
