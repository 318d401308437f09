"""Limits of memory and latency beside storage: computed, measured, and kept by what is chosen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_job import tiny_fields
from torch import nn

import fleetfit
from fleetfit.cloud import candidates
from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import make_job
from fleetfit.config.profiles import ready_profiles, vit_operations
from fleetfit.core.encoding import decode, encode
from fleetfit.core.records import BackboneShape
from fleetfit.core.units import parse_seconds
from fleetfit.data.sources import load_samples
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesReply
from fleetfit.edge.messages import ClusterStats
from fleetfit.models.elastic import Backbone
from fleetfit.models.memory import peak_bytes
from fleetfit.runs.plan import make_plan


@pytest.mark.parametrize("inplace", [True, False])
def test_memory_by_hand(inplace: bool) -> None:
    net = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(inplace=inplace), nn.Linear(1000, 10))
    one = torch.zeros(1, 10)
    both = 4 * 1000 + (4 * 10 if inplace else 4 * 1000)  # two layers' outputs live at a time
    assert peak_bytes(lambda: net(one)) == both


def test_views_and_weights_are_no_more_memory() -> None:
    weight = torch.ones(100, 100)
    assert peak_bytes(lambda: weight.t().reshape(50, 200)[:3].view(-1)) <= 4 * 100 * 100
    assert peak_bytes(lambda: weight[:10].unsqueeze(0)) == 0


def job_of(tmp_path: Path, **limits: Any) -> Any:
    devices = [{"count": 2, "cluster": "a", "storage_limit": "1 MB", "profile": "raspberry-pi-4", **limits}]
    return make_job(tiny_fields(tmp_path / "cache", fleet={"devices": devices}))


def test_memory_of_a_shape_is_what_a_model_of_that_shape_takes(tmp_path: Path) -> None:
    """Measured by PyTorch's profiler on a cut model of its own; the computed one runs views of the whole."""
    job = job_of(tmp_path, memory_limit="1 MB")
    samples = load_samples(job)
    for sized in candidates.sized_shapes(job, samples):
        config = dict(job.model.config) | {
            "num_hidden_layers": sized.shape.depth,
            "num_attention_heads": max(1, round(sized.shape.width * 2)),
            "intermediate_size": max(1, round(sized.shape.width * 32)),
            "head_dim": 8,
        }
        model = Backbone("vit", config).eval()
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            model(torch.zeros(1, 1, 8, 8))
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        activations = sized.memory_bytes - sized.size_bytes
        assert 0.85 * peak <= activations <= 1.6 * peak  # the header's are in it, too
        assert sized.memory_bytes == pytest.approx(sized.size_bytes + peak, rel=0.15)


@given(st.floats(0.01, 1.0), st.integers(1, 12))
def test_time_of_a_derived_profile_is_its_own_for_its_own_model(width: float, depth: int) -> None:
    profile = ready_profiles()["raspberry-pi-5"]
    embedding, layer = vit_operations(768, 3072, 196, 3 * 16 * 16, 1)
    assert profile.seconds_per_operation is not None
    derived = profile.seconds_per_operation * (embedding + width * depth * layer)
    own = (profile.latency_seconds + profile.latency_slope_seconds * width * depth) / 1000
    assert derived == pytest.approx(own, rel=1e-3)


def test_time_of_another_model_goes_by_its_operations(tmp_path: Path) -> None:
    job = job_of(tmp_path, latency_limit="1 s")
    (device, _), sized = fleet_of(job)["a"], candidates.sized_shapes(job, load_samples(job))
    whole = next(s for s in sized if s.shape == BackboneShape(width=1.0, depth=2))
    # 4 patches and [CLS], 16 channels, 32 neurons, 2 layers; a multiplication and an addition are two.
    by_hand = 2 * 4 * 16 * 16 + 2 * (2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 25 * 16)
    assert whole.operations == by_hand
    profile = ready_profiles()["raspberry-pi-4"]
    assert candidates.latency_seconds(device, whole) == pytest.approx(by_hand * profile.seconds_per_operation)


def test_a_measured_profile_is_taken_as_it_is() -> None:
    table = {"name": "mine", "hardware": "board", "source": "measured", "power_watts": 5.0, "power_slope_watts": 0.0}
    table |= {"patch_power_watts": 0.0, "latency_seconds": 2.0, "latency_slope_seconds": 3.0}
    devices = [{"storage_limit": "1 MB", "profile": table, "latency_limit": "50 ms"}]
    ((device,),) = fleet_of(make_job({"fleet": {"devices": devices}})).values()
    assert device.latency is not None
    assert (device.latency.seconds, device.latency.seconds_per_operation) == (0.05, None)
    sized = candidates.sized_shapes(make_job({}), load_samples(make_job({})))[0]
    volume = sized.shape.width * sized.shape.depth
    assert candidates.latency_seconds(device, sized) == pytest.approx((2.0 + 3.0 * volume) / 1000)


@pytest.mark.parametrize("limit", ["memory_limit", "latency_limit"])
def test_only_shapes_that_keep_it_are_chosen_and_planned(tmp_path: Path, limit: str) -> None:
    free = job_of(tmp_path, memory_limit="1 GB", latency_limit="9 s")
    device = fleet_of(free)["a"][0]
    sized = sorted(candidates.sized_shapes(free, load_samples(free)), key=lambda s: s.size_bytes)
    value = sized[0].memory_bytes if limit == "memory_limit" else candidates.latency_seconds(device, sized[0])
    job = job_of(tmp_path, **{limit: value})
    (cluster,) = make_plan(job, estimate=False).clusters
    assert [s.shape for s in cluster.shapes] == [sized[0].shape]
    fleetfit.run(job, tmp_path / "run")
    (chosen,) = json.loads((tmp_path / "run" / "summary.json").read_text())["clusters"]
    assert (chosen["width"], chosen["depth"]) == (sized[0].shape.width, sized[0].shape.depth)
    nothing = make_plan(
        job_of(tmp_path, **{limit: value / 2 if limit == "latency_limit" else value // 2}), estimate=False
    )
    assert nothing.problems
    assert limit.replace("_", " ") in " ".join(nothing.problems)


def test_what_is_wrong_with_them() -> None:
    for limits, told in (
        ({"latency_limit": "50 ms"}, "profile must be given with latency_limit"),
        ({"latency_limit": "fast", "profile": "jetson-nano"}, "must be seconds, as 0.05 or '50 ms', got 'fast'"),
        ({"memory_limit": "big"}, "must be bytes"),
        ({"memory_limit": 0}, "must be > 0"),
    ):
        with pytest.raises(ValueError, match=r"fleet\.devices") as error:
            make_job({"fleet": {"devices": [{"storage_limit": 5, **limits}]}})
        assert told in str(error.value)


@pytest.mark.parametrize(("text", "seconds"), [("50 ms", 0.05), ("50ms", 0.05), ("0.2 s", 0.2), ("3", 3.0)])
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


def test_limits_that_are_not_given_take_no_room_in_a_message(tmp_path: Path) -> None:
    without = fleet_of(job_of(tmp_path))["a"][0]
    given = fleet_of(job_of(tmp_path, memory_limit="1 MB", latency_limit="1 s"))["a"][0]
    assert b"memory" not in encode(AttributesReply(attributes=without, step=0))
    for attributes in (without, given):
        blob = encode(AttributesReply(attributes=attributes, step=0))
        assert decode(blob, AttributesReply).attributes == attributes
        stats = ClusterStats(devices=(attributes,))
        assert decode(encode(stats), ClusterStats) == stats
    assert DeviceMemory()  # and devices need not know of it
