"""A device that means harm: its replies are damaged before they leave. ``python liar.py KIT SEED``"""

import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fleetfit.core.encoding import Message, encode
from fleetfit.device.messages import CoarseReply
from fleetfit.edge.messages import StatsRequest, decode_any
from fleetfit.engines.deployment import client as member
from fleetfit.engines.deployment.kit import read_kit
from fleetfit.engines.deployment.start import start
from fleetfit.engines.flower.codec import pack

Damage = Callable[[Message, bytes, random.Random], bytes]


def with_tensor(message: Message, value: float, shape: tuple[int, ...] = ()) -> bytes:
    """One of its tensors is another; where there is none, one too many."""
    name = next((n for n, t in message.tensors.items() if t.is_floating_point() and t.numel()), "header.x")
    tensor = torch.full(shape or message.tensors.get(name, torch.zeros(2)).shape, value)
    return encode(message.model_copy(update={"tensors": {**message.tensors, name: tensor}}))


DAMAGES: dict[str, Damage] = {
    "noise": lambda m, b, c: c.randbytes(300),
    "cut short": lambda m, b, c: b[: c.randrange(len(b))],
    "not finite": lambda m, b, c: with_tensor(m, float(c.choice(("nan", "inf", "-inf")))),
    "wrong shape": lambda m, b, c: with_tensor(m, 1.0, (3, 1, 7)),
    "another kind": lambda m, b, c: encode(StatsRequest()),
    "another step": lambda m, b, c: encode(m.model_copy(update={"step": 77})),
    "something behind": lambda m, b, c: b + c.randbytes(20),
    "over the limit": lambda m, b, c: b + bytes(2_100_000),  # the edge refuses it
    "far over the limit": lambda m, b, c: b + bytes(5_000_000),  # the door does
}


def main(kit: str, seed: str) -> None:
    chance = random.Random(seed)
    names = list(DAMAGES)
    chance.shuffle(names)
    turn = itertools.cycle(names)

    def lying(blob: bytes) -> object:
        message = decode_any(blob)
        if isinstance(message, CoarseReply):  # so that it is asked for more
            return pack(blob)
        name = next(turn)
        print("a lie:", name, file=sys.stderr, flush=True)
        return pack(DAMAGES[name](message, blob, chance))

    member.pack = lying  # type: ignore[assignment]
    start(read_kit(Path(kit)), False, lambda text: print(text, file=sys.stderr, flush=True), lambda: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
