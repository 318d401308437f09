"""Measure this machine and make a device profile of it: latency and, where it can be read, power of some (w, d).

Every shape is cut out of a model with random weights, physically smaller, and timed alone. The constants of Eqs. 1-2
are fitted to that (``method/energy.py``), and the fit is told beside the measurements.
"""

import os
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from fleetfit.config.profiles import SAMPLES_PER_EPOCH, Profile, profile_toml, read_profile, ready_profiles
from fleetfit.core.files import write_atomically
from fleetfit.core.progress import Progress, silent
from fleetfit.core.records import BackboneShape, Record
from fleetfit.device.power_meters import Clock, PowerMeter, find_meter
from fleetfit.device.profiled_models import make_inputs
from fleetfit.method.energy import LineFit, fit_line, split_power
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.families import family_of

MOST_REPEATS = 200
NUM_STEPS = 4  # of widths and of depths, where none are asked for


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        batch_size: Samples of one forward pass.
        repeats: Timed passes of each shape, at least; the median counts.
        warm_up: Passes of each shape before, which do not count.
        latency_seconds: Small models repeat more often, about as long as this: a median of a few milliseconds says
            what else ran on the machine just then.
        power_seconds: How long each shape runs while power is read.
        threads: CPU threads.
        torch_device: Hardware that runs the model, as PyTorch names it: cpu, cuda, cuda:1.
    """

    batch_size: int = 4
    repeats: int = 5
    warm_up: int = 2
    latency_seconds: float = 10.0
    power_seconds: float = 2.0
    threads: int = 1
    torch_device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.torch_device):
            raise ValueError(f"--torch-device must be cpu, cuda or cuda:<number>, got {self.torch_device!r}")


class Point(Record):
    """One shape as measured: the time of 1,000 samples, and the watts meanwhile."""

    shape: BackboneShape
    latency_seconds: float
    power_watts: float | None = None


class Profiling(Record):
    """A profile, what it was fitted to, and how well it fits.

    Attributes:
        profile: The constants of Eqs. 1-2, with their source.
        points: The measurements.
        latency: T = L + dL*w*d.
        power: P = (G + p*G_beta) + dG*w*d; None where power was not measured.
        power_note: Where the watts are from.
    """

    profile: Profile
    points: tuple[Point, ...]
    latency: LineFit
    power: LineFit | None
    power_note: str


# -- what to measure --------------------------------------------------------------------------------------------------


def choose_shapes(
    elastic: ElasticBackbone, widths: Sequence[float] = (), depths: Sequence[int] = ()
) -> tuple[BackboneShape, ...]:
    """All of widths x depths; where none are given, four of each, widths that are whole numbers of heads.

    Raises:
        ValueError: a width outside 0..1, a depth the model does not have, fewer than two different w*d.
    """
    wrong_width = [w for w in widths if not 0 < w <= 1]
    if wrong_width:
        raise ValueError(f"--widths must be > 0 and <= 1, got {wrong_width[0]:g}")
    wrong_depth = [d for d in depths if not 1 <= d <= elastic.num_layers]
    if wrong_depth:
        raise ValueError(f"--depths must be in 1..{elastic.num_layers}, the model's layers, got {wrong_depth[0]}")
    heads = elastic.num_heads
    chosen_widths = sorted(set(widths)) or [h / heads for h in _spread(heads)]
    chosen_depths = sorted(set(depths)) or _spread(elastic.num_layers)
    shapes = tuple(BackboneShape(width=w, depth=d) for w in chosen_widths for d in chosen_depths)
    if len({s.width * s.depth for s in shapes}) < 2:
        raise ValueError("--widths and --depths must give at least 2 different width x depth: one point makes no line")
    return shapes


def _spread(most: int) -> list[int]:
    """About four whole numbers, evenly up to the most."""
    return sorted({-(-most * step // NUM_STEPS) for step in range(1, NUM_STEPS + 1)})


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(
    elastic: ElasticBackbone,
    shapes: Sequence[BackboneShape],
    plan: Plan,
    meter: PowerMeter | None = None,
    clock: Clock | None = None,
    progress: Progress = silent,
) -> tuple[tuple[Point, ...], float | None]:
    """Time every shape, then read its power.

    Timed passes go round over all shapes, to and fro, so that a machine that gets warm or busy meanwhile does so for
    all of them alike. Power needs seconds of one and the same work, and is read shape by shape.

    Args:
        elastic: What the shapes are cut from; all are kept in memory at once.
        shapes: (w, d) to measure.
        plan: How often, with what.
        meter: Reads power; None: latency alone.
        clock: How time passes.
        progress: Told how far it is.

    Returns:
        (A point for each shape, watts at rest or None.)
    """
    clock = clock or Clock()
    torch_device = torch.device(plan.torch_device)
    inputs = make_inputs(elastic.backbone, plan.batch_size)
    with _threads(plan.threads), torch.inference_mode():
        progress("model", 0, 1, "cutting")
        models = [elastic.extract(shape).eval().to(torch_device) for shape in shapes]
        inputs = inputs.to(torch_device)
        progress("model", 1, 1, f"{len(models)} shapes")
        seconds = _time(models, inputs, plan, clock, progress)
        watts, idle_watts = _read_power(models, inputs, plan, meter, clock, progress) if meter else (None, None)
    points = tuple(
        Point(
            shape=shape,
            latency_seconds=statistics.median(seconds[i]) / plan.batch_size * SAMPLES_PER_EPOCH,
            power_watts=watts[i] if watts else None,
        )
        for i, shape in enumerate(shapes)
    )
    return points, idle_watts


def _time(
    models: Sequence[nn.Module], inputs: Tensor, plan: Plan, clock: Clock, progress: Progress
) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in models]
    rounds, number = plan.warm_up + plan.repeats, 0
    while number < rounds:
        round_since = clock.now()
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for i in order:
            since = clock.now()
            _forward(models[i], inputs)
            if number >= plan.warm_up:
                seconds[i].append(clock.now() - since)
        number += 1
        if number == plan.warm_up:
            more = plan.latency_seconds / max(clock.now() - round_since, 1e-9)
            rounds = plan.warm_up + max(plan.repeats, min(MOST_REPEATS, int(more)))
        progress("latency", number, rounds, f"round {number} of {rounds}")
    return seconds


def _read_power(
    models: Sequence[nn.Module],
    inputs: Tensor,
    plan: Plan,
    meter: PowerMeter,
    clock: Clock,
    progress: Progress,
) -> tuple[list[float], float]:
    progress("power", 0, len(models) + 1, "at rest")
    meter.start()
    try:
        clock.sleep(plan.power_seconds)
    finally:
        idle_watts = meter.stop()
    watts = []
    for i, model in enumerate(models):
        meter.start()
        try:
            until = clock.now() + plan.power_seconds
            while clock.now() < until:
                _forward(model, inputs)
        finally:
            watts.append(meter.stop())
        progress("power", i + 2, len(models) + 1, f"{watts[-1]:.1f} W")
    return watts, idle_watts


def _forward(model: nn.Module, inputs: Tensor) -> None:
    model(inputs)
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)  # a GPU works on when the call has returned


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the profile ------------------------------------------------------------------------------------------------------


def fit_profile(
    name: str,
    points: Sequence[Point],
    num_patches: int,
    idle_watts: float | None,
    given_watts: float | None,
    power_said: str,
    hardware: str,
    how: str,
) -> Profiling:
    """The constants of Eqs. 1-2 from measurements.

    Power is, in this order: what was measured; ``given_watts``, constant; else the paper's constants, which stand in.

    Args:
        name: Of the profile.
        points: The measurements.
        num_patches: p of the model.
        idle_watts: Power at rest, if it was read.
        given_watts: Power that a person says.
        power_said: What measured power, or why nothing did.
        hardware: What was measured.
        how: How it was measured, a sentence.
    """
    shapes = [p.shape for p in points]
    latency = fit_line(shapes, [p.latency_seconds for p in points])
    watts = [p.power_watts for p in points if p.power_watts is not None]
    power = None
    if len(watts) == len(points):
        power = fit_line(shapes, watts)
        base, per_patch = split_power(power.intercept, num_patches, idle_watts)
        constants = (base, power.slope, per_patch)
        note = f"measured, {power_said}"
    elif given_watts is not None:
        constants = (given_watts, 0.0, 0.0)
        note = f"not measured: {given_watts:g} W were given, constant"
    else:
        paper = ready_profiles()["paper"]
        constants = (paper.power_watts, paper.power_slope_watts, paper.patch_power_watts)
        note = f"not measured ({power_said}): the paper's constants stand in"
    fitted = f"R^2 of T {latency.r_squared:.3f}, worst error {latency.worst_error:.1%} over {len(points)} shapes."
    profile = Profile(
        name=name,
        hardware=hardware,
        source=f"Measured with fleetfit profile: {how} {fitted} Power {note}.",
        power_watts=_rounded(constants[0]),
        power_slope_watts=_rounded(constants[1]),
        patch_power_watts=_rounded(constants[2]),
        latency_seconds=_rounded(latency.intercept),
        latency_slope_seconds=_rounded(latency.slope),
    )
    return Profiling(profile=profile, points=tuple(points), latency=latency, power=power, power_note=note)


def _rounded(value: float) -> float:
    """Six digits: more than any measurement has."""
    return float(f"{value:.6g}")


def profile_machine(
    name: str,
    reference: Backbone,
    plan: Plan,
    widths: Sequence[float] = (),
    depths: Sequence[int] = (),
    given_watts: float | None = None,
    progress: Progress = silent,
) -> Profiling:
    """Measure this machine.

    Raises:
        ValueError: shapes that the model does not have, hardware that is not there, watts that are no power.
    """
    if given_watts is not None and not 0 < given_watts < float("inf"):
        raise ValueError(f"--watts must be finite and > 0, got {given_watts:g}")
    number = torch.cuda.device_count()
    if plan.torch_device != "cpu" and (torch.device(plan.torch_device).index or 0) >= number:
        raise ValueError(f"--torch-device {plan.torch_device} is not there: PyTorch sees {number} CUDA GPUs")
    elastic = ElasticBackbone(reference)
    shapes = choose_shapes(elastic, widths, depths)
    meter, said = (None, "watts were given") if given_watts is not None else find_meter(plan.torch_device)
    points, idle_watts = measure(elastic, shapes, plan, meter, progress=progress)
    rows, columns = reference.feature_shape.grid
    return fit_profile(
        name, points, rows * columns, idle_watts, given_watts, said, hardware_name(plan), _how(elastic, plan)
    )


def _how(elastic: ElasticBackbone, plan: Plan) -> str:
    rows, columns = elastic.backbone.feature_shape.grid
    is_text = family_of(elastic.backbone.family).kind == "text"
    parts = f"{columns + 1} tokens a text" if is_text else f"{rows * columns} patches"
    threads = f"{plan.threads} thread{'s' * (plan.threads > 1)}, " if plan.torch_device == "cpu" else ""
    return (
        f"{elastic.backbone.family} of {elastic.num_layers} layers, {elastic.hidden_size} channels, "
        f"{elastic.num_heads} heads, {parts}; forward passes of {plan.batch_size} samples in 32 bits, "
        f"{threads}median of {plan.repeats} or more; PyTorch {torch.__version__}; {date.today().isoformat()}."
    )


def hardware_name(plan: Plan) -> str:
    """What runs the model, as the machine calls it."""
    if plan.torch_device != "cpu":
        return torch.cuda.get_device_name(torch.device(plan.torch_device))
    return f"{_processor()}, {os.cpu_count()} cores, {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(filter(None, names), "") or platform.processor() or "CPU"


def check_target(path: Path) -> None:
    """Refuse to write over anything that is not a profile; asked before a minute of measuring is spent.

    Raises:
        ValueError: a file of that name is there and is no profile, or the name is not one of a profile.
    """
    if path.suffix != ".toml":
        raise ValueError(f"--out must end in .toml, or a job would take it for a ready profile's name; got {path}")
    if path.exists():
        try:
            read_profile(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"--out: {error}; it is not written over, choose another name") from None


def profile_name(path: Path) -> str:
    """A profile is called as its file is, in the letters that names may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-._") or "device"


def write_profile(profiling: Profiling, path: Path) -> None:
    """Write a profile that a job can name, with its measurements as comments.

    Raises:
        OSError: the folder cannot be written.
    """
    notes = ["A device profile, by fleetfit profile. In a job, under [[fleet.devices]]:"]
    notes += [f'profile = "{path}"', "", "width  depth  seconds of 1,000 samples: measured, fitted  watts: likewise"]
    for point in profiling.points:
        shape = point.shape
        line = f"{shape.width:5.3f}  {shape.depth:5d}  {point.latency_seconds:.5g}, {profiling.latency.at(shape):.5g}"
        if profiling.power is not None:
            line += f"  {point.power_watts:.4g}, {profiling.power.at(shape):.4g}"
        notes.append(line)
    write_atomically(path, profile_toml(profiling.profile, notes))
