"""What goes up holds no private input, label or class count, in no form we can think of, and no field nobody knows.

A tiny run through the local engine, with every encoded message caught. Each check is shown to catch devices that leak.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_job import tiny_fields
from torch import Tensor

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import make_job
from fleetfit.core.encoding import Message, decode, encode
from fleetfit.core.records import HeaderKept
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device import handler
from fleetfit.device.device import DeviceState
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesReply, CoarseReply, FinishReply, RoundReply
from fleetfit.edge.messages import decode_any
from fleetfit.engines import local, whole_fleet

torch.set_num_threads(1)

SCORES = {"scores.num_samples", "scores.loss_sum", "scores.num_correct"}
ATTRIBUTES = {
    "device_id",
    "storage_limit_bytes",
    "energy.power_watts",
    "energy.power_slope_watts",
    "energy.patch_power_watts",
    "energy.latency_seconds",
    "energy.latency_slope_seconds",
    "num_samples",
}
REPORT = {
    "device_id",
    "accuracy_coarse",
    "accuracy_local",
    "accuracy",
    "num_train",
    "num_test",
    "parameters",
    "size_bytes",
    "limit_bytes",
    "kept_neurons",
    "neurons",
    "notes",
}
FAULT = {"device_id", "step", "reason", "times", "recovered"}
NOISE = {"noise"}  # how much of it there is: the job says that, and not the data
HEADER = {"kind", "blocks", "repeats", "channels", "pooling", "hidden"}
BLOCK = {f"blocks.{f}" for f in ("input_1", "input_2", "operation_1", "operation_2")}


def under(prefix: str, fields: set[str]) -> set[str]:
    return {f"{prefix}.{field}" for field in fields}


KINDS = ("", " + prior", " + inputs")
WAY = {"header", "temperature", "prior_strength", "prior_classes", "shift_concentration"}

# All that may go up, by kind: JSON fields (lists have no level of their own), and first parts of tensors' names.
# Whoever adds one here answers the question: what does it tell about a person's data?
MAY_GO_UP: dict[str, tuple[set[str], set[str]]] = {
    "attributes_reply": ({"step"} | under("attributes", ATTRIBUTES), set()),
    "coarse_reply": ({"step"} | SCORES, {"sketch"}),
    "round_reply": (
        {"step"} | {s.replace("scores", kind, 1) for s in SCORES for kind in ("scores", "came", "average")} | NOISE,
        {"importance", "header", "change", "level"},
    ),
    "propose_reply": (
        {"step", "num_samples"} | NOISE,
        {"losses"},
    ),
    "finish_reply": ({"step"} | under("report", REPORT), set()),
    "cluster_stats": (under("devices", ATTRIBUTES) | {"silent"} | under("faults", FAULT), set()),
    "cluster_report": (
        {"cluster", "similarity", "distance", "decision.grouping", "decision.num_found"}
        | under("header", HEADER | BLOCK)
        | under("trials", {"name", "loss", "accuracy", "parameters", "chosen"} | under("spec", HEADER | BLOCK))
        | under("rounds", {"round", "num_samples", "loss_sum", "num_correct"})
        | under("decision.way", WAY)
        | under("decision.groups", {"devices"} | under("way", WAY))
        | {f"decision.loss_by_way.{w}{kind}" for w in get_args(HeaderKept) for kind in KINDS}
        | {f"decision.groups.loss_by_way.{w}{kind}" for w in get_args(HeaderKept) for kind in KINDS}
        | {"decision.silhouettes", *(f"decision.silhouettes.{n}" for n in range(2, 9))}
        | under("rounds.came", {"num_samples", "loss_sum", "num_correct"})
        | under("devices", REPORT)
        | under("absent", {"device_id", "since"})
        | under("faults", FAULT)
        | {"phase_seconds", "phase_cpu_seconds", "traffic"},  # of an edge's work, by phase
        set(),
    ),
}


# -- a run, caught ----------------------------------------------------------------------------------------------------


def fields(cache: Path) -> dict[str, Any]:
    return tiny_fields(
        cache,
        {"small": 2, "large": 2},
        data={"public_share": 0.7, "classes_per_device": 6},
        header={"keep_distilled": False},
        refine={"prune_share": 0.5},
    )


class Caught:
    """A finished run: every message that went up, and what must not be in it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **refine: Any) -> None:
        given = fields(folder.parent / "cache")
        job = make_job(given | {"refine": given["refine"] | refine})
        blobs: list[bytes] = []

        def encoding(message: Message) -> bytes:
            blobs.append(encode(message))
            return blobs[-1]

        with patch.context() as patched:
            patched.setattr(whole_fleet, "encode", encoding)
            local.run(job, folder)
        self.folder = folder
        self.refine = job.refine
        devices = {c: [a.device_id for a in members] for c, members in fleet_of(job).items()}
        self.data: FleetData = share_out(load_samples(job), job.data, devices, job.seed)
        self.up = [(decode_any(b), b) for b in blobs if decode_any(b).kind in MAY_GO_UP]
        assert {m.kind for m, _ in self.up} == set(MAY_GO_UP)

    def images(self) -> Tensor:
        """Every private image, [sample, pixel]."""
        splits = [s for d in self.data.devices.values() for s in (d.train, d.validation, d.test)]
        return torch.cat([s.inputs[:] for s in splits]).flatten(1)

    def labels(self) -> Iterator[Tensor]:
        """Every device's labels: of its splits, and of those that it learns from together."""
        for d in self.data.devices.values():
            yield from (d.train.labels, d.validation.labels, d.test.labels)
            yield torch.cat([d.train.labels, d.validation.labels])
            yield torch.cat([d.train.labels, d.validation.labels, d.test.labels])


OPTIONS: dict[str, dict[str, Any]] = {
    "samples": {"sketch": "samples", "similarity": "calibrated", "bits": 32},
    "sliced": {"sketch": "sliced", "similarity": "calibrated"},
    "parameter": {"importance": "parameter", "prune_share": 0.1, "similarity": "wasserstein"},
    "updates": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("privacy")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Caught]:
    return {name: Caught(folder / name, pytest.MonkeyPatch(), **options) for name, options in OPTIONS.items()}


@pytest.fixture(params=list(OPTIONS))
def caught(request: pytest.FixtureRequest, runs: dict[str, Caught]) -> Caught:
    return runs[request.param]


# -- the checks -------------------------------------------------------------------------------------------------------


def json_paths(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf of some JSON with its dotted path; lists have no level of their own."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            name = key.split("/")[0]  # refined/10: the way to ship with a class prior of strength 10
            yield from json_paths(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        for inner in value:
            yield from json_paths(inner, path)
    elif value != []:
        yield path, value


def numbers(value: Any) -> Iterator[list[float]]:
    """Each list of numbers in some JSON, and the numbers of each of its tables in a row."""
    if isinstance(value, (dict, list)):
        inside = list(value.values()) if isinstance(value, dict) else value
        yield [float(v) for v in inside if isinstance(v, (int, float))]
        for inner in inside:
            yield from numbers(inner)


def sequences(message: Message) -> Iterator[Tensor]:
    """All numbers of a message in every order they could be read: tensors by rows and by columns, lists of JSON."""
    for tensor in message.tensors.values():
        yield tensor.double().flatten()
        if tensor.ndim > 1:
            yield tensor.double().transpose(0, -1).flatten()
    for row in numbers(json.loads(message.model_dump_json())):
        yield torch.tensor(row, dtype=torch.float64)


def unit(rows: Tensor) -> Tensor:
    """Rows without their mean, of length one; a constant row becomes zero."""
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-6, centred / norm.clamp(min=1e-30), 0.0)


def windows(sequence: Tensor, length: int) -> Tensor:
    return sequence.unfold(0, length, 1) if len(sequence) >= length else torch.zeros(0, length, dtype=torch.float64)


def check_fields(caught: Caught) -> None:
    for message, _ in caught.up:
        allowed, prefixes = MAY_GO_UP[message.kind]
        found = {path for path, _ in json_paths(json.loads(message.model_dump_json()))}
        assert found <= allowed, (message.kind, found - allowed)
        names = {name.partition(".")[0] for name in message.tensors}
        assert names <= prefixes, (message.kind, names - prefixes)


def check_image_bytes(caught: Caught) -> None:
    """No image as its floats or its pixels, in the precisions that one would think of."""
    images = caught.images()
    pixels = (images * 0.5 + 0.5) * 16
    everything = b"\0\0\0\0".join(blob for _, blob in caught.up)
    for values in (images, pixels, pixels / 16):
        for dtype in (np.float32, np.float64, np.float16):
            for row in values.numpy().astype(dtype):
                assert row.tobytes() not in everything
    for row in pixels.round().numpy().astype(np.uint8):
        assert row.tobytes() not in everything
        assert (row * 15).tobytes() not in everything


def check_image_values(caught: Caught) -> None:
    """No run of numbers equals an image up to scale and shift."""
    images = unit(caught.images()).float()
    for message, _ in caught.up:
        for sequence in sequences(message):
            found = unit(windows(sequence, images.shape[1])).float()
            if len(found):
                assert float((found @ images.T).abs().max()) < 0.999, message.kind


def check_labels(caught: Caught) -> None:
    """No run of numbers is a device's labels in their order, nor its class counts, nor their shares."""
    labels = [split.double() for split in caught.labels() if len(split) >= 6]
    counts = [torch.bincount(split.long(), minlength=10).double() for split in labels]
    counts = [c / c.norm() for c in counts if int((c > 0).sum()) >= 3]
    assert len(labels) > 10
    assert len(counts) > 10
    for message, _ in caught.up:
        for sequence in sequences(message):
            for split in labels:
                found = windows(sequence, len(split))
                assert not bool((found == split).all(1).any()), message.kind
            found = windows(sequence, 10)
            found = found / found.norm(dim=1, keepdim=True).clamp(min=1e-30)
            for shares in counts:
                assert not bool(((found - shares).abs().amax(1) < 1e-6).any()), message.kind


CHECKS = [check_fields, check_image_bytes, check_image_values, check_labels]


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_private_goes_up(caught: Caught, check: Callable[[Caught], None]) -> None:
    check(caught)


def features_of(caught: Caught) -> Iterator[tuple[str, Tensor]]:
    """Each device's private features as its memory has them: by token, [sample, token, channel]."""
    for path in sorted(caught.folder.glob("memory/*/5.safetensors")):
        memory = decode(path.read_bytes(), DeviceMemory)
        for name, tensor in memory.tensors.items():
            if name.startswith("features."):
                yield f"{path.parent.name}/{name}", tensor


def feature_rows_sent(caught: Caught) -> set[str]:
    """Which of the devices' feature rows stand in a message that went up, as '<device>/<which>[sample, token]'."""
    rows = {
        tensor[i, j].numpy().tobytes(): f"{name}[{i}, {j}]"
        for name, tensor in features_of(caught)
        for i in range(len(tensor))
        for j in range(tensor.shape[1])
    }
    assert len(rows) > 1000
    width = 16
    sent = set()
    for message, _ in caught.up:
        for sequence in sequences(message):
            for row in np.ascontiguousarray(windows(sequence, width).float().numpy()):
                if (found := rows.get(row.tobytes())) is not None:
                    sent.add(found)
    return sent


def test_features_go_up_only_as_the_sketch_says(caught: Caught) -> None:
    sent = feature_rows_sent(caught)
    if caught.refine.sketch == "sliced" or not caught.refine.shows_sketch:
        assert sent == set()
        return
    # [CLS] of some training samples: as many as the job allows, and nothing else.
    assert all("features.train.output[" in name and name.endswith(", 0]") for name in sent)
    for device in caught.data.devices:
        assert len([name for name in sent if name.startswith(f"{device}/")]) == caught.refine.sketch_samples


def test_what_the_notes_say(caught: Caught) -> None:
    """Free text is the easiest way out: only whole sentences that are known."""
    known = {"one training sample", "one class in its training data"}
    for message, _ in caught.up:
        if isinstance(message, FinishReply):
            assert set(message.report.notes) <= known


def test_cards_on_disk_hold_no_counts(caught: Caught) -> None:
    """A device's model leaves it too, when the user copies it: the card is looked at like a message."""
    for path in caught.folder.glob("devices/*/model.json"):
        shares = [torch.bincount(split, minlength=10).tolist() for split in caught.labels()]
        assert not any(row in shares for row in numbers(json.loads(path.read_text())))


# -- that the checks catch ---------------------------------------------------------------------------------------------


def with_tensor(name: str, value: Callable[[DeviceState], Tensor]) -> Callable[[DeviceState, Message], Message]:
    """A device that shows more than its sketch."""

    def leak(state: DeviceState, reply: Message) -> Message:
        if not isinstance(reply, CoarseReply):
            return reply
        return reply.model_copy(update={"tensors": reply.tensors | {name: value(state)}})

    return leak


def an_image_in_the_weights(state: DeviceState, reply: Message) -> Message:
    """The edge would not notice: all names and shapes are as they should be."""
    if not isinstance(reply, RoundReply):
        return reply
    weight = reply.tensors["header.classifier.last.weight"].clone()
    weight[3] = 1e-3 * state.data.train.inputs[0].flatten()
    return reply.model_copy(update={"tensors": reply.tensors | {"header.classifier.last.weight": weight}})


def counts_in_the_report(state: DeviceState, reply: Message) -> Message:
    if not isinstance(reply, FinishReply):
        return reply
    counts = torch.bincount(state.data.train.labels, minlength=10).tolist()
    sizes = {"num_train": counts[0]}  # the rest in the notes: a text is searched by nobody
    report = reply.report.model_copy(update={"notes": (json.dumps(counts),), **sizes})
    return reply.model_copy(update={"report": report})


def pixels(state: DeviceState) -> Tensor:
    return ((state.data.train.inputs[:] * 0.5 + 0.5) * 16).round()


LEAKS: dict[str, tuple[Callable[[DeviceState, Message], Message], Callable[[Caught], None]]] = {
    "inputs": (with_tensor("sketch.x", lambda s: s.data.train.inputs[:]), check_image_bytes),
    "one input": (with_tensor("sketch.x", lambda s: s.data.test.inputs[3]), check_image_values),
    "pixels as bytes": (with_tensor("sketch.x", lambda s: pixels(s).to(torch.uint8)), check_image_bytes),
    "in the weights": (an_image_in_the_weights, check_image_values),
    "scaled and shifted": (with_tensor("sketch.x", lambda s: 0.01 * pixels(s)[5] - 7), check_image_values),
    "by columns": (with_tensor("sketch.x", lambda s: s.data.validation.inputs[:].flatten(1).T), check_image_values),
    "as a part of a row": (
        with_tensor("sketch.x", lambda s: torch.cat([torch.rand(3), s.data.train.inputs[0].flatten(), torch.rand(9)])),
        check_image_values,
    ),
    "labels": (with_tensor("sketch.x", lambda s: s.data.train.labels), check_labels),
    "labels as floats": (with_tensor("sketch.x", lambda s: s.data.validation.labels.half()), check_labels),
    "counts": (
        with_tensor("sketch.x", lambda s: torch.bincount(s.data.train.labels, minlength=10)),
        check_labels,
    ),
    "shares": (
        with_tensor("sketch.x", lambda s: torch.bincount(s.data.train.labels, minlength=10) / len(s.data.train)),
        check_labels,
    ),
    "an unknown tensor": (with_tensor("extra.x", lambda s: torch.zeros(1)), check_fields),
    "features of every token": (
        with_tensor("sketch.x", lambda s: s.memory.tensors["features.train.output"][:, 1]),
        test_features_go_up_only_as_the_sketch_says,
    ),
    "notes": (counts_in_the_report, test_what_the_notes_say),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_leaks_is_caught(name: str, runs: dict[str, Caught]) -> None:
    """One device's replies as they would be if it leaked."""
    leak, check = LEAKS[name]
    run = copy.copy(runs["samples"])
    memory = decode((run.folder / "memory" / "large-2" / "5.safetensors").read_bytes(), DeviceMemory)
    attributes = next(m.attributes for m, _ in run.up if isinstance(m, AttributesReply))
    state = DeviceState(attributes, run.data.devices["large-2"], memory)
    run.up = [(leaky, encode(leaky)) for leaky in (leak(state, message) for message, _ in run.up)]
    with pytest.raises(AssertionError):
        check(run)


def test_a_device_that_leaks_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = handler.handle

    def leaking(state: DeviceState, message: Message) -> tuple[DeviceState, Message]:
        state, reply = real(state, message)
        return state, LEAKS["inputs"][0](state, reply) if state.attributes.device_id == "large-2" else reply

    monkeypatch.setattr(handler, "handle", leaking)
    run = Caught(folder / "leak", monkeypatch)
    for check in (check_image_bytes, check_image_values):
        with pytest.raises(AssertionError):
            check(run)
