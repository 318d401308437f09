"""What comes from outside is bounded before it costs anything: each attack once, and every number of every message."""

import json
import math
import struct
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fleetfit.config.sections import RefineConfig
from fleetfit.core.bounds import (
    FROM_ABOVE,
    FROM_DEVICE,
    MAX_DEPTH,
    MAX_VALUE,
    Bounds,
    check_free,
    check_values,
    from_edge,
    read_header,
    tensors_of,
)
from fleetfit.core.encoding import decode
from fleetfit.core.records import HeaderSpec
from fleetfit.device.messages import AttributesRequest, Propose, RefineRound
from fleetfit.device.ways import ways_to_ship
from fleetfit.edge.checks import Expected, reply_bounds
from fleetfit.edge.messages import MESSAGES, decode_any
from fleetfit.models.elastic import Backbone, backbone_from_state
from fleetfit.models.header import header_from_state

torch.set_num_threads(1)
CONFIG = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
CONFIG |= {"image_size": 8, "patch_size": 4, "num_channels": 1}


def blob(entries: str, data: bytes = b"", kind: str = "propose", fields: str = '{"step":1}') -> bytes:
    """A message with any text where its tensors are named."""
    pairs = {"kind": kind, "version": "1", "fields": fields}
    metadata = ",".join(f'"{k}":{json.dumps(v)}' for k, v in pairs.items())
    text = ('{"__metadata__":{' + metadata + "}" + ("," if entries else "") + entries + "}").encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(name: str = "t", shape: str = "2", offsets: str = "0,8", dtype: str = "F32") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}'


def test_the_hand_made_blob_is_one() -> None:
    assert decode_any(blob(entry(), b"\0" * 8)).tensors["t"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "shape",
    [
        "0,9223372036854775808",
        "0,4611686018427387904,4611686018427387904",
        "0,2147483648",
        "0,2147483647,2147483647,2147483647",
        ",".join(["1"] * 9),
        "0," + "2" * 5000,
        "0,-1",
        "0,1e3",
        "0,",
    ],
)
def test_shapes_that_no_tensor_has(shape: str) -> None:
    with pytest.raises(ValueError, match="corrupt"):
        decode_any(blob(entry(shape=shape, offsets="0,0")))


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        (entry() + "," + entry(offsets="8,16"), 16),  # one name twice
        (entry() + "," + entry("u", offsets="0,8"), 8),  # both in one place
        (entry() + "," + entry("u", offsets="16,24"), 24),  # a gap
        (entry(), 9),
        (entry(), 7),
        (entry(offsets="8,0"), 0),
        (entry(dtype="F8_E4M3"), 2),
        (entry(dtype="U128"), 32),
        (entry("line\\nbreak"), 8),
        (entry("n" * 601), 8),
        (entry("half \\ud800"), 8),
        (entry() + ",", 8),
        ("," + entry(), 8),
        ('"__metadata__":{"kind":"finish"},' + entry(), 8),  # a second one
    ],
)
def test_headers_that_no_writer_makes(entries: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"corrupt|truncated|a tensor whose name"):
        decode_any(blob(entries, b"\0" * size))


def test_metadata_twice_is_refused() -> None:
    text = b'{"__metadata__":{"kind":"propose","kind":"finish","version":"1","fields":"{}"}}'
    with pytest.raises(ValueError, match="'kind' twice"):
        decode_any(struct.pack("<Q", len(text)) + text)


def test_a_bool_is_0_or_1_whatever_the_byte() -> None:
    kept = decode_any(blob(entry(shape="3", offsets="0,3", dtype="BOOL"), b"\0\2\xff")).tensors["t"]
    assert kept.tolist() == [False, True, True]
    assert kept.view(torch.uint8).tolist() == [0, 1, 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=9), st.integers(0, 5)))
def test_what_safetensors_writes_is_read_as_it_reads_it(sizes: dict[str, int]) -> None:
    sizes.pop("__metadata__", None)
    written = {n: torch.arange(s * 2, dtype=torch.float32).view(s, 2) for n, s in sizes.items()}
    data = safetensors.torch.save(written, metadata={"a": 'é"\\\n'})
    header = read_header(data)
    assert header.metadata == {"a": 'é"\\\n'}
    own, theirs = tensors_of(data, header), safetensors.torch.load(data)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[n], theirs[n]) for n in own)


# -- what it costs to refuse ------------------------------------------------------------------------------------------


def allocated(data: bytes, bounds: Bounds) -> int:
    """Bytes that Python took at most while it refused."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"at most|more than|wrong"):
            decode_any(data, "it", bounds)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_tensors_and_much_metadata_are_refused_unread() -> None:
    many = blob(",".join(entry(f"t{i}", "0", "0,0") for i in range(10_000)))
    assert len(many) < FROM_DEVICE.header_bytes
    assert allocated(many, FROM_DEVICE) < 8 * 2**20
    long = blob("", fields='{"step":1,' + ",".join(f'"f{i}":1' for i in range(10**6)) + "}")
    assert allocated(long, FROM_DEVICE) < 2**20
    wrong = blob("", fields='{"step":1,' + ",".join(f'"f{i}":1' for i in range(60_000)) + "}")
    assert len(wrong) < FROM_DEVICE.header_bytes
    assert allocated(wrong, FROM_DEVICE) < 16 * 2**20


def test_a_steps_reply_is_as_long_as_it_must_be() -> None:
    header = {"w": ((1000, 1000), torch.float32)}
    expected = Expected(header=header, importance={"w": ((1000,), torch.float32)}, channels=64)
    small, large = reply_bounds(Propose(step=3), expected), reply_bounds(RefineRound(step=2, round=1), expected)
    assert small.size_bytes is not None
    assert large.size_bytes is not None
    assert large.size_bytes - small.size_bytes == 4_000_000 + 4_000 - 4 * len(ways_to_ship(RefineConfig(), 0))
    assert reply_bounds(AttributesRequest(step=0), expected).size_bytes == FROM_DEVICE.header_bytes + 8
    assert from_edge(1000).header_bytes == Bounds().header_bytes > from_edge(10).header_bytes
    assert FROM_ABOVE.within(10, "x").within(20, "y").size_rule == "x"


# -- numbers ----------------------------------------------------------------------------------------------------------

FREE = {"config", "rounds", "decision"}  # checked by check_free, and where they are used


def unbounded(schema: Any, at: str = "") -> list[str]:
    """Places of a JSON schema where a number or an integer has no bounds."""
    if isinstance(schema, list):
        return [place for part in schema for place in unbounded(part, at)]
    if not isinstance(schema, dict):
        return []
    found = []
    low = schema.keys() & {"minimum", "exclusiveMinimum"}
    high = schema.keys() & {"maximum", "exclusiveMaximum"}
    if schema.get("type") == "integer" and not (low and high):
        found.append(at)
    for key, part in schema.items():
        if key == "properties":
            found += [
                place for name, own in part.items() if name not in FREE for place in unbounded(own, f"{at}.{name}")
            ]
        elif key == "$defs":
            found += [place for name, own in part.items() for place in unbounded(own, name)]
        elif key not in ("default", "description", "enum", "const", "required"):
            found += unbounded(part, at)
    return found


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_integer_of_every_message_has_bounds(kind: str) -> None:
    for name, info in MESSAGES[kind].model_fields.items():
        if name not in {"tensors", *FREE}:
            assert not unbounded(TypeAdapter(info.rebuild_annotation()).json_schema(), name)


def test_the_check_finds_what_has_none() -> None:
    assert unbounded({"properties": {"a": {"type": "integer", "minimum": 0}}}) == [".a"]


@pytest.mark.parametrize("step", ["true", '"1"', "1.0", "1e0", "-1", "10000000", "1" * 40, "null", "NaN"])
def test_a_step_is_an_integer_and_nothing_like_one(step: str) -> None:
    with pytest.raises(ValueError, match="step"):
        decode(blob("", fields=f'{{"step":{step}}}'), Propose)


@pytest.mark.parametrize(
    "number", ["1e999", "NaN", "Infinity", "1" * 30, "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2)]
)
def test_free_fields_hold_numbers_that_all_can_write(number: str) -> None:
    good = json.loads(encode_report())
    with pytest.raises(ValueError, match="decision"):
        decode_any(
            blob(
                "",
                kind="cluster_report",
                fields=json.dumps(good).replace('"decision": {}', f'"decision": {{"a":{number}}}'),
            )
        )


def encode_report() -> str:
    fields = {"cluster": "c", "header": {}, "trials": [], "similarity": [], "distance": [], "rounds": []}
    return json.dumps(fields | {"decision": {}, "devices": []})


def test_the_report_above_is_one() -> None:
    assert decode_any(blob("", kind="cluster_report", fields=encode_report())).kind == "cluster_report"


def test_check_free_looks_everywhere() -> None:
    assert check_free({"a": [1, "x", None, 0.5]}) == {"a": [1, "x", None, 0.5]}
    for bad in ({"a": [{"b": math.nan}]}, [[2**63]], {"a": math.inf}):
        with pytest.raises(ValueError, match="must hold"):
            check_free(bad)


def test_values_are_finite_and_of_a_size_that_real_ones_have() -> None:
    check_values(
        {"a": torch.tensor([MAX_VALUE, -MAX_VALUE]), "importance.b": torch.tensor(1e11), "n": torch.tensor(2**40)}
    )
    for bad in (math.nan, math.inf, -3e38, 2 * MAX_VALUE):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            with pytest.raises(ValueError, match="tensor 'h' must be"):
                check_values({"h": torch.tensor([0.0, bad], dtype=dtype)})


# -- models that are not given room -----------------------------------------------------------------------------------


@pytest.fixture
def on_meta_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Backbone.__init__

    def watched(self: Backbone, family: str, config: Any) -> None:
        assert torch.empty(0).device.type == "meta", "it was given room"
        real(self, family, config)

    monkeypatch.setattr(Backbone, "__init__", watched)


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 8192},
        {"hidden_size": 2**40},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 500},
        {"image_size": 2**20},
        {"intermediate_size": 10**15},
        {"num_attention_heads": 10**12},
        {"hidden_act": "__import__"},
        {"initializer_range": "x"},
    ],
)
@pytest.mark.usefixtures("on_meta_only")
def test_a_configuration_that_its_tensors_do_not_bear_out(changed: dict[str, Any]) -> None:
    with torch.device("meta"):
        state = Backbone("vit", CONFIG).model.state_dict()
    few = {name: torch.zeros(t.shape) for name, t in state.items()}
    with pytest.raises(ValueError, match=r"model\.config|does not fit"):
        backbone_from_state("vit", CONFIG | changed, few)


def test_headers_are_compared_before_they_are_given_room(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        shape = Backbone("vit", CONFIG).feature_shape

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was given room")

    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda self, device: self if device == "meta" else never())
    for spec in (HeaderSpec(kind="mlp", hidden=2**17), HeaderSpec(kind="blocks", channels=2**17, pooling=4096)):
        with pytest.raises(ValueError, match="does not fit its tensors"):
            header_from_state(spec, shape, 10, {})


def test_a_header_of_any_number_of_channels_is_no_message() -> None:
    fields = encode_report().replace('"header": {}', '"header": {"channels": 1' + "0" * 30 + "}")
    with pytest.raises(ValueError, match="channels"):
        decode_any(blob("", kind="cluster_report", fields=fields))
