"""Messages: what is decoded is what was encoded, and whatever else arrives is a ValueError and nothing else."""

import ast
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fleetfit
from fleetfit.config.sections import RefineConfig
from fleetfit.core.bounds import MAX_MESSAGE_RULE, Bounds, read_header
from fleetfit.core.encoding import (
    FORMAT_VERSION,
    MAX_REASON,
    Declined,
    Message,
    Request,
    decode,
    encode,
    put,
    take,
)
from fleetfit.core.link import Refused
from fleetfit.core.progress import silent
from fleetfit.core.records import (
    Block,
    DeviceAttributes,
    DeviceReport,
    EnergyModel,
    HeaderSpec,
    HeaderTrial,
    ValidationScores,
    Way,
)
from fleetfit.device.messages import (
    AttributesReply,
    AttributesRequest,
    CoarseModel,
    CoarseReply,
    DeviceMessage,
    DeviceReply,
    Finish,
    FinishReply,
    Propose,
    ProposeReply,
    RefineRound,
    RoundReply,
)
from fleetfit.edge.messages import (
    MESSAGES,
    BackboneAssignment,
    ClusterReport,
    ClusterStats,
    StatsRequest,
    decode_any,
    read_reply,
)
from fleetfit.method.size import safetensors_size_bytes

torch.set_num_threads(1)

ATTRIBUTES = DeviceAttributes(device_id="Gerät 1", storage_limit_bytes=10**9, energy=EnergyModel(), num_samples=7)
BLOCK = Block(input_1=0, input_2=1, operation_1="conv3", operation_2="identity")
HEADER = HeaderSpec(kind="blocks", blocks=(BLOCK,), pooling=2)
SCORES = ValidationScores(num_samples=3, loss_sum=math.pi, num_correct=2)
REPORT = DeviceReport(
    device_id="d",
    accuracy_coarse=None,
    accuracy_local=1 / 3,
    accuracy=0.5,
    num_train=1,
    num_test=2,
    parameters=3,
    size_bytes=4,
    limit_bytes=5,
    kept_neurons=6,
    neurons=7,
    notes=('said "no"\n',),
)
TRIAL = HeaderTrial(name="linear", spec=HeaderSpec(), loss=math.inf, accuracy=0.1, parameters=12)
CONFIG = {"hidden_size": 16, "layer_norm_eps": 1e-12, "qkv_bias": True, "hidden_act": "gelu", "nothing": None}
MODEL: dict[str, Any] = {"family": "vit", "config": CONFIG, "labels": ("a", "ü"), "header": HEADER}
EXAMPLES: dict[str, Message] = {
    m.kind: m
    for m in (
        StatsRequest(),
        ClusterStats(devices=(ATTRIBUTES, ATTRIBUTES)),
        BackboneAssignment(cluster="c", **MODEL),
        ClusterReport(
            cluster="c",
            header=HEADER,
            trials=(TRIAL,),
            similarity=((0.25, 0.75), (1 / 3, 2 / 3)),
            distance=((0.0, 1e-300), (1e300, 0.0)),
            rounds=({"round": 1, "loss": 0.1},),
            decision={"header": "coarse"},
            devices=(REPORT,),
        ),
        AttributesRequest(step=0),
        AttributesReply(step=0, attributes=ATTRIBUTES),
        CoarseModel(step=1, **MODEL, refine=RefineConfig(), seed=2**62, class_shares=(0.1, 0.9)),
        CoarseReply(step=1, scores=SCORES),
        RefineRound(step=2, round=1),
        RoundReply(step=2, scores=SCORES),
        Propose(step=3),
        ProposeReply(step=3, num_samples=4),
        Finish(step=4, way=Way(header="refined", prior_strength=0.1)),
        FinishReply(step=4, report=REPORT),
        Declined(reason="no room", needs_model=True),
    )
}
KINDS = sorted(MESSAGES)
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits, NaN and infinity among them; zero to three dimensions, some of them empty."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    bits = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    if dtype == torch.bool:
        return (bits % 2).bool().reshape(shape)
    return bits.view(dtype).reshape(shape)


def bits_of(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).numpy()) if tensor.numel() else b""


names = st.text(max_size=12).filter(lambda n: n.isprintable() and n != "__metadata__")


def test_there_is_an_example_of_every_kind() -> None:
    assert set(EXAMPLES) == set(MESSAGES)
    assert all(MESSAGES[kind] is type(example) for kind, example in EXAMPLES.items())
    assert len(KINDS) == 15


@settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.dictionaries(names, tensors(), max_size=4))
def test_a_message_comes_out_as_it_went_in(kind: str, sent: dict[str, Tensor]) -> None:
    message = EXAMPLES[kind].model_copy(update={"tensors": sent})
    blob = encode(message)
    for got in (decode(blob, type(message)), decode_any(blob)):
        assert type(got) is type(message)
        assert got.model_dump() == message.model_dump()
        assert {n: bits_of(t) for n, t in got.tensors.items()} == {n: bits_of(t) for n, t in sent.items()}
    # Not the same bytes: safetensors writes metadata in any order. What is counted as traffic is the same.
    assert len(encode(got)) == len(blob)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_without_tensors(kind: str) -> None:
    got = decode_any(encode(EXAMPLES[kind]))
    assert type(got) is MESSAGES[kind]
    assert got == EXAMPLES[kind]


def test_tensors_that_share_memory_or_are_views_or_want_gradients() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    sent = {
        "whole": whole,
        "again": whole,
        "row": whole[1],
        "column": whole[:, 1],
        "transposed": whole.T,
        "strided": whole[::2, ::3],
        "expanded": whole[:1].expand(5, 4),
        "last": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": parameter,
    }
    blob = encode(StatsRequest(tensors=sent))
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in sent.items()}
    assert len(blob) == safetensors_size_bytes(shapes, read_header(blob).metadata), "a view costs its own size"
    got = decode(blob, StatsRequest).tensors
    assert {n: bits_of(t) for n, t in got.items()} == {n: bits_of(t) for n, t in sent.items()}
    assert not any(t.requires_grad for t in got.values())
    got["row"].zero_()
    assert torch.equal(got["whole"], whole)
    assert torch.equal(whole[1], torch.tensor([4.0, 5, 6, 7]))


def test_extra_metadata_travels_and_is_no_field() -> None:
    blob = encode(StatsRequest(), cost="3")
    assert read_header(blob).metadata["cost"] == "3"
    assert decode(blob, StatsRequest) == StatsRequest()


any_float = st.floats() | st.sampled_from([0.0, -0.0, 5e-324, -2.2250738585072014e-308, 1.7976931348623157e308, 1e22])


def trial(loss: float, parameters: int, name: str = "linear") -> ClusterReport:
    """A report with numbers of all kinds of fields, and texts that look like numbers."""
    found = TRIAL.model_copy(update={"loss": loss, "parameters": parameters, "name": name})
    example = EXAMPLES["cluster_report"].model_copy(
        update={"trials": (found,), "similarity": ((finite(loss), 0.5), (-0.5, finite(loss)))}
    )
    assert isinstance(example, ClusterReport)
    return example.model_copy(update={"rounds": ({"loss": finite(loss), "round": parameters},)})


def finite(number: float) -> float:
    """Only a loss may be another."""
    return number if math.isfinite(number) else 0.25


@settings(max_examples=200)
@given(any_float, st.integers(0, 999_999_999_999))
def test_a_number_takes_as_much_room_whatever_its_value_and_comes_back_bit_by_bit(number: float, count: int) -> None:
    blob = encode(trial(number, count))
    assert len(blob) == len(encode(trial(0.5, 1)))
    got = decode(blob, ClusterReport)
    assert struct.pack("<d", got.trials[0].loss) == struct.pack("<d", number) or math.isnan(number)
    assert math.isnan(got.trials[0].loss) == math.isnan(number)
    for back in (got.similarity[0][0], got.similarity[1][1]):
        assert struct.pack("<d", back) == struct.pack("<d", finite(number))
    assert (got.trials[0].parameters, got.rounds[0]["round"]) == (count, count)


@settings(max_examples=100)
@given(st.text(st.sampled_from('0123456789.,-+eE"\\ [NaInfity')))
def test_a_text_is_no_number(text: str) -> None:
    for name in (text, "NaN", "1,2"):
        assert decode(encode(trial(0.5, 1, name)), ClusterReport).trials[0].name == name
    # Each further digit is a further byte, or none where the format fills up to eight; a number would not count.
    assert len(encode(trial(0.5, 1, "1" * 80))) - len(encode(trial(0.5, 1, "1" * 8))) == 72


def test_tensors_begin_where_those_of_pytorch_do() -> None:
    """A product's last digits may hang on it, and messages lie in memory as they come."""
    for sizes in ((1,), (1, 2, 3), (7, 5, 13, 1)):
        sent = {f"{i}": torch.ones(size) for i, size in enumerate(sizes)}
        for extra in ("", "some more bytes"):
            got = decode(encode(StatsRequest(tensors=sent), extra=extra), StatsRequest)
            assert {t.data_ptr() % 64 for t in got.tensors.values()} == {0}


def test_fields_that_are_not_numbers_survive() -> None:
    scores = ValidationScores(num_samples=0, loss_sum=math.nan, num_correct=0)
    assert math.isnan(decode(encode(CoarseReply(step=1, scores=scores)), CoarseReply).scores.loss_sum)
    assert decode_any(encode(EXAMPLES["cluster_report"])).trials[0].loss == math.inf  # type: ignore[attr-defined]


# -- what is not a message --------------------------------------------------------------------------------------------

SENT = RoundReply(step=2, scores=SCORES, tensors={"header.weight": torch.arange(3.0), "none": torch.zeros(0, 2)})


def at_most(size_bytes: int) -> Bounds:
    return Bounds().within(size_bytes, MAX_MESSAGE_RULE)


def blob_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def metadata_of(message: Message = SENT, **changed: Any) -> dict[str, Any]:
    return {"__metadata__": {**read_header(encode(message)).metadata, **changed}}


def test_the_hand_made_blob_is_one() -> None:
    """Otherwise the tests below would fail for another reason than they name."""
    assert decode(blob_of(metadata_of()), RoundReply).scores == SCORES


def test_cut_short_at_every_length() -> None:
    blob = encode(SENT)
    for length in range(len(blob)):
        for expected in (RoundReply, None):
            with pytest.raises(ValueError, match=r"^the reply "):
                _ = decode(blob[:length], expected, "the reply") if expected else decode_any(blob[:length], "the reply")
    with pytest.raises(ValueError, match="corrupt"):
        decode(blob + b"\0", RoundReply)


def refused_or_read(blob: bytes) -> bool:
    """Read as a message, or refused by a ValueError: anything else fails the test."""
    try:
        got = decode_any(blob)
    except ValueError:
        return True
    assert type(got) in MESSAGES.values()
    return False


def test_every_bit_of_the_header_flipped() -> None:
    blob = encode(SENT)
    length = 8 + struct.unpack("<Q", blob[:8])[0]
    refused = 0
    for place in range(length):
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[place] ^= 1 << bit
            refused += refused_or_read(bytes(damaged))
    # What passes is a changed name or number: there is no checksum.
    assert refused > 0.8 * 8 * length


def test_the_length_may_not_lie() -> None:
    blob = encode(SENT)
    for length in (0, 1, len(blob) - 8):
        with pytest.raises(ValueError, match="message is"):
            decode(struct.pack("<Q", length) + blob[8:], RoundReply)
    for length in (len(blob) - 7, Bounds().header_bytes + 1, 2**63, 2**64 - 1):
        with pytest.raises(ValueError, match=f"announces a header of {length} bytes in {len(blob)}"):
            decode(struct.pack("<Q", length) + blob[8:], RoundReply)
    text = json.dumps(metadata_of(), separators=(",", ":")).encode()
    assert decode(blob_of(text.ljust(1000)), RoundReply).scores == SCORES
    most = Bounds().header_bytes
    with pytest.raises(ValueError, match=f"has a header of {most + 1} bytes, at most {most} are read"):
        decode(blob_of(text.ljust(most + 1)), RoundReply)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.binary(max_size=200))
def test_random_bytes(blob: bytes) -> None:
    assert refused_or_read(blob)
    assert refused_or_read(blob_of(blob))
    assert refused_or_read(blob_of(metadata_of(), blob + b"\0"))


numbers = st.integers(-2, 20) | st.integers() | st.floats()
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(values, values, st.sampled_from(["kind", "version", "fields", "cost"]), st.binary(max_size=24))
def test_any_json_in_place_of_header_entry_metadata_or_fields(value: Any, other: Any, key: str, data: bytes) -> None:
    text = json.dumps(value)
    refused_or_read(blob_of(value, data))
    refused_or_read(blob_of({"__metadata__": value}, data))
    refused_or_read(blob_of(metadata_of(**{key: value}), data))
    refused_or_read(blob_of(metadata_of(**{key: text}), data))
    refused_or_read(blob_of({**metadata_of(), "t": value}, data))
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for part in entry:
        refused_or_read(blob_of({**metadata_of(), "t": {**entry, part: other}}, b"\0" * 4))


DTYPE_NAMES = [
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E8M0",
    "C64",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "BOOL",
    "U64",
    "Q7",
    "",
    "f32",
]


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_dtypes_that_the_format_or_pytorch_does_not_know(dtype: str) -> None:
    for size in (2, 3, 4, 8, 16, 32):
        entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}
        refused_or_read(blob_of({**metadata_of(), "t": entry}, b"\1" * size))


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"__metadata__":'])
def test_json_nested_beyond_reason(opening: bytes) -> None:
    with pytest.raises(ValueError, match="header is not that of safetensors"):
        decode(blob_of(opening * 100_000), RoundReply)
    with pytest.raises(ValueError, match="recursion"):
        decode(blob_of(metadata_of(fields=(opening * 10_000).decode())), RoundReply)


@pytest.mark.parametrize("data_offsets", [[0, 2**62], [4, 0], [-4, 0], [1, 5], [0, 8]])
@pytest.mark.parametrize("shape", [[1], [2**62], [-1], [2**32, 2**32], [0]])
def test_tensors_that_claim_more_than_there_is(data_offsets: list[int], shape: list[int]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": data_offsets}
    with pytest.raises(ValueError, match="corrupt"):
        decode(blob_of({**metadata_of(), "t": entry}, b"\0" * 4), RoundReply)


def test_overlapping_tensors_and_hidden_bytes() -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header, data in (({"a": entry, "b": entry}, b"\0" * 4), ({"a": entry}, b"\0" * 8)):
        with pytest.raises(ValueError, match="corrupt"):
            decode(blob_of(metadata_of() | header, data), RoundReply)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "round_reply"])
def test_another_kind(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^the reply is a '{kind}', expected a 'round_reply'$"):
        decode(encode(EXAMPLES[kind]), RoundReply, "the reply")


def test_a_kind_that_does_not_cross_links() -> None:
    with pytest.raises(ValueError, match="message is of the unknown kind 'device_memory'"):
        decode_any(blob_of(metadata_of(kind="device_memory")))
    with pytest.raises(ValueError, match="message is of the unknown kind ''"):
        decode_any(blob_of(metadata_of(kind="")))


@pytest.mark.parametrize("version", ["0", "2", "", "1.0", "01"])
def test_another_version(version: str) -> None:
    with pytest.raises(ValueError, match=rf"has format version {version}, this fleetfit reads {FORMAT_VERSION}"):
        decode(blob_of(metadata_of(version=version)), RoundReply)


def test_a_file_of_somebody_else() -> None:
    plain = safetensors.torch.save({"a": torch.zeros(2)}, metadata={"format": "pt"})
    for blob in (plain, safetensors.torch.save({"a": torch.zeros(2)}), blob_of({"a": 1}), blob_of({"__metadata__": 3})):
        with pytest.raises(ValueError, match=r"foreign: fleetfit's metadata is missing|not that of safetensors"):
            decode(blob, RoundReply)
    for text in (b"not json", b"\xff\xfe", b"", b"3", b"[1]"):
        with pytest.raises(ValueError, match="header is not that of safetensors"):
            decode(blob_of(text), RoundReply)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_refused(kind: str) -> None:
    fields = json.loads(EXAMPLES[kind].model_dump_json())
    header = metadata_of(EXAMPLES[kind], fields=json.dumps(fields | {"surprise": 1}))
    with pytest.raises(ValueError, match="message is corrupt: surprise: Extra inputs"):
        decode_any(blob_of(header))


@pytest.mark.parametrize("kind", [k for k in KINDS if MESSAGES[k].model_fields.keys() - {"tensors"}])
def test_a_field_that_is_missing_or_of_another_type_is_named(kind: str) -> None:
    fields = json.loads(EXAMPLES[kind].model_dump_json())
    for name, info in MESSAGES[kind].model_fields.items():
        if name == "tensors":
            continue
        wrong = json.dumps({**fields, name: [[["?"]]]})
        with pytest.raises(ValueError, match=rf"message is corrupt: {name}"):
            decode_any(blob_of(metadata_of(EXAMPLES[kind], fields=wrong)))
        if info.is_required():
            missing = json.dumps({k: v for k, v in fields.items() if k != name})
            with pytest.raises(ValueError, match=rf"message is corrupt: {name}: Field required"):
                decode_any(blob_of(metadata_of(EXAMPLES[kind], fields=missing)))


def test_tensors_do_not_come_in_through_the_fields() -> None:
    fields = json.dumps({**json.loads(SENT.model_dump_json()), "tensors": {"header.weight": [1, 2]}})
    with pytest.raises(ValueError, match="message is corrupt: tensors"):
        decode(blob_of(metadata_of(fields=fields)), RoundReply)


def test_messages_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SENT.scores = SCORES  # type: ignore[misc]


# -- replies ----------------------------------------------------------------------------------------------------------

ASKED = RefineRound(step=2, round=1)


def test_each_request_knows_its_reply_and_device_messages_their_step() -> None:
    requests = [m for m in MESSAGES.values() if issubclass(m, Request)]
    assert {m.kind: m.reply.kind for m in requests} == {
        "stats_request": "cluster_stats",
        "backbone_assignment": "cluster_report",
        "attributes_request": "attributes_reply",
        "coarse_model": "coarse_reply",
        "refine_round": "round_reply",
        "propose": "propose_reply",
        "finish": "finish_reply",
    }
    assert all(issubclass(m.reply, DeviceReply) is issubclass(m, DeviceMessage) for m in requests)


def test_a_longer_blob_than_allowed_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = encode(SENT)
    assert decode(blob, RoundReply, bounds=at_most(len(blob))).scores == SCORES

    def never(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("fleetfit.core.bounds.json.loads", never)
    monkeypatch.setattr("fleetfit.core.bounds.struct.unpack", never)
    monkeypatch.setattr(torch, "frombuffer", never)
    says = f"has {len(blob)} bytes, links.max_message_bytes is {len(blob) - 1}"
    with pytest.raises(ValueError, match=says):
        decode(blob, RoundReply, bounds=at_most(len(blob) - 1))
    with pytest.raises(ValueError, match=says):
        decode_any(blob, bounds=at_most(len(blob) - 1))
    reply = read_reply([blob], ASKED, at_most(len(blob) - 1))
    assert isinstance(reply, Refused)
    assert says in reply.reason


def test_a_reply_is_read_or_refused() -> None:
    blob = encode(SENT)
    for blobs in ([blob], [blob, encode(SENT)], [blob] * 3):
        reply = read_reply(blobs, ASKED, at_most(len(blob)))
        assert isinstance(reply, RoundReply)
        assert {n: bits_of(t) for n, t in reply.tensors.items()} == {n: bits_of(t) for n, t in SENT.tensors.items()}
    assert read_reply([encode(EXAMPLES["coarse_reply"])], ASKED, at_most(10**6)) == Refused(
        reason="it is a 'coarse_reply', expected a 'round_reply'"
    )
    for damaged in (b"", blob[:-1], blob + b"x", encode(SENT)[:20]):
        reply = read_reply([damaged], ASKED, at_most(10**6))
        assert isinstance(reply, Refused)
        assert reply.reason.startswith("it is ")


@pytest.mark.parametrize(
    "other",
    [
        SENT.model_copy(update={"step": 3}),
        SENT.model_copy(update={"tensors": {}}),
        SENT.model_copy(update={"tensors": SENT.tensors | {"header.weight": torch.arange(3.0) + 1e-6}}),
        SENT.model_copy(update={"tensors": SENT.tensors | {"none": torch.zeros(0, 2, dtype=torch.float64)}}),
        SENT.model_copy(update={"tensors": SENT.tensors | {"none": torch.zeros(0, 3)}}),
        EXAMPLES["coarse_reply"],
        EXAMPLES["declined"],
    ],
)
def test_a_reply_that_comes_twice_with_other_content_is_refused(other: Message) -> None:
    for first, second in ((SENT, other), (other, SENT)):
        reply = read_reply([encode(first), encode(first), encode(second)], ASKED, at_most(10**6))
        assert reply == Refused(reason="it came 3 times, with different content")
    assert isinstance(read_reply([encode(SENT), b"garbage"], ASKED, at_most(10**6)), Refused)


def test_who_declines_is_heard_but_not_echoed_as_it_is() -> None:
    declined = Declined(reason="\x1b[2J no\nroom \u202e", needs_model=True)
    reply = read_reply([encode(declined)], ASKED, at_most(10**6))
    assert reply == Refused(reason="declined:  [2J no room  ", needs_model=True)
    kind = "\x1b[31m" + "k" * 10**6
    foreign = read_reply([blob_of(metadata_of(kind=kind))], ASKED, at_most(10**7))
    assert isinstance(foreign, Refused)
    assert len(foreign.reason) <= MAX_REASON
    assert foreign.reason.isprintable()
    with pytest.raises(ValueError, match="at most 500 characters"):
        Declined(reason="x" * 501)


def test_a_tensor_of_a_huge_empty_shape_takes_no_memory() -> None:
    entry = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    try:
        got = decode(blob_of({**metadata_of(), "t": entry}), RoundReply)
    except ValueError:
        return
    assert got.tensors["t"].untyped_storage().nbytes() == 0


# -- names ------------------------------------------------------------------------------------------------------------


def test_taking_what_was_put() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    mixed = put("backbone", {"a.b": one}) | put("header", {"a": two}) | {"backbonex.a": two, "backbone": two}
    assert list(mixed) == ["backbone.a.b", "header.a", "backbonex.a", "backbone"]
    assert take(mixed, "backbone") == {"a.b": one}
    assert take(mixed, "header") == {"a": two}
    assert take(mixed, "nothing") == {}
    assert silent("phase", 1, 2, "note") is None


# -- no pickle --------------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg"}
FORBIDDEN_CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.package", "numpy.load", "pandas.read_pickle"),
    *("eval", "exec", "compile", "__import__"),
}


def dangers(source: str) -> list[str]:
    """Imports of pickling modules, and calls that run what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] * (module.split(".")[0] in FORBIDDEN_MODULES)
            found += [f"{module}.{a.name}" for a in node.names if f"{module}.{a.name}" in FORBIDDEN_CALLS]
        elif isinstance(node, (ast.Attribute, ast.Name)):
            found += [ast.unparse(node)] * (ast.unparse(node) in FORBIDDEN_CALLS)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found += ["allow_pickle"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load":
            found += ["np.load"] * ("allow_pickle" not in [k.arg for k in node.keywords])  # say it, to be sure
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch\nx = torch.load('f')",
        "def f():\n    import dill",
        "g(allow_pickle=True)",
        "np.load('f')",
        "np.load('f', allow_pickle=flag)",
        "from numpy import load",
        "eval('1')",
    ],
)
def test_the_search_for_dangers_finds_them(source: str) -> None:
    assert dangers(source)


def test_what_refuses_pickles_is_no_danger() -> None:
    assert dangers("import numpy as np\nnp.load('f', allow_pickle=False)") == []


def test_no_module_unpickles_or_runs_what_it_reads() -> None:
    paths = sorted(Path(fleetfit.__file__).parent.rglob("*.py"))
    assert len(paths) > 40
    assert {str(p): d for p in paths if (d := dangers(p.read_text(encoding="utf-8")))} == {}
