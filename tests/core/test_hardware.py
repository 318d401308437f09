"""Every phase on an accelerator: here on one that is pretended, which knows what is where and counts what it waits for.

Where there is a GPU, the same job is also run on it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_accelerator import THERE, PretendedAccelerator, Remote
from torch import nn

import fleetfit
from fleetfit.cloud import candidates, pretrain
from fleetfit.cloud import elastic as cloud_elastic
from fleetfit.cloud import reference as reference_room
from fleetfit.cloud.reference import Reference, train_reference
from fleetfit.config.job import Job, make_job
from fleetfit.config.sections import RefineConfig
from fleetfit.core import hardware
from fleetfit.core.hardware import CPU, autocast, moved, torch_device_of
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec
from fleetfit.data import samples
from fleetfit.data.partition import Split
from fleetfit.data.preprocessing import Preprocessing
from fleetfit.data.samples import Inputs, Samples
from fleetfit.device.refinement import train_header
from fleetfit.edge import header as edge
from fleetfit.engines import local
from fleetfit.models.elastic import Backbone
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import build_header
from fleetfit.models.pruning import prunable_layers

torch.set_num_threads(1)


def fields(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A job of few steps, which passes through every phase."""
    base: dict[str, dict[str, Any]] = {
        "model": {
            "epochs": 2,
            "batch_size": 128,
            "config": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 8,
                "patch_size": 4,
            },
        },
        "fleet": {"devices": [{"count": 2, "cluster": "all", "storage_limit": "100 KB"}]},
        "backbone": {"widths": [0.5, 1.0], "steps": 4, "specialise_steps": 2, "importance_samples": 32},
        "header": {"budget_steps": 16, "views": 2},
        "refine": {"rounds": 2, "epochs": 1, "batch_size": 128},
        "run": {"cache": str(folder / "cache"), "torch_device": "cpu"},
    }
    return {key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}}


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedAccelerator]:
    for module in (candidates, cloud_elastic, reference_room, edge, local, pretrain):
        monkeypatch.setattr(module, "torch_device_of", lambda name: THERE)
    with PretendedAccelerator() as accelerator:
        yield accelerator


def test_the_pretended_accelerator_is_one() -> None:
    with PretendedAccelerator() as accelerator:
        model, inputs = nn.Linear(3, 2).to(THERE), torch.randn(4, 3)
        assert isinstance(model(inputs.to(THERE)), Remote)
        with pytest.raises(RuntimeError, match="tensors in two places"):
            model(inputs)
        assert not accelerator.waits.total()
        model.weight.sum().item()
        inputs.to(THERE)[torch.tensor([1])].cpu()
        assert accelerator.waits == {
            "aten::_local_scalar_dense": 1,
            "looked up by numbers of the CPU": 1,
            "fetched": 1,
        }


def near(found: Any, expected: Any, tolerance: float = 2e-3) -> bool:
    """Equal but for rounding, however it is nested."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(near(found[k], expected[k], tolerance) for k in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(near(a, b, tolerance) for a, b in zip(found, expected, strict=True))
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=tolerance, abs=tolerance))
    return bool(found == expected)


def finished_steps(folder: Path) -> dict[str, Any]:
    """What every step of a run found, without what it cost and where it was computed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {
            k: v for k, v in line.items() if k not in ("step", "seconds", "cpu_seconds", "bytes", "hardware")
        }
        for line in lines
    }


SECTIONS: list[dict[str, Any]] = [
    {"model": {"flip": True, "cutout_pixels": 2, "mixup": 0.2, "cutmix": 1.0, "ema": 0.9}},
    {
        "backbone": {"distillation": "paper", "importance": "second_order"},
        "header": {"search": "enas", "freeze_backbone": False, "max_blocks": 2},
        "refine": {"importance": "parameter", "sketch": "sliced", "fine_tune": True},
    },
]


@pytest.mark.parametrize("sections", SECTIONS)
def test_a_run_on_the_pretended_accelerator_is_the_run_on_the_cpu(
    tmp_path: Path, sections: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Every phase: nothing is in two places, and what is found is the same but for rounding."""
    fleetfit.run(fields(tmp_path / "one", **sections), tmp_path / "cpu")
    request.getfixturevalue("accelerator")
    fleetfit.run(fields(tmp_path / "other", **sections), tmp_path / "there")
    found, expected = finished_steps(tmp_path / "there"), finished_steps(tmp_path / "cpu")
    assert found.keys() == expected.keys()
    for step in ("attributes/all", "reference/cloud", "elastic/cloud", "candidates/cloud"):
        assert near(found[step], expected[step]), step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU with CUDA here")
@pytest.mark.parametrize("sections", SECTIONS)
def test_a_run_on_a_gpu_is_the_run_on_the_cpu(tmp_path: Path, sections: dict[str, Any]) -> None:
    for name in ("cpu", "cuda"):
        run = {"cache": str(tmp_path / name), "torch_device": name, "precision": "float32"}
        fleetfit.run(fields(tmp_path, **sections, run=run), tmp_path / f"on {name}")
    found, expected = finished_steps(tmp_path / "on cuda"), finished_steps(tmp_path / "on cpu")
    assert found.keys() == expected.keys()
    for step in ("attributes/all", "reference/cloud", "elastic/cloud", "candidates/cloud"):
        assert near(found[step], expected[step], 0.05), step


# -- waiting ----------------------------------------------------------------------------------------------------------


def quiet(done: int, total: int, note: str) -> None:
    """Say nothing."""


def make_public() -> Split:
    form = Preprocessing(size=(4, 4), channels=1, maximum=16, mean=(0.5,), std=(0.5,))

    def part(name: str, number: int) -> Samples:
        labels = torch.arange(number) % 3
        pixels = torch.randint(0, 14, (number, 1, 4, 4), generator=named_generator(0, name))
        pixels = (pixels + labels[:, None, None, None]).to(torch.uint8)
        return Samples(Inputs.of(pixels, form), labels, ("a", "b", "c"), 16)

    return Split(part("train", 32), part("validation", 16), part("test", 16))


def make(**sections: dict[str, Any]) -> Job:
    base: dict[str, dict[str, Any]] = {
        "model": {
            "epochs": 1,
            "batch_size": 16,
            "config": {
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 8,
                "image_size": 4,
                "patch_size": 2,
            },
        },
        "backbone": {"widths": [1.0, 0.5], "steps": 2, "specialise_steps": 2, "importance_samples": 16},
        "header": {"search": "cnn_add", "budget_steps": 2, "views": 2},
    }
    return make_job({key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}})


def waits_of(compute: Callable[[], Any]) -> Counter[str]:
    with PretendedAccelerator() as accelerator:
        compute()
    return accelerator.waits


@pytest.mark.parametrize("phase", ["reference", "elastic", "specialise", "header"])
def test_training_steps_do_not_wait(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty steps more are two looks at the losses more, and no other wait."""
    public = make_public()
    plain = train_reference(make(), public, quiet)
    elastic = cloud_elastic.make_elastic(make(), plain, public, quiet)
    shape = BackboneShape(width=0.5, depth=1)
    assignment = cloud_elastic.cut_and_specialise(make(), plain, elastic, public, "a", shape, quiet)
    edges = Split(public.validation, public.test, public.test)
    all_of_it = {"flip": True, "cutout_pixels": 2, "mixup": 0.2, "cutmix": 1.0, "ema": 0.9}
    phases: dict[str, Callable[[int], Any]] = {
        "reference": lambda steps: train_reference(make(model={**all_of_it, "epochs": steps // 2}), public, quiet),
        "elastic": lambda steps: cloud_elastic.make_elastic(make(backbone={"steps": steps}), plain, public, quiet),
        "specialise": lambda steps: cloud_elastic.cut_and_specialise(
            make(backbone={"specialise_steps": steps}), plain, elastic, public, "a", shape, quiet
        ),
        "header": lambda steps: edge.find_header(make(header={"budget_steps": steps}), assignment, edges, 10**6, quiet),
    }
    for module in (candidates, cloud_elastic, reference_room, edge):
        monkeypatch.setattr(module, "torch_device_of", lambda name: THERE)
    few, many = (waits_of(lambda steps=steps: phases[phase](steps)) for steps in (2, 42))  # type: ignore[misc]
    assert many - few == Counter(fetched=2)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_training_steps_on_texts_do_not_wait(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does padding change what comes out, although it is cut off on the CPU only."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if family == "distilbert":
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    positions = 12 if family == "roberta" else 10  # two of RoBERTa's are none
    config = {**sizes, "vocab_size": 30, "pad_token_id": 1, "max_position_embeddings": positions}

    def part(name: str, number: int) -> Samples:
        labels = torch.arange(number) % 3
        tokens = torch.randint(2, 30, (number, 10), generator=named_generator(0, name))
        tokens[:, 1], tokens[:, 9], tokens[::2, 6:] = labels + 20, 1, 1
        return Samples(Inputs.of(tokens), labels, ("a", "b", "c"), 20)

    public = Split(part("train", 32), part("validation", 16), part("test", 16))

    def train(steps: int) -> Reference:
        model = {"family": family, "config": config, "epochs": steps // 2, "batch_size": 16}
        return train_reference(make_job({"model": model}), public, quiet)

    at_home = train(4)
    monkeypatch.setattr(reference_room, "torch_device_of", lambda name: THERE)
    with PretendedAccelerator():
        assert near(train(4).curve, at_home.curve)
    few, many = (waits_of(lambda steps=steps: train(steps)) for steps in (2, 42))  # type: ignore[misc]
    assert many - few == Counter(fetched=2)


def test_a_devices_training_steps_do_not_wait() -> None:
    """Masks are put back after every step, and that without waiting too."""
    shape = FeatureShape(channels=8, grid=(2, 2))
    with seeded_init(0, "header"):
        header = build_header(HeaderSpec(kind="blocks", channels=4, hidden=4), shape, 3)
    tokens = torch.randn(20, 5, 8, generator=named_generator(0, "tokens"))
    kept = {name: torch.arange(layer.num_neurons) > 0 for name, layer in prunable_layers(header).items()}
    labels = torch.arange(20) % 3

    def train(epochs: int, importance: str) -> None:
        there = header.to(THERE)
        train_header(
            there,
            Features(tokens, tokens).to(THERE),
            labels.to(THERE),
            RefineConfig(epochs=epochs, batch_size=20, importance=importance),
            named_generator(0, "order"),
            "a device",
            anchor={n: p.detach().clone() for n, p in there.named_parameters()},
            kept={n: mask.to(THERE) for n, mask in kept.items()},
            offset=torch.zeros(3).to(THERE),
        )

    for importance in ("gate", "parameter"):
        few, many = (waits_of(lambda e=e, i=importance: train(e, i)) for e in (2, 42))  # type: ignore[misc]
        assert many - few == Counter(fetched=2)


# -- what is where ----------------------------------------------------------------------------------------------------


def test_samples_move_their_own_rows_once() -> None:
    form = Preprocessing(size=(2, 2), channels=1, maximum=16, mean=(0.5,), std=(0.5,))
    store = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    own = Samples(Inputs.of(store, form), torch.arange(10), tuple("0123456789"), 4).rows(torch.tensor([7, 2, 5]))
    assert own.to(CPU).inputs is own.inputs
    with PretendedAccelerator():
        there = own.to(THERE)
        assert there.inputs.store.shape == (3, 1, 2, 2)
        assert there.inputs.store.dtype == torch.uint8
        for rows in (torch.tensor([2, 0]), torch.tensor([2, 0]).to(THERE), slice(1, 3)):
            found, at_home = there.inputs[rows], own.inputs[rows.cpu() if isinstance(rows, torch.Tensor) else rows]
            assert found.device == THERE
            assert torch.equal(found.cpu(), at_home)
        assert there.rows(torch.tensor([1])).labels.tolist() == [2]
        assert there.inputs.only(torch.tensor([1])).shape == (1, 2, 2)


def test_samples_that_find_no_room_are_sent_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "fits_on", lambda torch_device, num_bytes: num_bytes <= 47)
    inputs = Inputs.of(torch.arange(12.0).view(3, 1, 2, 2))  # of 48 bytes
    with PretendedAccelerator() as accelerator:
        there = inputs.to(THERE)
        assert there.store is inputs.store
        found = there[torch.tensor([2, 0]).to(THERE)]
        assert found.device == THERE
        assert accelerator.waits == {"fetched": 1}
        assert torch.equal(found.cpu(), inputs[torch.tensor([2, 0])])
        assert inputs.only(torch.tensor([1])).to(THERE).store.device == THERE


def test_features_that_find_no_room_are_sent_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    public = make_public()
    backbone = Backbone("vit", dict(make().model.config)).eval()
    expected = edge.cached_features(backbone, public.train).features(torch.tensor([3, 1]))
    monkeypatch.setattr(edge, "fits_on", lambda torch_device, num_bytes: False)
    with PretendedAccelerator():
        cached = edge.cached_features(backbone.to(THERE), public.train.to(THERE))
        assert cached.cached.output.device == CPU
        found = cached.features(torch.tensor([3, 1]).to(THERE))
        assert found.output.device == THERE
        assert torch.allclose(found.output.cpu(), expected.output, atol=1e-5)


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device_of("auto") == torch_device_of("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert torch_device_of("auto") == torch_device_of("cuda") == torch.device("cuda", 1)
    assert torch_device_of("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_hardware_that_is_not_there_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    job = fields(tmp_path, run={"torch_device": name})
    says = f"run.torch_device = '{name}', but PyTorch .* finds none here.*; set it to 'auto' or 'cpu'"
    with pytest.raises(ValueError, match=says):
        fleetfit.run(job, tmp_path / "run")
    with pytest.raises(ValueError, match=says):
        pretrain.pretrain(make_job(job), tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_precision() -> None:
    x = torch.ones(2, 2)
    for asked, found in (("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(CPU, asked):
            assert (x @ x).dtype == found
    assert (x @ x).dtype == torch.float32


def test_a_reference_in_bfloat16_is_near_that_in_float32(tmp_path: Path) -> None:
    public = make_public()
    jobs = [make(run={"precision": precision}, model={"epochs": 3}) for precision in ("float32", "bfloat16")]
    exact, rough = (train_reference(job, public, quiet) for job in jobs)
    assert rough.curve != exact.curve
    assert near(rough.curve, exact.curve, 0.02)
    assert {t.dtype for t in rough.tensors.values()} == {torch.float32}


def test_the_hardware_has_a_name() -> None:
    assert hardware.hardware_words(CPU, 1).endswith("cpu, 1 thread")
    assert hardware.hardware_words(CPU, 2).endswith("cpu, 2 threads")
    assert moved(torch.ones(1), CPU).device == CPU
