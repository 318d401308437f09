"""Whether cut models are as fast as their operations say, and what elasticity costs: benchmarks/results/speed.md.

    python benchmarks/speed.py                  ViT-S at 224, on CPU, and on a GPU where there is one

Ratios of runs side by side: the two sides take turns, the median of each counts. Operations are counted with eager
attention, since PyTorch's counter does not see fused attention on a CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fleetfit.core.files import write_atomically
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.randomness import seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.header import build_header

RESULTS = Path(__file__).parent / "results"
VIT_S = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "initializer_range": 0.02,
}
HALF = BackboneShape(width=0.5, depth=6)
SANDWICH = (
    BackboneShape(width=1.0, depth=12),
    BackboneShape(width=0.25, depth=3),
    HALF,
    BackboneShape(width=0.75, depth=9),
)


def operations(module: torch.nn.Module, inputs: torch.Tensor) -> int:
    """Floating-point operations of a forward pass, attention included."""
    module.model.set_attn_implementation("eager")  # type: ignore[union-attr, operator]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(inputs)
    module.model.set_attn_implementation("sdpa")  # type: ignore[union-attr, operator]
    return counter.get_total_flops()


def side_by_side(sides: dict[str, Callable[[], None]], repeats: int, wait: Callable[[], None]) -> dict[str, float]:
    """Median seconds of each side; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(torch_device: torch.device, batch_size: int, repeats: int) -> dict[str, float]:
    """Both ratios on one kind of hardware."""
    with seeded_init(0, "benchmark"):
        backbone = Backbone("vit", VIT_S)
        header = build_header(HeaderSpec(), backbone.feature_shape, 10)
        inputs = torch.rand(batch_size, 3, 224, 224)
    labels = torch.arange(batch_size) % 10
    elastic = ElasticBackbone(backbone, "first")
    full, cut = backbone.eval(), elastic.extract(HALF).eval()
    share = operations(cut, inputs[:1]) / operations(full, inputs[:1])
    full, cut, header = full.to(torch_device), cut.to(torch_device), header.to(torch_device)
    inputs, labels = inputs.to(torch_device), labels.to(torch_device)
    elastic.backbone.to(torch_device)
    wait = torch.cuda.synchronize if torch_device.type == "cuda" else lambda: None

    def forward(module: Backbone) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                module(inputs)

        return run

    forwards = side_by_side({"full": forward(full), "cut": forward(cut)}, repeats, wait)

    plain = [Classifier(elastic.extract(shape), header).to(torch_device).train() for shape in SANDWICH]
    few, few_labels = inputs[: batch_size // 4], labels[: batch_size // 4]

    def plain_step() -> None:
        for model in plain:
            cross_entropy(model(few), few_labels).backward()  # type: ignore[no-untyped-call]

    def elastic_step() -> None:
        elastic.backbone.train()
        for shape in SANDWICH:
            cross_entropy(header(elastic.run(few, shape).features), few_labels).backward()  # type: ignore[no-untyped-call]

    steps = side_by_side({"plain": plain_step, "elastic": elastic_step}, repeats, wait)
    return {
        "operations": share,
        "time": forwards["cut"] / forwards["full"],
        "time_over_operations": forwards["cut"] / forwards["full"] / share,
        "elastic_over_plain": steps["elastic"] / steps["plain"],
        "full_seconds": forwards["full"],
        "plain_step_seconds": steps["plain"],
    }


def start_seconds(command: list[str], repeats: int) -> float:
    """Median seconds of a process."""

    def run() -> None:
        subprocess.run(command, check=True, capture_output=True)

    return side_by_side({"command": run}, repeats, lambda: None)["command"]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    program = str(Path(sys.executable).with_name("fleetfit"))
    rows = []
    found = {}
    for torch_device in dict.fromkeys([torch.device("cpu"), torch_device_of("auto")]):
        f = found[torch_device.type] = measure(torch_device, options.batch, options.repeats)
        rows += [
            (f"{torch_device.type}: time of (.5, half) over full, divided by the ratio of operations "
             f"({f['operations']:.3f}), batch of {options.batch}", "<= 1.15", f["time_over_operations"]),
            (f"{torch_device.type}: step of elastic training over the same shapes in plain Transformers", "<= 1.15",
             f["elastic_over_plain"]),
        ]  # fmt: skip
    bare = start_seconds([sys.executable, "-c", "pass"], options.repeats)
    rows += [
        ("seconds of `import fleetfit`, without Python's own", "<= 0.3",
         start_seconds([sys.executable, "-c", "import fleetfit"], options.repeats) - bare),
        ("seconds of `fleetfit --help`", "<= 0.5", start_seconds([program, "--help"], options.repeats)),
    ]  # fmt: skip
    lines = [
        "# Speed",
        "",
        f"`python benchmarks/speed.py --repeats {options.repeats} --batch {options.batch}`: ViT-S at 224, one thread, "
        f"PyTorch {torch.__version__}, {os.cpu_count()} CPU cores; medians, the sides of a ratio taking turns.",
        "",
        "| figure | target | measured | holds |",
        "|---|---|---|---|",
    ]
    for name, target, value in rows:
        holds = value <= float(target.removeprefix("<= "))
        lines.append(f"| {name} | {target} | {value:.2f} | {'yes' if holds else '**no**'} |")
    page = "\n".join(lines) + "\n"
    write_atomically(RESULTS / "speed.md", page)
    write_atomically(RESULTS / "speed.json", json.dumps(found, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
