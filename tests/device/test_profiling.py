"""Measuring a machine: what is timed and in which order, counters, the fit, the file. No test looks at real time."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from fleetfit.config.families import FAMILIES as FACTS
from fleetfit.config.job import make_job
from fleetfit.config.profiles import read_profile, ready_profiles
from fleetfit.core.records import BackboneShape
from fleetfit.device import power_meters, profiling
from fleetfit.device.power_meters import Clock, NvidiaMeter, RaplMeter, find_meter
from fleetfit.device.profiled_models import make_reference
from fleetfit.device.profiling import (
    Plan,
    Point,
    check_target,
    choose_shapes,
    fit_profile,
    measure,
    profile_machine,
    profile_name,
    write_profile,
)
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.families import FAMILIES

TINY = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 12}
TINY |= {"image_size": 4, "patch_size": 2, "num_channels": 1}
SHAPES = tuple(BackboneShape(width=w, depth=d) for w in (0.5, 1.0) for d in (1, 3))


@pytest.fixture(scope="module")
def tiny() -> ElasticBackbone:
    return ElasticBackbone(Backbone("vit", TINY))


@dataclass
class Machine:
    """A machine whose time passes only when a model runs or somebody sleeps; it is also its own meter."""

    seconds: Callable[["Machine", BackboneShape], float]
    watts: Callable[[BackboneShape], float] = lambda shape: 1.0
    idle_watts: float = 5.0
    time: float = 0.0
    joules: float = 0.0
    runs: list[BackboneShape] = field(default_factory=list)
    name: str = "a fake meter"

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.time, sleep=self.rest)

    def rest(self, seconds: float) -> None:
        self.time += seconds
        self.joules += seconds * self.idle_watts

    def run(self, model: nn.Module) -> None:
        assert isinstance(model, Backbone)
        assert not model.training
        shape = BackboneShape(width=model.config["intermediate_size"] / 12, depth=model.num_layers)
        seconds = self.seconds(self, shape)
        self.runs.append(shape)
        self.time += seconds
        self.joules += seconds * self.watts(shape)

    def start(self) -> None:
        self.since = self.time, self.joules

    def stop(self) -> float:
        return (self.joules - self.since[1]) / (self.time - self.since[0])


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(profiling, "_forward", lambda model, inputs: machine.run(model))
    return machine


def volume(shape: BackboneShape) -> float:
    return shape.width * shape.depth


# -- measuring --------------------------------------------------------------------------------------------------------


def test_what_is_timed_is_the_cut_model_on_a_batch_of_its_inputs(
    tiny: ElasticBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, tuple[int, ...], bool]] = []

    def forward(model: Any, inputs: torch.Tensor) -> None:
        model(inputs)
        parameters = sum(p.numel() for p in model.parameters())
        seen.append((model.num_layers, parameters, tuple(inputs.shape), torch.is_inference_mode_enabled()))

    monkeypatch.setattr(profiling, "_forward", forward)
    points, idle = measure(tiny, SHAPES, Plan(batch_size=3, repeats=1, warm_up=0))
    expected = [sum(p.numel() for p in tiny.extract(s).parameters()) for s in SHAPES]
    assert seen == [(s.depth, n, (3, 1, 4, 4), True) for s, n in zip(SHAPES, expected, strict=True)]
    assert len(set(expected)) == len(SHAPES)
    assert [p.shape for p in points] == list(SHAPES)
    assert all(p.latency_seconds > 0 and p.power_watts is None for p in points)
    assert idle is None


def test_latency_is_the_median_of_timed_passes_for_a_thousand_samples(
    tiny: ElasticBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(machine: Machine, shape: BackboneShape) -> float:
        number = machine.runs.count(shape)
        return (100, 100, 1, 50, 3)[number] * volume(shape)  # slow while warming up; one interruption

    machine = on(Machine(seconds), monkeypatch)
    points, _ = measure(tiny, SHAPES, Plan(batch_size=4, repeats=3, warm_up=2, latency_seconds=0), clock=machine.clock)
    assert [p.latency_seconds for p in points] == [pytest.approx(3 * volume(s) * 1000 / 4) for s in SHAPES]


def test_passes_go_round_so_that_a_steady_drift_hits_all_shapes_alike(
    tiny: ElasticBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = on(Machine(lambda m, shape: 1.0 + len(m.runs)), monkeypatch)
    points, _ = measure(tiny, SHAPES, Plan(batch_size=1, repeats=2, warm_up=2, latency_seconds=0), clock=machine.clock)
    assert machine.runs == [*SHAPES, *reversed(SHAPES)] * 2
    assert len({p.latency_seconds for p in points}) == 1


@pytest.mark.parametrize(("seconds", "repeats"), [(10.0, 3), (0.5, 5), (1e-6, profiling.MOST_REPEATS)])
def test_small_models_are_timed_more_often(
    tiny: ElasticBackbone, monkeypatch: pytest.MonkeyPatch, seconds: float, repeats: int
) -> None:
    machine = on(Machine(lambda m, s: seconds), monkeypatch)
    measure(tiny, SHAPES, Plan(repeats=3, warm_up=1, latency_seconds=10.0), clock=machine.clock)
    assert {machine.runs.count(s) for s in SHAPES} == {1 + repeats}


def test_power_is_read_shape_by_shape_and_at_rest(tiny: ElasticBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = on(Machine(lambda m, s: 0.3, lambda shape: 10 + 2 * volume(shape)), monkeypatch)
    plan = Plan(repeats=1, warm_up=0, power_seconds=2.0)
    points, idle = measure(tiny, SHAPES, plan, machine, machine.clock)
    assert [p.power_watts for p in points] == [pytest.approx(10 + 2 * volume(s)) for s in SHAPES]
    assert idle == pytest.approx(5.0)
    assert all(machine.runs.count(s) == 1 + 7 for s in SHAPES)  # 2 s of 0.3 s each


def test_threads_are_set_while_measuring_and_put_back(tiny: ElasticBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(profiling, "_forward", lambda model, inputs: seen.append(torch.get_num_threads()))
    measure(tiny, SHAPES[:2], Plan(repeats=1, warm_up=0, threads=before + 1))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_progress_of_each_phase_ends_at_its_total(tiny: ElasticBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, calls = on(Machine(lambda m, s: 1.0), monkeypatch), []
    plan = Plan(repeats=2, warm_up=1, latency_seconds=0)
    measure(
        tiny,
        SHAPES,
        plan,
        machine,
        machine.clock,
        lambda phase, done, total, note="": calls.append((phase, done, total)),
    )
    last = {phase: (done, total) for phase, done, total in calls}
    assert last == {"model": (1, 1), "latency": (3, 3), "power": (5, 5)}


# -- shapes and models ------------------------------------------------------------------------------------------------


def test_shapes_that_are_not_asked_for_are_whole_heads_up_to_all(tiny: ElasticBackbone) -> None:
    shapes = choose_shapes(tiny)
    assert sorted({round(s.width * 6, 9) for s in shapes}) == [2, 3, 5, 6]
    assert sorted({s.depth for s in shapes}) == [1, 2, 3]
    assert len(shapes) == 12
    assert choose_shapes(tiny, [1, 0.5, 1], [3]) == (SHAPES[1], SHAPES[3])


@pytest.mark.parametrize(
    ("widths", "depths", "message"),
    [
        ((0.5, 1.5), (), "--widths must be > 0 and <= 1, got 1.5"),
        ((0,), (), "--widths must be > 0 and <= 1, got 0"),
        ((float("nan"),), (), "--widths must be > 0 and <= 1, got nan"),
        ((), (4,), "--depths must be in 1..3, the model's layers, got 4"),
        ((0.5,), (2,), "must give at least 2 different width x depth"),
    ],
)
def test_shapes_that_the_model_does_not_have(
    tiny: ElasticBackbone, widths: tuple[float, ...], depths: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_shapes(tiny, widths, depths)


def test_the_model_is_the_jobs_or_the_familys() -> None:
    job = make_job({"model": {"family": "dinov2", "config": {"hidden_size": 32, "num_hidden_layers": 2}}})
    reference = make_reference(job.model)
    assert (reference.family, reference.num_layers, reference.config["hidden_size"]) == ("dinov2", 2, 32)
    with pytest.raises(ValueError, match=f"--family must be one of {', '.join(FAMILIES)}, got 'swin'"):
        make_reference(None, "swin")


@pytest.mark.parametrize(
    ("family", "sizes", "shape"),
    [
        *((family, (12, 6, 384, 1536), (3, 224, 224)) for family in ("vit", "deit", "dinov2")),
        ("bert", (4, 8, 512, 2048), (128,)),
        ("roberta", (6, 12, 768, 3072), (128,)),
        ("distilbert", (6, 12, 768, 3072), (128,)),
    ],
)
def test_every_family_has_a_small_model(family: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert {n: f.kind for n, f in FACTS.items()} == {n: f.kind for n, f in FAMILIES.items()}
    with torch.device("meta"):
        model = make_reference(None, family)
        elastic = ElasticBackbone(model)
    assert (elastic.num_layers, elastic.num_heads, elastic.hidden_size, elastic.num_neurons) == sizes
    assert model.input_shape == shape


# -- texts ------------------------------------------------------------------------------------------------------------

BERT = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 12}
TEXTS: dict[str, tuple[dict[str, int], int]] = {  # and how many texts' tokens there are positions for
    "bert": ({**BERT, "vocab_size": 40, "max_position_embeddings": 20}, 20),
    "roberta": ({**BERT, "vocab_size": 40, "max_position_embeddings": 20, "pad_token_id": 1}, 18),
    "distilbert": (
        {"dim": 12, "n_layers": 3, "n_heads": 6, "hidden_dim": 12, "vocab_size": 40, "max_position_embeddings": 200},
        128,
    ),
}


@pytest.mark.parametrize("start", ["config", "pretrained"])
@pytest.mark.parametrize("family", TEXTS)
def test_texts_are_measured_at_the_jobs_length_without_data_or_weights(
    family: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, most = TEXTS[family]
    fields: dict[str, Any] = {"family": family, "config": config}
    if start == "pretrained":  # a config.json alone
        CONFIG_MAPPING[family](**config).save_pretrained(tmp_path)
        fields = {"family": family, "pretrained": str(tmp_path)}
    seen: list[tuple[int, torch.Tensor]] = []

    def forward(model: Any, inputs: torch.Tensor) -> None:
        assert bool(model.run(inputs).mask.all()), "padding would not be computed"
        seen.append((model.num_layers, inputs))

    monkeypatch.setattr(profiling, "_forward", forward)
    for asked, length in ((None, most), (7, 7)):
        model = make_job({"model": fields}).model
        reference = make_reference(model, max_tokens=asked)
        seen.clear()
        plan = Plan(batch_size=3, repeats=1, warm_up=0, latency_seconds=0)
        found = profile_machine("here", reference, plan, given_watts=5.0)
        assert {tuple(inputs.shape) for _, inputs in seen} == {(3, length)}
        assert {layers for layers, _ in seen} == {1, 2, 3}
        assert f"{family} of 3 layers, 12 channels, 6 heads, {length} tokens a text; forward" in found.profile.source
    with pytest.raises(ValueError, match=rf"data\.max_tokens must be <= the {most if most < 128 else 200} positions"):
        make_reference(make_job({"model": fields}).model, max_tokens=300)


def test_what_is_wrong_with_a_pretrained_model_names_it(tmp_path: Path) -> None:
    CONFIG_MAPPING["bert"](**TEXTS["bert"][0] | {"is_decoder": True}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^model\.pretrained = .*is_decoder must be false"):
        make_reference(make_job({"model": {"family": "bert", "pretrained": str(tmp_path)}}).model)


@pytest.mark.parametrize("name", ["batch_size", "repeats", "threads"])
def test_a_plan_needs_at_least_one_of_each(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        Plan(**{name: 0})


def test_hardware_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--torch-device must be cpu, cuda or cuda:<number>, got 'tpu'"):
        Plan(torch_device="tpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--torch-device cuda:1 is not there: PyTorch sees 1 CUDA GPUs"):
        profile_machine("x", Backbone("vit", TINY), Plan(torch_device="cuda:1"))
    for watts in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="--watts must be finite and > 0, got"):
            profile_machine("x", Backbone("vit", TINY), Plan(), given_watts=watts)


# -- counters ---------------------------------------------------------------------------------------------------------


def zone(folder: Path, place: str, name: str, microjoules: int, most: int = 10**9) -> Path:
    path = folder / place
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path


def test_rapl_adds_packages_and_nothing_twice(tmp_path: Path) -> None:
    packages = [zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", 0) for i in (0, 1)]
    others = [zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:2", "psys", 0)]
    others.append(zone(tmp_path, "intel-rapl-mmio:0", "package-0", 0))
    times = iter([10.0, 14.0])
    meter = RaplMeter(tmp_path, Clock(now=lambda: next(times)))
    meter.start()
    for path, joules in zip([*packages, *others], [8, 12, 100, 100, 100], strict=True):
        (path / "energy_uj").write_text(str(joules * 10**6))
    assert meter.stop() == pytest.approx((8 + 12) / 4)


def test_a_counter_that_began_anew_counts_on(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 90 * 10**6, most=100 * 10**6)
    times = iter([0.0, 2.0])
    meter = RaplMeter(tmp_path, Clock(now=lambda: next(times)))
    meter.start()
    (path / "energy_uj").write_text(str(6 * 10**6))
    assert meter.stop() == pytest.approx(16 / 2)


def test_why_there_is_no_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_meter("cpu", tmp_path) == (None, f"no energy counter in {tmp_path}")
    assert find_meter("cpu", tmp_path / "not there")[0] is None
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter, said = find_meter("cpu", tmp_path)
    assert isinstance(meter, RaplMeter)
    assert said == meter.name

    def refuse(self: RaplMeter) -> list[int]:
        raise PermissionError(13, "Permission denied", str(path / "energy_uj"))

    monkeypatch.setattr(RaplMeter, "_read", refuse)  # root may read everything, so a file's mode tests nothing
    assert find_meter("cpu", tmp_path) == (None, f"{path / 'energy_uj'} may be read by root only")
    monkeypatch.setattr(power_meters, "_gpu_id", lambda torch_device: "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_meter("cuda", tmp_path) == (None, "there is no nvidia-smi")


def test_nvidia_smi_is_listened_to_and_its_late_figures_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    lines = "\\n".join(["10.00", "[N/A]", "20.00", "100.0", " 110"])
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nprintf "{lines}\\n"\ntouch {tmp_path}/told\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    meter = NvidiaMeter("GPU-1234")
    meter.start()
    while not (tmp_path / "told").exists():
        assert meter._process.poll() in (None, 0)
    assert meter.stop() == pytest.approx(105.0)
    assert "--query-gpu=power.draw" in (tmp_path / "arguments").read_text()
    assert "--id=GPU-1234" in (tmp_path / "arguments").read_text()
    program.write_text("#!/bin/sh\necho '[N/A]'\n")
    meter.start()
    meter._process.wait()
    with pytest.raises(ValueError, match=r"tells no power\.draw"):
        meter.stop()


# -- the profile ------------------------------------------------------------------------------------------------------


def made(points: list[Point], **more: Any) -> profiling.Profiling:
    options = {"idle_watts": None, "given_watts": None, "power_said": "no counter", "hardware": "h", "how": "How."}
    return fit_profile("here", points, 16, **(options | more))


def points(watts: Callable[[float], float] | None) -> list[Point]:
    return [
        Point(shape=s, latency_seconds=3 + 2 * volume(s), power_watts=watts(volume(s)) if watts else None)
        for s in SHAPES
    ]


def test_measured_power_is_fitted_and_split_by_power_at_rest() -> None:
    found = made(points(lambda v: 20 + 4 * v), idle_watts=12.0, power_said="a meter")
    assert found.profile.energy.model_dump() == pytest.approx(
        {
            "power_watts": 12,
            "power_slope_watts": 4,
            "patch_power_watts": 8 / 16,
            "latency_seconds": 3,
            "latency_slope_seconds": 2,
        }
    )
    assert found.power is not None
    assert found.power.r_squared == pytest.approx(1)
    assert found.profile.source == (
        "Measured with fleetfit profile: How. R^2 of T 1.000, worst error 0.0% over 4 shapes. Power measured, a meter."
    )


def test_given_power_is_constant() -> None:
    found = made(points(None), given_watts=7.5)
    energy = found.profile.energy
    assert (energy.power_watts, energy.power_slope_watts, energy.patch_power_watts) == (7.5, 0, 0)
    assert found.power is None
    assert "Power not measured: 7.5 W were given, constant." in found.profile.source


def test_without_any_power_the_papers_constants_stand_in_and_it_is_said() -> None:
    found = made(points(None))
    energy, paper = found.profile.energy, ready_profiles()["paper"]
    assert (energy.power_watts, energy.power_slope_watts) == (paper.power_watts, paper.power_slope_watts)
    assert energy.patch_power_watts == paper.patch_power_watts
    assert energy.latency_seconds == pytest.approx(3)
    assert found.power_note == "not measured (no counter): the paper's constants stand in"
    assert found.power_note in found.profile.source


def test_a_bad_fit_is_told_as_it_is() -> None:
    depths_only = [Point(shape=s, latency_seconds=float(s.depth)) for s in SHAPES]  # width does not help at all
    found = made(depths_only)
    assert found.latency.r_squared < 0.9
    assert found.latency.worst_error > 0.2
    assert f"R^2 of T {found.latency.r_squared:.3f}" in found.profile.source


def test_the_whole_machine_into_a_file_that_a_job_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = on(Machine(lambda m, s: 0.1 + 0.2 * volume(s), lambda s: 10 + 3 * volume(s)), monkeypatch)
    monkeypatch.setattr(profiling, "Clock", lambda: machine.clock)
    monkeypatch.setattr(profiling, "find_meter", lambda torch_device: (machine, machine.name))
    path = tmp_path / "boards" / "kitchen.toml"
    found = profile_machine(profile_name(path), Backbone("vit", TINY), Plan(batch_size=2))
    write_profile(found, path)
    assert read_profile(path) == found.profile
    energy = found.profile.energy
    assert (energy.latency_seconds, energy.latency_slope_seconds) == (pytest.approx(50), pytest.approx(100))
    assert (energy.power_watts, energy.power_slope_watts) == (pytest.approx(5), pytest.approx(3))
    assert energy.patch_power_watts == pytest.approx(5 / 4)  # 2 x 2 patches
    text = path.read_text()
    assert "# 0.333      1  83.333, 83.333  11, 11" in text
    assert "3 layers, 12 channels, 6 heads, 4 patches; forward passes of 2 samples" in found.profile.source
    job = make_job({"fleet": {"devices": [{"storage_limit": 5, "profile": str(path)}]}})
    assert job.fleet.devices[0].profile == (found.profile,)


def test_given_watts_need_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(torch_device: str) -> Any:
        raise AssertionError("looked for a meter")

    monkeypatch.setattr(profiling, "find_meter", none)
    machine = on(Machine(lambda m, s: volume(s)), monkeypatch)
    monkeypatch.setattr(profiling, "Clock", lambda: machine.clock)
    found = profile_machine("x", Backbone("vit", TINY), Plan(), given_watts=4.0)
    assert found.profile.power_watts == 4.0


def test_only_a_profile_is_written_over(tmp_path: Path) -> None:
    check_target(tmp_path / "new.toml")
    job = tmp_path / "job.toml"
    job.write_text("seed = 1\n")
    with pytest.raises(ValueError, match=r"--out: .*job\.toml is no device profile: .*; it is not written over"):
        check_target(job)
    write_profile(made(points(None)), tmp_path / "old.toml")
    check_target(tmp_path / "old.toml")
    with pytest.raises(ValueError, match=r"--out must end in \.toml"):
        check_target(tmp_path / "raspberry-pi-5")


@pytest.mark.parametrize(
    ("file", "name"), [("a/my board.toml", "my-board"), ("pi-5.v2.toml", "pi-5.v2"), ("ü.toml", "device")]
)
def test_a_profile_is_named_after_its_file(file: str, name: str) -> None:
    assert profile_name(Path(file)) == name
