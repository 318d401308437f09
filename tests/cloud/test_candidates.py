"""The cloud: the reference, sizes that are those of files, the choice against brute force, and clusters."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.cloud import run as cloud_run
from fleetfit.cloud.candidates import Candidates, evaluate_candidates, match
from fleetfit.cloud.clusters import form_clusters
from fleetfit.cloud.elastic import Elastic, cut_and_specialise, elastic_of, make_elastic
from fleetfit.cloud.reference import ProgressOf, Reference, classifier_of, shape_grid, train_reference
from fleetfit.config.job import Job, make_job
from fleetfit.core.checkpoints import Bookmark, Ledger, StepFolder
from fleetfit.core.encoding import Message, take
from fleetfit.core.progress import silent
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import BackboneShape, Candidate, DeviceAttributes, EnergyModel, HeaderSpec
from fleetfit.data.partition import Split
from fleetfit.data.samples import Inputs, Samples
from fleetfit.edge.messages import BackboneAssignment, ClusterReport, ClusterStats, StatsRequest
from fleetfit.models.classifier import Classifier, num_parameters
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import header_from_state

torch.set_num_threads(1)

FIELDS = {
    "model": {
        "epochs": 2,
        "config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "image_size": 4,
            "patch_size": 2,
            "num_channels": 1,
        },
    },
    "backbone": {"widths": [1.0, 0.5], "steps": 3, "specialise_steps": 2, "importance_samples": 16},
}


def make(**sections: dict) -> Job:
    fields = {**FIELDS, **{k: {**FIELDS.get(k, {}), **v} for k, v in sections.items() if isinstance(v, dict)}}
    fields |= {k: v for k, v in sections.items() if not isinstance(v, dict)}
    return make_job(fields)


def make_public() -> Split:
    def part(name: str, number: int) -> Samples:
        generator = named_generator(0, "public", name)
        labels = torch.arange(number) % 3
        inputs = torch.randn(number, 1, 4, 4, generator=generator) + labels[:, None, None, None]
        return Samples(Inputs.of(inputs), labels, ("a", "b", "c"), 16)

    return Split(part("train", 48), part("validation", 24), part("test", 24))


def quiet(done: int, total: int, note: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Trained:
    job: Job
    public: Split
    reference: Reference
    elastic: Elastic
    candidates: Candidates


@pytest.fixture(scope="module")
def trained() -> Trained:
    job, public = make(), make_public()
    reference = train_reference(job, public, quiet)
    elastic = make_elastic(job, reference, public, quiet)
    return Trained(job, public, reference, elastic, evaluate_candidates(job, elastic, public, quiet))


# -- reference and elastic backbone -----------------------------------------------------------------------------------


def test_the_reference_is_what_its_scores_say(trained: Trained) -> None:
    model = classifier_of(trained.job, trained.reference, 3).eval()
    with torch.no_grad():
        for part, accuracy in (
            (trained.public.validation, trained.reference.validation_accuracy),
            (trained.public.test, trained.reference.accuracy),
        ):
            right = (model(part.inputs[:]).argmax(1) == part.labels).float().mean()
            assert accuracy == pytest.approx(float(right))
        validation = trained.public.validation
        loss = torch.nn.functional.cross_entropy(model(validation.inputs[:]), validation.labels)
    assert trained.reference.validation_loss == pytest.approx(float(loss), rel=1e-5)
    assert trained.reference.parameters == num_parameters(model)
    assert len(trained.reference.curve) == 2 * 2  # 48 samples in batches of 32, 2 epochs


def same(one: Message, other: Message) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(t, other.tensors[n]) for n, t in one.tensors.items()
    )


def test_the_seed_decides_the_reference_and_the_elastic_backbone(trained: Trained) -> None:
    torch.rand(3)
    again = train_reference(trained.job, trained.public, quiet)
    assert again == trained.reference.model_copy(update={"tensors": again.tensors})
    assert same(again, trained.reference)
    assert not same(train_reference(make(seed=1), trained.public, quiet), trained.reference)
    assert same(make_elastic(trained.job, trained.reference, trained.public, quiet), trained.elastic)


class Edges:
    """A link to two clusters, which stops before any edge's work."""

    members = ("a", "b")

    def ask(self, messages, bounds=None):
        if all(isinstance(m, StatsRequest) for m in messages.values()):
            one = make_device(10**6)
            return {c: ClusterStats(devices=(one.model_copy(update={"device_id": f"{c}-1"}),)) for c in messages}
        assert all(isinstance(m, BackboneAssignment) for m in messages.values())
        return {
            c: ClusterReport(
                cluster=c,
                header=m.header,
                trials=(),
                similarity=(),
                distance=(),
                rounds=(),
                decision={},
                devices=(),
            )
            for c, m in messages.items()
        }


def test_a_reference_in_the_cache_is_not_trained_again(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(job: Job, public: Split, progress: ProgressOf, bookmark: Bookmark) -> Reference:
        calls.append(job.seed)
        return train_reference(job, public, progress, bookmark)

    monkeypatch.setattr(cloud_run, "train_reference", counted)

    def run(out: str, job: Job = trained.job) -> cloud_run.FleetResult:
        steps, cache = StepFolder(tmp_path / out, Ledger()), StepFolder(tmp_path / "cache", Ledger())
        return cloud_run.run_cloud(job, trained.public, Edges(), steps, cache, silent)

    first, second = run("one"), run("two")
    assert calls == [0]
    assert same(second.reference, first.reference)
    assert same(second.reference, trained.reference)
    assert same(second.elastic, trained.elastic)
    # What the reference does not depend on finds it too; what it depends on does not.
    run("three", make(backbone={"gamma_p": 0.3}, data={"split": "iid"}))
    assert calls == [0]
    run("four", make(seed=7))
    run("five", make(model={**FIELDS["model"], "epochs": 1}))
    assert calls == [0, 7, 0]
    # The channels are its own header's too.
    run("six", make(header={"channels": 3}))
    assert calls == [0, 7, 0, 0]


def test_the_grid_of_shapes_is_every_width_at_every_depth() -> None:
    def shapes(**backbone: object) -> list[tuple[float, int]]:
        return [(s.width, s.depth) for s in shape_grid(make(backbone=backbone), num_layers=2)]

    assert shapes() == [(0.5, 1), (0.5, 2), (1.0, 1), (1.0, 2)]
    assert shapes(widths=[0.5, 0.25, 0.5], depths=[2, 2]) == [(0.25, 2), (0.5, 2)]


@pytest.mark.parametrize("importance", ["taylor", "exact", "random"])
@pytest.mark.parametrize("order", ["first", "spread", "auto"])
def test_an_elastic_backbone_says_how_it_was_made(trained: Trained, importance: str, order: str) -> None:
    job = make(backbone={"importance": importance, "depth_order": order, "steps": 1})
    made = make_elastic(job, trained.reference, trained.public, quiet)
    assert made.depth_order in ("first", "spread")
    assert order == "auto" or made.depth_order == order
    assert [len(h) for h in made.head_importance] == [2, 2]
    assert len(made.neuron_importance_mean) == 2
    assert min(i for layer in made.head_importance for i in layer) >= 0


# -- candidates -------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_files_that_safetensors_writes(trained: Trained, tmp_path: Path) -> None:
    elastic, full = elastic_of(trained.job, trained.elastic, 3)
    found = trained.candidates.candidates
    assert [c.shape for c in found] == list(shape_grid(trained.job, num_layers=2))
    for candidate in found:
        model = Classifier(elastic.extract(candidate.shape), full.header)
        path = tmp_path / "model.safetensors"
        safetensors.torch.save_file(model.state_dict(), path, metadata={"format": "pt"})
        assert candidate.size_bytes == path.stat().st_size
        assert candidate.parameters == num_parameters(model)
        w, d = candidate.shape.width, candidate.shape.depth
        assert candidate.zeta == pytest.approx(d * w * (4 * 16 * 16 + 2 * 16 * 12))
        with torch.no_grad():
            logits, labels = model.eval()(trained.public.validation.inputs[:]), trained.public.validation.labels
        assert candidate.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4)
        assert candidate.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert len({c.size_bytes for c in found}) == 4


POOLED = HeaderSpec(kind="blocks", channels=16, pooling=2)  # the grid of 4x4 images in patches of 2x2


@pytest.mark.parametrize("steps", [0, 2])
def test_what_is_sent_to_a_cluster_is_the_cut_model(trained: Trained, steps: int) -> None:
    job = make(backbone={"specialise_steps": steps})
    shape = BackboneShape(width=0.5, depth=1)
    sent = cut_and_specialise(job, trained.reference, trained.elastic, trained.public, "a", shape, quiet)
    assert (sent.cluster, sent.family, sent.labels, sent.header) == ("a", "vit", ("a", "b", "c"), POOLED)
    backbone = Backbone(sent.family, sent.config).eval()
    backbone.model.load_state_dict(take(sent.tensors, "backbone"), strict=True)
    header = header_from_state(sent.header, backbone.feature_shape, 3, take(sent.tensors, "header"))
    inputs = trained.public.validation.inputs[:]
    elastic, full = elastic_of(job, trained.elastic, 3)
    with torch.no_grad():
        ours = header(backbone(inputs))
        cut = full.header(elastic.run(inputs, shape).features)
    assert torch.allclose(ours, cut, atol=1e-5) == (steps == 0)
    again = cut_and_specialise(job, trained.reference, trained.elastic, trained.public, "a", shape, quiet)
    assert same(again, sent)


# -- the choice -------------------------------------------------------------------------------------------------------


def make_device(limit: int, watts: float = 100.0, latency: float = 1.0) -> DeviceAttributes:
    energy = EnergyModel(power_watts=watts, latency_seconds=latency, latency_slope_seconds=0.1 * latency)
    return DeviceAttributes(device_id="x", storage_limit_bytes=limit, energy=energy, num_samples=0)


def make_candidates(generator: np.random.Generator, number: int) -> list[Candidate]:
    """Random ones: not even the larger is the better."""
    return [
        Candidate(
            shape=BackboneShape(width=float(generator.uniform(0.1, 1)), depth=int(generator.integers(1, 13))),
            loss=float(generator.uniform(0.2, 2.0)),
            accuracy=float(generator.uniform(0, 1)),
            parameters=1,
            size_bytes=int(generator.integers(1000, 100_000)),
            zeta=float(generator.uniform(1, 100)),
        )
        for _ in range(number)
    ]


def energy_by_hand(shape: BackboneShape, devices: list[DeviceAttributes], patches: int, epochs: int) -> float:
    volume = shape.width * shape.depth
    return max(
        epochs
        * (d.energy.power_watts + d.energy.power_slope_watts * volume + patches * d.energy.patch_power_watts)
        * (d.energy.latency_seconds + d.energy.latency_slope_seconds * volume)
        for d in devices
    )


def chosen_by_hand(objectives: dict[int, tuple[float, ...]], gamma_p: float, distance: str, ties: str) -> int:
    """Eqs. 11-13 in plain loops: coordinates, cells that none dominates, the best's interval, nearest to (1, 1, 1)."""
    ideal = [min(o[j] for o in objectives.values()) for j in range(3)]
    worst = [max(o[j] for o in objectives.values()) for j in range(3)]
    cells = max(1, math.ceil((worst[0] - ideal[0]) / gamma_p))

    def coordinate(value: float, j: int) -> int:
        span = worst[j] - ideal[j]
        share = (value - ideal[j]) / span if span else 0.0
        return next((k for k in range(1, cells + 1) if share < k / cells), cells)

    place = {i: tuple(coordinate(v, j) for j, v in enumerate(o)) for i, o in objectives.items()}

    def dominated(i: int) -> bool:
        return any(all(a <= b for a, b in zip(place[j], place[i], strict=True)) and place[j] != place[i] for j in place)

    front = [i for i in place if not dominated(i)]
    best = min(front, key=lambda i: objectives[i][0])
    near = [i for i in front if place[i][0] == place[best][0]]
    power = 2 if distance == "euclidean" else 1

    def cost(i: int) -> float:
        if ties == "loss":
            return 0.0
        return sum((objectives[i][j] - ideal[j]) / ((worst[j] - ideal[j]) or 1) for j in (1, 2))

    return min(near, key=lambda i: (sum((k - 1) ** power for k in place[i]), cost(i), objectives[i][0]))


@pytest.mark.parametrize(
    ("size", "distance", "ties"),
    [
        ("exact", "euclidean", "cheaper"),
        ("exact", "l1", "loss"),
        ("zeta", "euclidean", "loss"),
        ("zeta", "l1", "cheaper"),
    ],
)
def test_the_choice_is_that_of_brute_force(size: str, distance: str, ties: str) -> None:
    generator = np.random.default_rng(0)
    different, over = set(), 0
    for trial in range(60):
        gamma_p = float(generator.choice([0.02, 0.1, 0.5, 3.0]))
        how = {"size": size, "gamma_p": gamma_p, "grid_distance": distance, "grid_ties": ties}
        job = make(backbone=how, header={"room": 0.2})
        candidates = make_candidates(generator, int(generator.integers(1, 30)))
        watts = generator.uniform(10, 300, 3)
        limit = int(min(c.size_bytes for c in candidates) / 0.8 + 1 + generator.integers(0, 100_000))
        devices = [make_device(limit * 2, watts[0]), make_device(limit, watts[1]), make_device(limit + 1, watts[2], 3)]
        choice = match(job, candidates, ClusterStats(devices=tuple(devices)), "c", 17)

        assert choice.limit_bytes == limit
        fitting = [i for i, c in enumerate(candidates) if c.size_bytes <= 0.8 * limit]
        assert [i for i, fits in enumerate(choice.fits) if fits] == fitting
        energy = [energy_by_hand(c.shape, devices, 17, 10) for c in candidates]
        assert choice.energy_joules == pytest.approx(energy)
        sizes = [float(c.size_bytes) if size == "exact" else c.zeta for c in candidates]
        objectives = {i: (candidates[i].loss, energy[i], sizes[i]) for i in fitting}
        assert choice.chosen == choice.chosen_by["pareto_grid"] == chosen_by_hand(objectives, gamma_p, distance, ties)
        assert choice.on_front[choice.chosen]
        assert choice.chosen_by["greedy_accuracy"] == max(fitting, key=lambda i: candidates[i].accuracy)
        assert choice.chosen_by["greedy_size"] == max(fitting, key=lambda i: sizes[i])
        assert choice.chosen_by["smallest"] == min(fitting, key=lambda i: sizes[i])
        assert choice.chosen_by["optimum"] == min(fitting, key=lambda i: choice.trade_off[i])
        different.add(len(set(choice.chosen_by.values())))
        over += len(candidates) - len(fitting)
        for i in range(len(candidates)):
            assert (choice.coordinates[i] is None) == (i not in fitting)
            assert i in fitting or not choice.on_front[i]
        if trial == 0:
            assert choice == match(job, candidates, ClusterStats(devices=tuple(devices)), "c", 17)
    assert max(different) >= 4, "the methods differ"
    assert over > 100, "some do not fit"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.lists(st.integers(500, 150_000), min_size=1, max_size=4),
    st.floats(0, 0.9),
    st.sampled_from(["pareto_grid", "greedy_accuracy", "greedy_size", "random"]),
    st.sampled_from(["exact", "zeta"]),
)
def test_a_choice_always_fits_and_where_nothing_does_it_says_so(
    seed: int, number: int, limits: list[int], room: float, method: str, size: str
) -> None:
    job = make(backbone={"choice": method, "size": size}, header={"room": room})
    candidates = make_candidates(np.random.default_rng(seed), number)
    stats = ClusterStats(devices=tuple(make_device(limit) for limit in limits))
    usable = min(limits) * (1 - room)
    if all(c.size_bytes > usable for c in candidates):
        with pytest.raises(ValueError, match="nothing fits"):
            match(job, candidates, stats, "c", 4)
        return
    choice = match(job, candidates, stats, "c", 4)
    assert candidates[choice.chosen].size_bytes <= usable
    assert choice.chosen == choice.chosen_by[method]
    assert all(candidates[i].size_bytes <= usable for i in choice.chosen_by.values())


def test_nothing_fits_names_cluster_limit_room_and_the_smallest() -> None:
    shapes = [BackboneShape(width=1.0, depth=1), BackboneShape(width=0.25, depth=3)]
    candidates = [
        Candidate(shape=s, loss=1.0, accuracy=0.5, parameters=1, size_bytes=b, zeta=1.0)
        for s, b in zip(shapes, (5000, 4000), strict=True)
    ]
    stats = ClusterStats(devices=(make_device(10**6), make_device(4400)))
    job = make(header={"room": 0.1})
    with pytest.raises(ValueError, match="nothing fits") as error:
        match(job, candidates, stats, "phones", 4)
    assert str(error.value) == (
        "cluster 'phones': nothing fits its storage limit of 4400 bytes (3960 without the room for a header, "
        "header.room = 0.1); the smallest candidate, width 0.25 and depth 3, has 4000 bytes"
    )
    assert match(make(header={"room": 0.0}), candidates, stats, "phones", 4).chosen == 1


def test_the_random_choice_depends_on_seed_and_cluster_only() -> None:
    candidates = make_candidates(np.random.default_rng(0), 40)
    stats = ClusterStats(devices=(make_device(10**6),))

    def drawn(seed: int, cluster: str) -> int:
        return match(make(seed=seed), candidates, stats, cluster, 4).chosen_by["random"]

    assert drawn(0, "a") == drawn(0, "a")
    assert len({drawn(seed, cluster) for seed in range(3) for cluster in "abc"}) > 5


# -- clusters ---------------------------------------------------------------------------------------------------------


def named(limits_and_watts: list[tuple[int, float]]) -> list[DeviceAttributes]:
    return [
        make_device(limit, watts).model_copy(update={"device_id": f"d{i}"})
        for i, (limit, watts) in enumerate(limits_and_watts)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_obvious_groups_are_found_and_numbered_by_storage(seed: int) -> None:
    generator = np.random.default_rng(seed)
    groups = [(10**6, 200.0), (10**5, 50.0), (10**5, 200.0)]
    points = [
        (int(limit * generator.uniform(0.95, 1.05)), watts * generator.uniform(0.95, 1.05))
        for _ in range(6)
        for limit, watts in groups
    ]
    devices = named(points)
    clusters = form_clusters(devices, 3, seed)
    assert list(clusters) == ["cluster1", "cluster2", "cluster3"]
    found = {frozenset(d.device_id for d in members) for members in clusters.values()}
    assert found == {frozenset(f"d{i}" for i in range(18) if i % 3 == g) for g in range(3)}
    smallest = [min(d.storage_limit_bytes for d in members) for members in clusters.values()]
    assert smallest == sorted(smallest)
    assert {d.device_id for d in clusters["cluster3"]} == {f"d{i}" for i in range(0, 18, 3)}
    assert form_clusters(devices, 3, seed) == clusters


def test_both_attributes_count_alike_whatever_their_units() -> None:
    """Bytes are a million times watts: the two groups differ in watts only, storage varies by a hundredth of it."""
    devices = named([(10**6, 10.0), (10**6, 11.0), (10**6, 300.0), (10**6, 301.0)])
    clusters = form_clusters(devices, 2, 0)
    assert sorted(sorted(d.device_id for d in m) for m in clusters.values()) == [["d0", "d1"], ["d2", "d3"]]
    devices = named([(100, 10.0), (10**6, 12.0), (200, 300.0), (999_000, 290.0)])
    assert sorted(sorted(d.device_id for d in m) for m in form_clusters(devices, 4, 0).values()) == [
        ["d0"],
        ["d1"],
        ["d2"],
        ["d3"],
    ]


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from([100, 200, 10**6]), st.sampled_from([1.0, 2.0])), min_size=1, max_size=8),
    st.integers(1, 9),
)
def test_every_device_has_one_cluster_and_no_cluster_is_empty(points: list[tuple[int, float]], wanted: int) -> None:
    devices = named(points)
    clusters = form_clusters(devices, wanted, 0)
    assert list(clusters) == [f"cluster{i + 1}" for i in range(len(clusters))]
    assert sorted(d.device_id for m in clusters.values() for d in m) == sorted(d.device_id for d in devices)
    assert all(clusters.values())
    assert len(clusters) == min(wanted, len(set(points)))
