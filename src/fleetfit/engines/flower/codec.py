"""Our encoded messages inside Flower's: one array of raw bytes.

A Flower message travels as a tree of objects, one request each. An ``ArrayRecord`` costs 581 bytes around a message of
less than 5 MiB (its share of the tree's index: 341 more) and 84 a further piece of 5 MiB; a ``ConfigRecord`` costs 294
(and 203), in three requests instead of five. Yet the array wins: its bytes are cut into pieces that are hashed and sent
one by one, as they are, while a ``ConfigRecord`` is one protocol buffer that is written and hashed whole again and
again: on one core 0.2 s and three copies against 0.03 s for 10 MB, 2.9 s against 0.2 s for 100 MB. Backbones are that
large, and a round's messages are so much larger than 300 bytes that the difference is lost in them.

The array's own type, shape and serialisation are never looked at: nothing in the bytes is believed before
``messages.decode`` has validated it.
"""

from flwr.app import Array, ArrayRecord, RecordDict

MESSAGE_TYPE = "query"  # Flower's name for what every request of ours is
RECORD = "fleetfit"
BLOB = "message"


def pack(blob: bytes) -> RecordDict:
    """An encoded message as the content of a Flower message."""
    array = Array(dtype="uint8", shape=(len(blob),), stype="safetensors", data=blob)
    return RecordDict({RECORD: ArrayRecord({BLOB: array})})


def unpack(content: RecordDict, max_bytes: int, what: str = "message") -> bytes:
    """The encoded message in the content of a Flower message, checked for its size before anyone decodes it.

    Args:
        content: What a Flower message carries.
        max_bytes: The most that the message may have.
        what: Names it in errors.

    Raises:
        ValueError: it is not ours, or has more bytes than allowed.
    """
    record = content.get(RECORD) if len(content) == 1 else None
    if not isinstance(record, ArrayRecord) or set(record) != {BLOB}:
        raise ValueError(f"{what} is foreign: it does not carry one message of fleetfit")
    data = record[BLOB].data
    if len(data) > max_bytes:
        raise ValueError(f"{what} has {len(data)} bytes, links.max_message_bytes is {max_bytes}")
    return data
