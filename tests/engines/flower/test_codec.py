"""The codec: what goes in comes out, what is too long or not ours is refused before anyone reads it."""

import random

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st

from fleetfit.engines.flower.codec import BLOB, RECORD, pack, unpack


def over_the_wire(content: RecordDict) -> RecordDict:
    """As Flower rebuilds it on the other side, from the objects that travel."""
    objects = {name: part.deflate() for name, part in get_all_nested_objects(content).items()}
    rebuilt = inflate_object_from_contents(content.object_id, objects)
    assert isinstance(rebuilt, RecordDict)
    return rebuilt


@given(st.binary(max_size=300))
def test_what_is_packed_is_unpacked_on_the_other_side(blob: bytes) -> None:
    assert unpack(over_the_wire(pack(blob)), len(blob)) == blob


def test_a_message_of_several_pieces_comes_whole() -> None:
    blob = random.Random(0).randbytes(12_000_000)  # in pieces of 5 MiB
    content = pack(blob)
    assert len(get_all_nested_objects(content)) == 3 + 3
    assert unpack(over_the_wire(content), len(blob)) == blob


def test_overhead_is_what_the_docstring_says() -> None:
    """Of the record alone; Flower's own message object around it is the same for any content."""
    small, large = (sum(len(o.deflate()) for o in get_all_nested_objects(pack(b"x" * n)).values()) - n for n in (1, 9))
    assert small == large
    assert 300 <= small <= 581


@given(st.integers(1, 300), st.integers(0, 299))
def test_a_message_that_is_too_long_is_refused(size: int, allowed: int) -> None:
    if size <= allowed:
        assert len(unpack(pack(b"x" * size), allowed)) == size
        return
    with pytest.raises(ValueError, match=f"reply of far-1 has {size} bytes, links.max_message_bytes is {allowed}"):
        unpack(pack(b"x" * size), allowed, "reply of far-1")


ARRAY = Array(dtype="uint8", shape=(1,), stype="safetensors", data=b"x")


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ArrayRecord({BLOB: ARRAY})}),
        RecordDict({RECORD: ArrayRecord({BLOB: ARRAY, "more": ARRAY})}),
        RecordDict({RECORD: ArrayRecord({"other": ARRAY})}),
        RecordDict({RECORD: ArrayRecord()}),
        RecordDict({RECORD: ConfigRecord({BLOB: b"x"})}),
        RecordDict({RECORD: MetricRecord({BLOB: 1})}),
        RecordDict({RECORD: ArrayRecord({BLOB: ARRAY}), "more": ConfigRecord({"a": 1})}),
    ],
)
def test_what_others_send_is_foreign(content: RecordDict) -> None:
    with pytest.raises(ValueError, match="reply of far-1 is foreign"):
        unpack(content, 10**6, "reply of far-1")


def test_nothing_but_the_bytes_is_believed() -> None:
    """Type, shape and serialisation that an array claims to have are not looked at."""
    claimed = Array(dtype="object", shape=(10**12,), stype="pickle", data=b"bytes")
    assert unpack(over_the_wire(RecordDict({RECORD: ArrayRecord({BLOB: claimed})})), 5) == b"bytes"
