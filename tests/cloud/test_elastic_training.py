"""Elastic training: importance against finite differences and exact removal, and distillation that lowers the loss."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from fleetfit.cloud.elastic_training import (
    better_depth_order,
    evaluate_shape,
    hidden_pairs,
    sample_shapes,
    specialise,
    train_elastic,
)
from fleetfit.cloud.importance import (
    LayerImportance,
    gate_series,
    random_importance,
    removal_importance,
    reorder_by,
    second_order,
    taylor_importance,
)
from fleetfit.config.sections import BackboneConfig
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import BackboneShape, HeaderSpec
from fleetfit.data.augmentation import Augmentation
from fleetfit.data.samples import Inputs, Samples
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone, ElasticBackbone
from fleetfit.models.header import build_header
from fleetfit.models.training import evaluate, fit

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 8,
    "image_size": 4,
    "patch_size": 2,
    "num_channels": 1,
    "initializer_range": 0.2,
}
WIDTHS, DEPTHS = (0.34, 0.67, 1.0), (1, 2, 3)
SHAPES = [BackboneShape(width=w, depth=d) for w in WIDTHS for d in DEPTHS]
JOINT = BackboneConfig(widths=WIDTHS, steps=30, batch_size=32, learning_rate=3e-3, specialise_steps=30)
PAPER = JOINT.model_copy(update={"distillation": "paper"})


def make_samples(name: str, number: int = 120) -> Samples:
    """Four classes: which quarter of the image is lit."""
    generator = named_generator(0, "samples", name)
    labels = torch.arange(number) % 4
    inputs = 0.7 * torch.randn(number, 1, 4, 4, generator=generator)
    for i, c in enumerate(labels.tolist()):
        inputs[i, 0, 2 * (c // 2) : 2 * (c // 2) + 2, 2 * (c % 2) : 2 * (c % 2) + 2] += 1.0
    return Samples(Inputs.of(inputs), labels, tuple("abcd"), 16)


TRAIN, VALIDATION = make_samples("train"), make_samples("validation", 60)


@pytest.fixture(scope="module")
def reference() -> Classifier:
    """A small trained model; copy it before changing it."""
    with seeded_init(0, "reference"):
        backbone = Backbone("vit", CONFIG)
        model = Classifier(backbone, build_header(HeaderSpec(), backbone.feature_shape, 4))
    fit(
        lambda rows: cross_entropy(model(TRAIN.inputs[rows]), TRAIN.labels[rows]),
        model.parameters(),
        len(TRAIN),
        steps=80,
        batch_size=32,
        learning_rate=3e-3,
        generator=named_generator(0, "reference"),
    )
    scores = evaluate(lambda rows: model(VALIDATION.inputs[rows]), VALIDATION.labels)
    assert 0.6 < scores.accuracy < 1.0, "the tiny problem is neither solved nor hopeless"
    return model.eval()


@pytest.fixture
def model(reference: Classifier) -> Classifier:
    return copy.deepcopy(reference)


# -- importance -------------------------------------------------------------------------------------------------------


def losses_at(elastic: ElasticBackbone, header, samples: Samples, layer: int, heads=None, neurons=None) -> Tensor:
    """Each sample's loss with gates in one layer."""
    gates = {} if heads is None else {layer: heads}, {} if neurons is None else {layer: neurons}
    with torch.no_grad(), elastic.gated(*gates) as gated:
        return cross_entropy(header(gated(samples.inputs[:])), samples.labels, reduction="none")


def one_at(index: int, number: int, value: float) -> Tensor:
    gate = torch.ones(number, dtype=torch.float64)
    gate[index] = value
    return gate


@pytest.mark.parametrize("batch_size", [64, 7])
def test_taylor_is_the_derivative_in_a_gate(model: Classifier, batch_size: int) -> None:
    """Heads: the mean of |d loss of a sample / d gate|; neurons: |d mean loss / d gate|; by central differences."""
    model.double()
    some = TRAIN.rows(torch.arange(50))
    samples = Samples(Inputs.of(some.inputs[:].double()), some.labels, some.label_names, 16)
    elastic, header, step = ElasticBackbone(model.backbone), model.header, 1e-4
    importance = taylor_importance(elastic, header, samples, batch_size)
    for layer in range(3):
        for head in range(3):
            up, down = (losses_at(elastic, header, samples, layer, heads=one_at(head, 3, 1 + s)) for s in (step, -step))
            expected = float(((up - down) / (2 * step)).abs().mean())
            assert float(importance.heads[layer][head]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
        for neuron in range(8):
            up, down = (
                losses_at(elastic, header, samples, layer, neurons=one_at(neuron, 8, 1 + s)) for s in (step, -step)
            )
            expected = abs(float(((up - down) / (2 * step)).mean()))
            assert float(importance.neurons[layer][neuron]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_gate_series_is_the_slope_and_gauss_newtons_curvature_in_a_gate(model: Classifier, unit: str) -> None:
    """By central differences of the logits; the curvature's estimate with many draws comes near them."""
    model.double()
    some = TRAIN.rows(torch.arange(40))
    samples = Samples(Inputs.of(some.inputs[:].double()), some.labels, some.label_names, 16)
    elastic, header, step = ElasticBackbone(model.backbone), model.header, 1e-4
    found = gate_series(elastic, header, samples, torch.Generator().manual_seed(0), batch_size=16, draws=300)
    series, number = (found[0], 3) if unit == "heads" else (found[1], 8)

    def logits_at(layer: int, index: int, value: float) -> Tensor:
        gate = {layer: one_at(index, number, value)}
        with torch.no_grad(), elastic.gated(*((gate, {}) if unit == "heads" else ({}, gate))) as gated:
            return header(gated(samples.inputs[:]))

    for layer in range(3):
        for i in range(number):
            share = logits_at(layer, i, 1.0).softmax(1)
            along = (logits_at(layer, i, 1 + step) - logits_at(layer, i, 1 - step)) / (2 * step)
            wrong = share - torch.nn.functional.one_hot(samples.labels, share.shape[1])
            curvature = float(((share * along**2).sum(1) - (share * along).sum(1) ** 2).mean())
            assert float(series.slopes[layer][i]) == pytest.approx(float((wrong * along).sum(1).mean()), abs=1e-6)
            assert float(series.curvatures[layer][i]) == pytest.approx(curvature, rel=0.1, abs=1e-6)


def test_second_order_is_slope_against_the_whole_estimated_curvature(model: Classifier) -> None:
    elastic, header = ElasticBackbone(model.backbone), model.header
    found = second_order(elastic, header, VALIDATION, torch.Generator().manual_seed(0))
    heads, neurons = gate_series(elastic, header, VALIDATION, torch.Generator().manual_seed(0))
    for importance, series in ((found.heads, heads), (found.neurons, neurons)):
        for layer in range(3):  # half the second derivative, which is twice Gauss-Newton's
            torch.testing.assert_close(importance[layer], (series.curvatures[layer] - series.slopes[layer]).abs())


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_second_order_ranks_nearer_to_exact_removal(model: Classifier, unit: str) -> None:
    elastic, header = ElasticBackbone(model.backbone), model.header
    exact = torch.cat(getattr(removal_importance(elastic, header, VALIDATION), unit))

    def rank_correlation(importance: LayerImportance) -> float:
        return float(spearmanr(torch.cat(getattr(importance, unit)), exact).statistic)

    second = rank_correlation(second_order(elastic, header, VALIDATION, torch.Generator().manual_seed(0)))
    assert second > rank_correlation(taylor_importance(elastic, header, VALIDATION))


def test_taylor_leaves_no_gradients_and_no_hooks(model: Classifier) -> None:
    elastic = ElasticBackbone(model.backbone)
    taylor_importance(elastic, model.header, TRAIN)
    assert all(p.grad is None for p in [*elastic.backbone.parameters(), *model.header.parameters()])
    assert not any(m._forward_pre_hooks for m in elastic.backbone.modules())


def test_removal_is_the_loss_without_the_part_by_hand(model: Classifier) -> None:
    elastic, header, told = ElasticBackbone(model.backbone), model.header, []
    importance = removal_importance(elastic, header, VALIDATION, lambda done, total: told.append((done, total)))
    assert told == [(i, 33) for i in range(1, 34)]  # 3 layers of 3 heads and 8 neurons

    def loss(changed: Backbone) -> float:
        with torch.no_grad():
            return float(cross_entropy(header(changed(VALIDATION.inputs[:])), VALIDATION.labels))

    whole = loss(model.backbone)
    for layer in range(3):
        for head in range(3):
            without = copy.deepcopy(model.backbone)
            columns = slice(4 * head, 4 * head + 4)
            without.model.layers[layer].attention.o_proj.weight.data[:, columns] = 0
            assert float(importance.heads[layer][head]) == pytest.approx(abs(loss(without) - whole), abs=1e-6)
        for neuron in range(8):
            without = copy.deepcopy(model.backbone)
            without.model.layers[layer].mlp.fc2.weight.data[:, neuron] = 0
            assert float(importance.neurons[layer][neuron]) == pytest.approx(abs(loss(without) - whole), abs=1e-6)
    assert max(float(i.max()) for i in importance.heads) > 0.01
    heads_only = removal_importance(elastic, header, VALIDATION, neurons=False)
    assert all(torch.equal(a, b) for a, b in zip(heads_only.heads, importance.heads, strict=True))
    assert not any(n.any() for n in heads_only.neurons)


def test_reordering_by_importance_puts_the_most_important_first(model: Classifier) -> None:
    elastic, header = ElasticBackbone(model.backbone), model.header
    before = removal_importance(elastic, header, VALIDATION)
    logits = header(elastic.backbone(VALIDATION.inputs[:]))
    reorder_by(elastic, before)
    assert torch.allclose(header(elastic.backbone(VALIDATION.inputs[:])), logits, atol=1e-5)
    after = removal_importance(elastic, header, VALIDATION)
    for old, new in zip((*before.heads, *before.neurons), (*after.heads, *after.neurons), strict=True):
        assert torch.allclose(new, old.sort(descending=True).values, atol=1e-5)


def test_random_importance_repeats_with_the_seed(model: Classifier) -> None:
    elastic = ElasticBackbone(model.backbone)

    def draw(name: str) -> LayerImportance:
        return random_importance(elastic, named_generator(0, name))

    one, again, other = draw("a"), draw("a"), draw("b")
    assert [len(h) for h in one.heads] == [3] * 3
    assert [len(n) for n in one.neurons] == [8] * 3
    parts = [(*i.heads, *i.neurons) for i in (one, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(parts[0], parts[1], strict=True))
    assert not any(torch.equal(a, c) for a, c in zip(parts[0], parts[2], strict=True))


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_a_step_has_the_largest_the_smallest_and_up_to_two_more() -> None:
    generator, seen = named_generator(0, "shapes"), set()
    for _ in range(200):
        shapes = sample_shapes((0.67, 0.34, 1.0), (2, 1, 3), generator)
        assert shapes[0] == BackboneShape(width=1.0, depth=3)
        assert shapes[1] == BackboneShape(width=0.34, depth=1)
        assert 2 <= len(shapes) <= 4
        assert len(set(shapes)) == len(shapes)
        seen |= set(shapes)
    assert seen == set(SHAPES)
    assert sample_shapes((0.5,), (2,), generator) == (BackboneShape(width=0.5, depth=2),)


@torch.no_grad()
def test_a_shapes_scores_are_those_of_the_cut_model(model: Classifier) -> None:
    elastic = ElasticBackbone(model.backbone, "spread")
    for shape in SHAPES:
        scores = evaluate_shape(elastic, model.header, VALIDATION, shape)
        logits = model.header(elastic.extract(shape)(VALIDATION.inputs[:]))
        assert scores.loss == pytest.approx(float(cross_entropy(logits, VALIDATION.labels)), abs=1e-5)
        assert scores.accuracy == pytest.approx(float((logits.argmax(1) == VALIDATION.labels).float().mean()))
    none = VALIDATION.rows(torch.zeros(0, dtype=torch.long))
    assert evaluate_shape(elastic, model.header, none, SHAPES[0]).num_samples == 0


@pytest.mark.parametrize("useless", [1, 2])
def test_the_better_depth_order_has_the_lower_loss(model: Classifier, useless: int) -> None:
    """Depth 2 of 3 keeps layers 0 and 1, or 0 and 2. Take everything that one of them adds to the tokens away."""
    layer = model.backbone.model.layers[useless]
    others = [BackboneShape(width=1.0, depth=2)]
    for linear in (layer.attention.o_proj, layer.mlp.fc2):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    elastic = ElasticBackbone(model.backbone, "spread")
    losses = {}
    for order in ("first", "spread"):
        elastic.depth_order = order
        losses[order] = evaluate_shape(elastic, model.header, VALIDATION, others[0]).loss
    assert losses["first"] != losses["spread"]
    for before in ("first", "spread"):
        elastic.depth_order = before
        chosen = better_depth_order(elastic, model.header, VALIDATION, others)
        assert chosen == min(losses, key=lambda order: losses[order])
        assert elastic.depth_order == before
    assert chosen == ("spread" if useless == 1 else "first")


@pytest.mark.parametrize(
    ("order", "depth", "layers"), [("first", 2, (0, 1)), ("spread", 2, (0, 2)), ("spread", 3, (0, 1, 2))]
)
@torch.no_grad()
def test_pairs_are_a_students_layers_and_those_they_were_kept_from(
    model: Classifier, order: str, depth: int, layers: tuple[int, ...]
) -> None:
    elastic = ElasticBackbone(model.backbone, order)
    shape = BackboneShape(width=0.67, depth=depth)
    student, teacher = elastic.run(TRAIN.inputs[:5], shape), model.backbone.run(TRAIN.inputs[:5])
    own, taught = hidden_pairs(elastic, shape, student, teacher)
    assert len(own) == len(taught) == depth
    for i, layer in enumerate(layers):
        assert own[i] is student.hidden[i + 1]
        assert taught[i] is teacher.hidden[layer + 1]


# -- training ---------------------------------------------------------------------------------------------------------


def mean_losses(elastic: ElasticBackbone, header, teacher: Classifier) -> dict[str, float]:
    """Over all shapes, on the training samples: distance to the reference's logits and hidden states, and to labels."""
    with torch.no_grad():
        taught = teacher.backbone.run(TRAIN.inputs[:])
        teacher_logits = teacher.header(taught.features)
        sums = {"logits": 0.0, "labels": 0.0, "hidden": 0.0}
        for shape in SHAPES:
            student = elastic.run(TRAIN.inputs[:], shape)
            logits = header(student.features)
            pairs = zip(*hidden_pairs(elastic, shape, student, taught), strict=True)
            sums["logits"] += float(mse_loss(logits, teacher_logits)) / len(SHAPES)
            sums["labels"] += float(cross_entropy(logits, TRAIN.labels)) / len(SHAPES)
            sums["hidden"] += sum(float(mse_loss(a, b)) for a, b in pairs) / shape.depth / len(SHAPES)
    return sums


@pytest.mark.parametrize("config", [JOINT, PAPER], ids=lambda c: c.distillation)
def test_elastic_training_lowers_what_it_minimises(
    reference: Classifier, model: Classifier, config: BackboneConfig
) -> None:
    elastic, header = ElasticBackbone(model.backbone, "spread"), model.header
    elastic.backbone.train()
    before = mean_losses(elastic, header, reference)
    told: list[tuple[int, int]] = []
    train_elastic(
        elastic, header, TRAIN, config, DEPTHS, Augmentation(), 0, lambda step, steps, loss: told.append((step, steps))
    )
    after = mean_losses(elastic, header, reference)
    assert told == [(i, 30) for i in range(1, 31)]
    assert after["logits"] < 0.8 * before["logits"]
    if config.distillation == "joint":
        assert after["labels"] < 0.9 * before["labels"]
    else:
        assert after["hidden"] < before["hidden"]


def test_the_papers_first_stage_is_of_full_depth_and_the_second_learns_from_the_first(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic, header = ElasticBackbone(model.backbone), model.header
    runs: list[BackboneShape] = []
    teachers: list[Tensor] = []
    real, real_run = ElasticBackbone.run, Backbone.run

    def run(self: ElasticBackbone, inputs: Tensor, shape: BackboneShape):
        runs.append(shape)
        return real(self, inputs, shape)

    def teach(self: Backbone, inputs: Tensor):
        assert not self.training
        teachers.append(self.model.layers[0].mlp.fc1.weight.detach().clone())
        return real_run(self, inputs)

    monkeypatch.setattr(ElasticBackbone, "run", run)
    monkeypatch.setattr(Backbone, "run", teach)
    config = PAPER.model_copy(update={"steps": 7})
    weights: list[Tensor] = []
    elastic.backbone.train()
    train_elastic(
        elastic,
        header,
        TRAIN,
        config,
        DEPTHS,
        Augmentation(),
        0,
        lambda *_: weights.append(elastic.backbone.model.layers[0].mlp.fc1.weight.detach().clone()),
    )
    assert len(teachers) == 7
    reference = model.backbone.model.layers[0].mlp.fc1.weight
    assert all(torch.equal(t, reference) for t in teachers[:3])
    assert all(torch.equal(t, weights[2]) for t in teachers[3:])
    assert not torch.equal(weights[2], reference)
    full = runs.index(BackboneShape(width=0.34, depth=1))  # the smallest of the second stage, its second shape
    assert {s.depth for s in runs[: full - 1]} == {3}
    assert {s.depth for s in runs[full - 1 :]} >= {1, 3}


@pytest.mark.parametrize("config", [JOINT, PAPER], ids=lambda c: c.distillation)
def test_the_same_seed_gives_the_same_weights(reference: Classifier, config: BackboneConfig) -> None:
    def train(seed: int, noise: int) -> dict[str, Tensor]:
        model = copy.deepcopy(reference)
        elastic = ElasticBackbone(model.backbone)
        elastic.backbone.train()
        torch.rand(noise)  # nothing depends on the global generator
        train_elastic(
            elastic, model.header, TRAIN, config.model_copy(update={"steps": 6}), DEPTHS, Augmentation(1), seed
        )
        return dict(Classifier(elastic.backbone, model.header).state_dict())

    one, again, other = train(0, 1), train(0, 5), train(1, 1)
    assert all(torch.equal(t, again[n]) for n, t in one.items())
    assert not any(torch.equal(t, other[n]) for n, t in one.items() if "weight" in n)
    assert not any(torch.equal(t, reference.state_dict()[n]) for n, t in one.items() if "weight" in n)


def test_the_seed_decides_which_shapes_are_trained(reference: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ElasticBackbone.run
    runs: list[BackboneShape] = []

    def run(self: ElasticBackbone, inputs: Tensor, shape: BackboneShape):
        runs.append(shape)
        return real(self, inputs, shape)

    monkeypatch.setattr(ElasticBackbone, "run", run)

    def shapes(seed: int) -> list[BackboneShape]:
        runs.clear()
        model = copy.deepcopy(reference)
        config = JOINT.model_copy(update={"steps": 5})
        train_elastic(ElasticBackbone(model.backbone), model.header, TRAIN, config, DEPTHS, Augmentation(), seed)
        return list(runs)

    assert shapes(0) == shapes(0) != shapes(1)


def test_specialising_betters_one_sub_network_and_nothing_else(reference: Classifier, model: Classifier) -> None:
    elastic = ElasticBackbone(model.backbone)
    shape = BackboneShape(width=0.34, depth=1)

    def specialised(name: str) -> tuple[Classifier, float, float]:
        cut = Classifier(elastic.extract(shape), copy.deepcopy(model.header))
        teacher = copy.deepcopy(reference).train()
        before = evaluate(lambda rows: cut(TRAIN.inputs[rows]), TRAIN.labels).loss
        specialise(cut.train(), teacher, TRAIN, JOINT, Augmentation(), 0, name)
        assert not any(module.training for module in teacher.modules()), "dropout would teach noise"
        for name, tensor in teacher.state_dict().items():
            assert torch.equal(tensor, reference.state_dict()[name])
        return cut, before, evaluate(lambda rows: cut(TRAIN.inputs[rows]), TRAIN.labels).loss

    cut, before, after = specialised("small")
    assert after < 0.9 * before
    again, _, _ = specialised("small")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in cut.state_dict().items())
    for name, tensor in elastic.backbone.state_dict().items():
        assert torch.equal(tensor, reference.backbone.state_dict()[name])
