"""Flower's SuperLink is for the program that started it: others on this machine lack what each call must show.

Flower itself asks nobody who stops a run or registers a node, as it takes its machine for its own. What must be shown
is made from the secret that already lies in the kit's ``state``, which only its owner may read.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

HEADER = "x-fleetfit-inside"
HEALTH = "/health"

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


def shown(secret: bytes) -> str:
    """What a call must carry; the secret cannot be computed from it."""
    return hmac.new(secret, HEADER.encode(), hashlib.sha256).hexdigest()


class Guarded:
    """An ASGI application that answers only calls that show it.

    Args:
        app: What is guarded. Whether it is alive, anyone may ask.
        key: As ``shown`` gives it.
    """

    def __init__(self, app: App, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a call on, or refuse it."""
        given = dict(scope.get("headers", ())).get(HEADER.encode(), b"")
        if scope["type"] == "lifespan" or scope.get("path") == HEALTH or hmac.compare_digest(given, self.key):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
