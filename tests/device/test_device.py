"""The device: determinism, order of messages, importance against autograd, pruning, anchor, prior, odd data."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fleetfit.config.sections import RefineConfig
from fleetfit.core.encoding import Declined, Message, decode, encode, put, take
from fleetfit.core.randomness import named_generator, seeded_init
from fleetfit.core.records import Block, DeviceAttributes, DeviceReport, EnergyModel, HeaderSpec, Way
from fleetfit.data.partition import Split
from fleetfit.data.samples import Inputs, Samples
from fleetfit.device.device import SKETCH_PROJECTIONS, DeviceState, handle
from fleetfit.device.memory import DeviceMemory, shipped_model
from fleetfit.device.messages import (
    AttributesReply,
    AttributesRequest,
    CoarseModel,
    CoarseReply,
    Finish,
    FinishReply,
    Propose,
    ProposeReply,
    RefineRound,
    RoundReply,
    header_of,
)
from fleetfit.device.refinement import worse_than_sent
from fleetfit.device.ways import ways_to_ship
from fleetfit.edge.messages import StatsRequest
from fleetfit.method.aggregation import unit_sum
from fleetfit.method.class_prior import class_prior, support_prior
from fleetfit.models.elastic import Backbone
from fleetfit.models.features import Features, FeatureShape
from fleetfit.models.header import Header, build_header, header_from_state
from fleetfit.models.pruning import prunable_layers

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "initializer_range": 0.3,
}
LABELS = ("a", "b", "c", "d")
CLASS_SHARES = (0.1, 0.2, 0.3, 0.4)
SPEC = HeaderSpec(  # neurons: 4 of a conv3, 4 of a conv1, 6 hidden units
    kind="blocks",
    blocks=(
        Block(input_1=0, input_2=1, operation_1="conv3", operation_2="identity"),
        Block(input_1=2, input_2=0, operation_1="identity", operation_2="conv1"),
    ),
    channels=4,
    pooling=2,
    hidden=6,
)
NUM_NEURONS = 14
FINISH = Finish(step=1, way=Way(header="refined"))
EARLIER: dict[str, Any] = {  # all rounds alike, on all that a device can show, each value as it is
    "rounds": 2,
    "settle": False,
    "later_epochs": 0,
    "learning_rate": 3e-3,
    "anchor": 0.1,
    "similarity": "calibrated",
    "bits": 32,
    "prior_estimate": "dirichlet",
}
ONE_BATCH: dict[str, Any] = {
    "rounds": 1,
    "epochs": 1,
    "batch_size": 64,
    "learning_rate": 1e-12,
    "class_prior": False,
    "anchor": 0.0,
    "prune_share": 0.01,
}


def make_samples(num: int, name: str, classes: tuple[int, ...] = (0, 1, 2, 3)) -> Samples:
    """Noise with one bright quarter: the class."""
    generator = named_generator(0, "samples", name)
    labels = torch.tensor([classes[i % len(classes)] for i in range(num)], dtype=torch.long)
    inputs = torch.randn(num, 1, 8, 8, generator=generator)
    for i, c in enumerate(labels.tolist()):
        inputs[i, 0, 4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 1.5
    return Samples(Inputs.of(inputs), labels, LABELS, raw_bytes_per_sample=64)


def make_data(train: int = 20, validation: int = 8, test: int = 8, classes: tuple[int, ...] = (0, 1, 2, 3)) -> Split:
    return Split(
        make_samples(train, "train", classes),
        make_samples(validation, "validation", classes),
        make_samples(test, "test", classes),
    )


def make_state(data: Split | None = None, limit: int = 10**6, name: str = "phones-1") -> DeviceState:
    attributes = DeviceAttributes(device_id=name, storage_limit_bytes=limit, energy=EnergyModel(), num_samples=28)
    return DeviceState(attributes, data or make_data(), DeviceMemory())


def make_coarse(spec: HeaderSpec = SPEC, header: Header | None = None, **refine: Any) -> CoarseModel:
    with seeded_init(0, "coarse"):
        backbone = Backbone("vit", CONFIG)
        header = header or build_header(spec, backbone.feature_shape, len(LABELS))
    return CoarseModel(
        step=1,
        family="vit",
        config=backbone.config,
        labels=LABELS,
        header=header.spec,
        refine=RefineConfig(**(EARLIER | refine)),
        seed=5,
        class_shares=CLASS_SHARES,
        tensors=put("backbone", dict(backbone.model.state_dict())) | put("header", dict(header.state_dict())),
    )


def started(coarse: CoarseModel, state: DeviceState | None = None) -> tuple[DeviceState, CoarseReply]:
    """A device that has told its attributes and has its coarse model."""
    state, _ = handle(state or make_state(), AttributesRequest(step=0))
    state, reply = handle(state, coarse)
    assert isinstance(reply, CoarseReply)
    return state, reply


def personal(reply: RoundReply) -> dict[str, Tensor]:
    """What an edge with this device alone sends back."""
    return put("importance", unit_sum(take(reply.tensors, "importance"))) | put("header", take(reply.tensors, "header"))


def whole_life(coarse: CoarseModel, state: DeviceState | None = None, **finish: Any) -> list[tuple[DeviceState, Any]]:
    """All steps of a device that is alone in its cluster: (state after, reply)."""
    steps: list[tuple[DeviceState, Any]] = [started(coarse, state)]
    tensors: dict[str, Tensor] = {}
    for number in range(1, coarse.refine.rounds + 1):
        message = RefineRound(step=1 + number, round=number, tensors=tensors)
        steps.append(handle(steps[-1][0], message))
        tensors = personal(steps[-1][1])
    last = 2 + coarse.refine.rounds
    steps.append(handle(steps[-1][0], Propose(step=last, tensors=tensors)))
    steps.append(handle(steps[-1][0], Finish(step=last + 1, way=Way(**({"header": "refined"} | finish)))))
    return steps


def report_of(steps: list[tuple[DeviceState, Any]]) -> DeviceReport:
    report: DeviceReport = steps[-1][1].report
    return report


def header_in(memory: DeviceMemory, prefix: str) -> Header:
    shape = Backbone(memory.family, memory.config).feature_shape
    return header_from_state(memory.header, shape, len(memory.labels), take(memory.tensors, prefix))


def features_in(memory: DeviceMemory, split: str) -> Features:
    return Features(memory.tensors[f"features.{split}.output"], memory.tensors[f"features.{split}.penultimate"])


def assert_equal(a: Message, b: Message) -> None:
    assert a.model_dump_json() == b.model_dump_json()
    assert_same_tensors(a.tensors, b.tensors)


def assert_same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


# -- determinism and order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["gate", "neuron", "parameter"])
def test_the_same_state_and_message_give_the_same_reply_and_state(importance: str) -> None:
    refine: dict[str, Any] = {"rounds": 2, "epochs": 2, "importance": importance}
    one = whole_life(make_coarse(**refine))
    torch.manual_seed(123)  # nobody's business
    two = whole_life(make_coarse(**refine))
    for (state_1, reply_1), (state_2, reply_2) in zip(one, two, strict=True):
        assert_equal(reply_1, reply_2)
        assert_equal(state_1.memory, state_2.memory)


def frozen(message: Message) -> Message:
    """A copy that nothing can reach."""
    return message.model_copy(update={"tensors": {name: t.clone() for name, t in message.tensors.items()}})


def test_answering_changes_neither_the_state_nor_the_message() -> None:
    steps = whole_life(make_coarse(rounds=2, epochs=1, prune_share=0.5))
    asked: list[tuple[DeviceState, Message]] = [
        (steps[0][0], RefineRound(step=2, round=1)),
        (steps[1][0], RefineRound(step=3, round=2, tensors=personal(steps[1][1]))),
        (steps[2][0], Propose(step=4, tensors=personal(steps[2][1]))),
        (steps[3][0], Finish(step=5, way=Way(header="refined", prior_strength=3.0))),
    ]
    for state, message in asked:
        memory, sent = frozen(state.memory), frozen(message)
        first_state, first = handle(state, message)
        assert_equal(state.memory, memory)
        assert_equal(message, sent)
        again_state, again = handle(state, message)
        assert_equal(first, again)
        assert_equal(first_state.memory, again_state.memory)


def test_a_device_may_be_rebuilt_from_its_saved_memory_between_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = whole_life(make_coarse(rounds=2, epochs=2))
    real = handle

    def rebuilt(state: DeviceState, message: Message) -> tuple[DeviceState, Message]:
        state, reply = real(state, message)
        return replace(state, memory=decode(encode(state.memory), DeviceMemory)), reply

    monkeypatch.setitem(globals(), "handle", rebuilt)
    for (_, one), (_, two) in zip(at_once, whole_life(make_coarse(rounds=2, epochs=2)), strict=True):
        assert_equal(one, two)


def test_another_device_and_another_seed_see_other_batches() -> None:
    coarse = make_coarse(rounds=1, epochs=1, batch_size=4, exchange="weights")
    replies = [
        handle(started(c, s)[0], RefineRound(step=2, round=1))[1].tensors["header.classifier.last.weight"]
        for c, s in (
            (coarse, make_state()),
            (coarse, make_state(name="phones-2")),
            (coarse.model_copy(update={"seed": 6}), make_state()),
        )
    ]
    assert not torch.equal(replies[0], replies[1])
    assert not torch.equal(replies[0], replies[2])


def test_a_step_that_is_over_is_refused() -> None:
    state = whole_life(make_coarse(rounds=2, epochs=1))[1][0]
    assert state.memory.step == 2
    for step in (0, 1, 2):
        with pytest.raises(ValueError, match=f"device phones-1: step {step} is over, it has come to 2"):
            handle(state, RefineRound(step=step, round=1))


def test_a_device_that_missed_steps_goes_on_from_what_the_edge_knows() -> None:
    """Round 1 missed: with nothing known it starts from the coarse header, else from the personal tensors."""
    coarse = make_coarse(rounds=2, epochs=1, prune_share=0.5)
    (state, _), (after, reply) = whole_life(coarse)[:2]
    missed, answer = handle(state, RefineRound(step=3, round=2))
    assert (missed.memory.step, answer.step) == (3, 3)
    assert all(bool(mask.all()) for mask in take(missed.memory.tensors, "kept").values())
    # Round 2 trains on other batches than round 1, from the same header.
    assert not torch.equal(
        missed.memory.tensors["header.classifier.last.weight"], reply.tensors["header.classifier.last.weight"]
    )
    known, same = handle(state, RefineRound(step=3, round=2, tensors=personal(reply)))
    then, expected = handle(after, RefineRound(step=3, round=2, tensors=personal(reply)))
    assert_equal(same, expected)
    assert_same_tensors(take(known.memory.tensors, "kept"), take(then.memory.tensors, "kept"))


@pytest.mark.parametrize("options", [{}, {"fine_tune": True}, {"exchange": "importance", "fine_tune": True}], ids=str)
def test_a_device_that_missed_the_proposal_ships_the_same(options: dict[str, Any]) -> None:
    coarse = make_coarse(rounds=1, epochs=1, prune_share=0.5, **options)
    steps = whole_life(coarse)
    before, reply = steps[1]
    state, finished = handle(before, Finish(step=4, way=Way(header="refined"), tensors=personal(reply)))
    assert_equal(finished, steps[-1][1])
    assert_same_tensors(take(state.memory.tensors, "shipped"), take(steps[-1][0].memory.tensors, "shipped"))
    # Its proposal was made, and lost on the way: the tensors are not taken twice.
    state, finished = handle(steps[2][0], Finish(step=4, way=Way(header="refined"), tensors=personal(reply)))
    assert_equal(finished, steps[-1][1])


def test_a_device_that_has_only_the_coarse_model_ships_it() -> None:
    state, _ = started(make_coarse(rounds=3, epochs=1))
    state, reply = handle(state, Finish(step=6, way=Way(header="refined")))
    assert isinstance(reply, FinishReply)
    assert_same_tensors(take(state.memory.tensors, "shipped"), take(state.memory.tensors, "coarse"))


def test_the_coarse_model_begins_anew_and_attributes_change_nothing() -> None:
    coarse = make_coarse(rounds=1, epochs=1)
    state = whole_life(coarse)[-1][0]
    again, reply = handle(state, AttributesRequest(step=0))
    assert again is state
    fresh, expected = started(coarse)
    anew, reply = handle(state, coarse)
    assert_equal(reply, expected)
    assert_equal(anew.memory, fresh.memory)


@pytest.mark.parametrize(
    "message", [StatsRequest(), AttributesReply(step=0, attributes=make_state().attributes), DeviceMemory()]
)
def test_a_message_that_is_not_for_devices_is_refused(message: Message) -> None:
    with pytest.raises(ValueError, match=rf"device phones-1: cannot answer a '{message.kind}'"):
        handle(make_state(), message)


@pytest.mark.parametrize(
    "message",
    [RefineRound(step=1, round=1), Propose(step=1), Finish(step=1, way=Way(header="refined"))],
    ids=lambda m: m.kind,
)
def test_nothing_but_attributes_before_the_coarse_model(message: Message) -> None:
    state, reply = handle(make_state(), AttributesRequest(step=0))
    assert isinstance(reply, AttributesReply)
    assert reply.attributes == state.attributes
    after, declined = handle(state, message)
    assert after is state
    assert declined == Declined(reason="it has no coarse model", needs_model=True)


def test_a_device_that_has_not_finished_has_no_model() -> None:
    with pytest.raises(ValueError, match="has not finished"):
        shipped_model(started(make_coarse())[0].memory)


# -- features and sketch ----------------------------------------------------------------------------------------------


def test_features_are_the_backbones_and_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = make_coarse(rounds=1, epochs=1)
    state, _ = started(coarse)
    backbone = Backbone("vit", CONFIG)
    backbone.model.load_state_dict(take(coarse.tensors, "backbone"))
    for split in ("train", "validation", "test"):
        with torch.no_grad():
            output = backbone.eval().run(getattr(state.data, split).inputs[:])
        kept = features_in(state.memory, split)
        torch.testing.assert_close(kept.output, output.output)
        torch.testing.assert_close(kept.penultimate, output.hidden[-2])

    def never(*_: object) -> None:
        raise AssertionError("the backbone ran again")

    monkeypatch.setattr(Backbone, "run", never)
    state, reply = handle(state, RefineRound(step=2, round=1))
    assert isinstance(reply, RoundReply)
    state, _ = handle(state, Propose(step=3, tensors=personal(reply)))
    handle(state, Finish(step=4, way=Way(header="refined")))


def test_a_sketch_of_samples_is_some_class_tokens_in_random_order() -> None:
    state, reply = started(make_coarse(sketch="samples", sketch_samples=7))
    features = features_in(state.memory, "train").output[:, 0]
    assert list(reply.tensors) == ["sketch.all"]
    sent = reply.tensors["sketch.all"]
    assert sent.shape == (7, 8)
    rows = [int((features == row).all(1).nonzero()) for row in sent]
    assert len(set(rows)) == 7
    assert rows != sorted(rows)
    more = started(make_coarse(sketch="samples", sketch_samples=50))[1].tensors["sketch.all"]
    torch.testing.assert_close(more.sort(0).values, features.sort(0).values)


def test_a_sliced_sketch_is_sorted_and_holds_no_sample() -> None:
    _, reply = started(make_coarse(sketch="sliced", sketch_samples=5))
    assert list(reply.tensors) == ["sketch.all", "sketch.first", "sketch.second"]
    for tensor in reply.tensors.values():
        assert tensor.shape == (5, SKETCH_PROJECTIONS)
        assert bool((tensor.diff(dim=0) >= 0).all())
    assert not torch.equal(reply.tensors["sketch.first"], reply.tensors["sketch.second"])
    # The same directions for all devices of a job: a device with the same data shows the same quantiles.
    other = started(make_coarse(sketch="sliced", sketch_samples=5), make_state(name="phones-2"))[1]
    torch.testing.assert_close(other.tensors["sketch.all"], reply.tensors["sketch.all"])
    assert not torch.equal(other.tensors["sketch.first"], reply.tensors["sketch.first"])


# -- importance -------------------------------------------------------------------------------------------------------


def one_batch_round(importance: str, epochs: int = 1) -> tuple[DeviceState, dict[str, Tensor]]:
    """A round on all samples at once that leaves the header where it is."""
    settings = ONE_BATCH | {"importance": importance, "epochs": epochs}
    state, reply = handle(started(make_coarse(**settings))[0], RefineRound(step=2, round=1))
    torch.testing.assert_close(
        dict(take(state.memory.tensors, "header")), dict(take(state.memory.tensors, "coarse")), rtol=0, atol=1e-9
    )
    return state, take(reply.tensors, "importance")


def loss_in(state: DeviceState, header: Header) -> Tensor:
    return cross_entropy(header(features_in(state.memory, "train")), state.data.train.labels)


@pytest.mark.parametrize("epochs", [1, 3])
def test_parameter_importance_is_the_squared_product_averaged_over_batches(epochs: int) -> None:
    state, sent = one_batch_round("parameter", epochs)
    header = header_in(state.memory, "coarse")
    loss_in(state, header).backward()
    assert set(sent) == set(dict(header.named_parameters()))
    for name, parameter in header.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        expected = torch.zeros_like(parameter)
        for place in range(parameter.numel()):  # one at a time
            expected.view(-1)[place] = (gradient.view(-1)[place] * parameter.detach().view(-1)[place]) ** 2
        torch.testing.assert_close(sent[name], expected, rtol=1e-4, atol=1e-12)
    assert sum(float(t.sum()) for t in sent.values()) > 0


def test_importance_is_averaged_over_the_batches_of_a_round() -> None:
    """Two batches at a standing header: their mean is not the one batch's square; bounded below by it (Jensen)."""
    one = one_batch_round("parameter")[1]
    settings = ONE_BATCH | {"importance": "parameter", "batch_size": 10}
    reply = handle(started(make_coarse(**settings))[0], RefineRound(step=2, round=1))[1]
    two = take(reply.tensors, "importance")
    for name in one:
        assert bool((two[name] >= one[name] * (1 - 1e-4) - 1e-12).all())
    assert sum(float(t.sum()) for t in two.values()) < 20 * sum(float(t.sum()) for t in one.values())


def test_neuron_importance_is_the_sum_over_the_neurons_parameters() -> None:
    state, by_parameter = one_batch_round("parameter")
    _, sent = one_batch_round("neuron")
    layers = prunable_layers(header_in(state.memory, "coarse"))
    assert list(sent) == list(layers)
    assert sum(len(t) for t in sent.values()) == NUM_NEURONS
    for name in layers:
        if name == "classifier":
            weights = [by_parameter[f"{name}.{p}"] for p in ("first.weight", "first.bias", "last.weight")]
            expected = [weights[0][j].sum() + weights[1][j] + weights[2][:, j].sum() for j in range(6)]
        else:
            weight, bias = by_parameter[f"{name}.conv.weight"], by_parameter[f"{name}.conv.bias"]
            expected = [weight[j].sum() + bias[j] for j in range(4)]
        torch.testing.assert_close(sent[name], torch.stack(expected))


def test_gate_importance_is_the_squared_gradient_of_a_gate() -> None:
    """Against gates that are really there: a factor 1 on each channel or hidden unit, differentiated by autograd."""
    state, sent = one_batch_round("gate")
    header = header_in(state.memory, "coarse")
    gates = {name: torch.ones(layer.num_neurons, requires_grad=True) for name, layer in prunable_layers(header).items()}
    for name, gate in gates.items():
        if name == "classifier":
            last = header.last_linear
            last.register_forward_pre_hook(lambda _, args, gate=gate: (args[0] * gate,))
        else:
            module = header.get_submodule(f"{name}.conv")
            module.register_forward_hook(lambda _, args, out, gate=gate: out * gate[:, None, None])
    gradients = torch.autograd.grad(loss_in(state, header), list(gates.values()))
    assert list(sent) == list(gates)
    for name, gradient in zip(gates, gradients, strict=True):
        torch.testing.assert_close(sent[name], gradient**2, rtol=1e-4, atol=1e-12)
        assert float(sent[name].sum()) > 0


def test_what_a_round_sends_is_what_the_job_exchanges() -> None:
    for exchange, prefixes in (("weights", {"importance", "header"}), ("importance", {"importance"})):
        state, reply = handle(
            started(make_coarse(exchange=exchange, epochs=1, prune_share=0.1))[0], RefineRound(step=2, round=1)
        )
        assert {name.partition(".")[0] for name in reply.tensors} == prefixes
        if exchange == "weights":
            assert_same_tensors(take(reply.tensors, "header"), take(state.memory.tensors, "header"))


# -- pruning ----------------------------------------------------------------------------------------------------------


def dropped(memory: DeviceMemory) -> int:
    return sum(int((~mask).sum()) for mask in take(memory.tensors, "kept").values())


@pytest.mark.parametrize("importance", ["gate", "neuron", "parameter"])
@pytest.mark.parametrize("exchange", ["weights", "importance"])
def test_a_preset_number_of_neurons_is_dropped_each_round(importance: str, exchange: str) -> None:
    coarse = make_coarse(rounds=2, epochs=1, prune_share=4 / 14, importance=importance, exchange=exchange)
    steps = whole_life(coarse)
    # Round 1 has no importance yet; round 2 and the proposal drop by what the rounds before measured.
    assert [dropped(state.memory) for state, _ in steps] == [0, 0, 2, 4, 4]
    for (earlier, _), (later, _) in itertools.pairwise(steps):
        for name, mask in take(later.memory.tensors, "kept").items():
            assert bool((mask <= earlier.memory.tensors[f"kept.{name}"]).all()), "a dropped neuron came back"
    report = report_of(steps)
    assert (report.neurons, report.kept_neurons) == (NUM_NEURONS, NUM_NEURONS - 4)


@pytest.mark.parametrize(
    ("rounds", "share"),
    [
        (1, 0.5),
        (3, 0.43),
        (4, 0.2),
        (8, 0.25),
    ],
)
def test_the_share_is_dropped_in_all_however_many_rounds(rounds: int, share: float) -> None:
    steps = whole_life(make_coarse(rounds=rounds, epochs=1, batch_size=64, prune_share=share))
    assert dropped(steps[-1][0].memory) == round(NUM_NEURONS * share)


def test_the_least_important_neurons_go_and_every_layer_keeps_one() -> None:
    state, reply = handle(started(make_coarse(rounds=1, epochs=1, prune_share=0.9))[0], RefineRound(step=2, round=1))
    importance = {"body.repeats.0.0.side_1.conv3": [9, 8, 7, 6], "body.repeats.0.1.side_2.conv1": [0.4, 0.3, 0.2, 0.1]}
    importance["classifier"] = [1, 2, 3, 4, 5, 5.5]
    tensors = {f"importance.{n}": torch.tensor(v, dtype=torch.float32) for n, v in importance.items()}
    state, _ = handle(state, Propose(step=3, tensors=personal(reply) | tensors))  # type: ignore[arg-type]
    kept = {n: m.tolist() for n, m in take(state.memory.tensors, "kept").items()}
    # 13 of 14 are asked for; each of the three layers keeps its best.
    assert kept == {
        "body.repeats.0.0.side_1.conv3": [True, False, False, False],
        "body.repeats.0.1.side_2.conv1": [True, False, False, False],
        "classifier": [False] * 5 + [True],
    }


@pytest.mark.parametrize("fine_tune", [False, True])
def test_masked_while_refining_is_cut_out_at_the_end(fine_tune: bool) -> None:
    steps = whole_life(make_coarse(rounds=2, epochs=3, prune_share=0.5, fine_tune=fine_tune))
    seen = 0
    for state, _ in steps[1:-2]:  # also after a round of training, a dropped neuron is zero
        now = header_in(state.memory, "header")
        for name, mask in take(state.memory.tensors, "kept").items():
            for parameter_name, dim in prunable_layers(now)[name].neuron_parameters():
                assert bool((now.get_parameter(f"{name}.{parameter_name}").movedim(dim, 0)[~mask] == 0).all())
                seen += int((~mask).sum())
    assert seen > 0
    memory = steps[-1][0].memory
    masked, coarse = header_in(memory, "refined").eval(), header_in(memory, "coarse")
    model = shipped_model(memory).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(steps[-1][0].data.test.inputs[:]), masked(features_in(memory, "test")), rtol=0, atol=1e-5
        )
        assert not torch.allclose(masked(features_in(memory, "test")), coarse(features_in(memory, "test")), atol=1e-2)
    in_all, shipped = (sum(p.numel() for p in h.parameters()) for h in (coarse, model.header))
    assert shipped < in_all
    for name, mask in take(memory.tensors, "kept").items():
        assert prunable_layers(model.header)[name].num_neurons == int(mask.sum())
    assert report_of(steps).parameters == sum(p.numel() for p in model.parameters())


def test_a_dropped_neuron_counts_as_it_was_shipped_in_what_is_averaged() -> None:
    steps = whole_life(make_coarse(rounds=2, epochs=1, prune_share=0.5))
    state, reply = steps[2]  # round 2 trains a masked header
    sent, coarse = take(reply.tensors, "header"), take(state.memory.tensors, "coarse")
    seen = 0
    for name, mask in take(state.memory.tensors, "kept").items():
        layer = prunable_layers(header_in(state.memory, "coarse"))[name]
        for parameter_name, dim in layer.neuron_parameters():
            full = f"{name}.{parameter_name}"
            torch.testing.assert_close(sent[full].movedim(dim, 0)[~mask], coarse[full].movedim(dim, 0)[~mask])
            seen += int((~mask).sum())
    assert seen > 0


# -- training ---------------------------------------------------------------------------------------------------------


def drift(**refine: Any) -> float:
    """How far a round moves the header from what was shipped."""
    coarse = make_coarse(rounds=1, epochs=5, prune_share=0.0, learning_rate=1e-2, **refine)
    state, _ = handle(started(coarse)[0], RefineRound(step=2, round=1))
    header, shipped = take(state.memory.tensors, "header"), take(state.memory.tensors, "coarse")
    return max(float((header[n] - shipped[n]).abs().max()) for n in shipped)


def test_the_anchor_holds_the_header_where_it_was_shipped() -> None:
    free, held, fast = (drift(anchor=mu) for mu in (0.0, 0.3, 1e6))
    assert free > 0.05
    assert held < free
    assert fast < 0.01


def test_training_helps_on_what_it_is_trained_on() -> None:
    steps = whole_life(make_coarse(rounds=2, epochs=20, learning_rate=1e-2, anchor=0.0, prune_share=0.0))
    state = steps[-1][0]
    with torch.no_grad():
        before, after = (loss_in(state, header_in(state.memory, name)) for name in ("coarse", "header"))
    assert after < 0.7 * before


OPTIONS: list[dict[str, Any]] = [
    {"exchange": "importance"},
    {"similarity": "alone"},
    {"anchor": 0.0},
    {"anchor": 10.0},
    {"class_prior": False},
    {"balanced_training": False},
    {"importance": "parameter"},
    {"importance": "neuron"},
    {"prune_share": 0.0},
    {"prune_share": 0.8},
    {"guard": False},
    {"sketch": "sliced"},
]


def test_local_fine_tuning_is_the_same_whatever_the_collaboration_does() -> None:
    """Common random numbers: what is compared differs in the method, not in its batches."""

    def local(seed: int = 5, **options: Any) -> float | None:
        coarse = make_coarse(rounds=2, epochs=3, learning_rate=1e-2, **options).model_copy(update={"seed": seed})
        finish = {"header": "coarse", "prior_strength": 3.0} if options else {}
        return report_of(whole_life(coarse, make_state(make_data(train=30, test=1000)), **finish)).accuracy_local

    alone = local()
    assert alone not in (None, 0.0, 1.0)
    assert local(seed=6) != alone, "the test would see other batches"
    for options in OPTIONS:
        assert local(**options) == alone, options


# -- class prior ------------------------------------------------------------------------------------------------------


def finished(prior_strength: float | None, header: str, data: Split, coarse: CoarseModel) -> DeviceState:
    return whole_life(coarse, make_state(data), header=header, prior_strength=prior_strength)[-1][0]


@pytest.mark.parametrize("header", ["coarse", "refined"])
def test_the_class_prior_changes_the_last_bias_and_nothing_else(header: str) -> None:
    data, coarse = make_data(classes=(0, 0, 0, 2)), make_coarse(rounds=1, epochs=1)
    without = dict(shipped_model(finished(None, header, data, coarse).memory).state_dict())
    with_it = dict(shipped_model(finished(3.0, header, data, coarse).memory).state_dict())
    name = "header.classifier.last.bias"
    counts = torch.bincount(torch.cat([data.train.labels, data.validation.labels]), minlength=4).float()
    torch.testing.assert_close(
        with_it.pop(name) - without.pop(name),
        class_prior(counts, torch.tensor(CLASS_SHARES), 3.0),
        rtol=0,
        atol=1e-6,
    )
    assert_same_tensors(without, with_it)


def test_an_unseen_class_stays_reachable() -> None:
    shape = Backbone("vit", CONFIG).feature_shape
    with seeded_init(1, "sharp"):
        header = build_header(HeaderSpec(), shape, len(LABELS))
    with torch.no_grad():
        header.last_linear.weight.mul_(30)
        header.last_linear.bias.zero_()
    data = make_data(train=60, validation=15, test=0, classes=(0,))
    anything = 2 * torch.randn(500, 1, 8, 8, generator=named_generator(0, "anything"))
    model = shipped_model(finished(1.0, "coarse", data, make_coarse(header=header, rounds=1, epochs=1)).memory)
    plain = shipped_model(finished(None, "coarse", data, make_coarse(header=header, rounds=1, epochs=1)).memory)
    with torch.no_grad():
        now, before = (torch.bincount(m.eval()(anything).argmax(1), minlength=4) for m in (model, plain))
    assert bool((now > 0).all()), now
    assert now[0] > before[0]


@pytest.mark.parametrize("estimate", ["dirichlet", "support"])
def test_a_proposal_scores_every_way_to_ship_without_the_sample_that_is_scored(estimate: str) -> None:
    steps = whole_life(make_coarse(rounds=1, epochs=1, prior_estimate=estimate))
    state, reply = steps[-2]
    assert isinstance(reply, ProposeReply)
    ways = ways_to_ship(state.memory.refine, len(LABELS))
    assert {w.header for w in ways} == {"coarse", "quarter", "half", "refined", "own", "local"}
    own = torch.cat([state.data.train.labels, state.data.validation.labels]).tolist()
    labels, shares = state.data.validation.labels, torch.tensor(CLASS_SHARES)
    assert reply.num_samples == len(labels)
    tensors = state.memory.tensors
    for way, told in zip(ways, reply.tensors["losses"].tolist(), strict=True):
        share = {"coarse": 0.0, "quarter": 0.25, "half": 0.5, "refined": 1.0}.get(way.header)
        if share is None:
            header = header_in(state.memory, {"own": "header", "local": "local"}[way.header])
        else:
            header = header_in(state.memory, "coarse")
            refined = take(tensors, "refined")
            mixed = {n: (1 - share) * t + share * refined[n] for n, t in take(tensors, "coarse").items()}
            header.load_state_dict(mixed)
        with torch.no_grad():
            logits = header(features_in(state.memory, "validation")) / way.temperature
        loss = 0.0
        for row, label in zip(logits, labels.tolist(), strict=True):
            others = list(own)
            others.remove(label)
            counts = torch.tensor([float(others.count(c)) for c in range(4)])
            if way.prior_classes is not None:
                row = row + support_prior(counts, shares, way.prior_strength or 0.0, way.prior_classes)
            elif way.prior_strength is not None:
                row = row + class_prior(counts, shares, way.prior_strength)
            loss -= float(row.log_softmax(0)[label])
        assert told == pytest.approx(loss, rel=1e-4), way


def test_what_ships_has_its_temperature_before_its_prior() -> None:
    data, coarse = make_data(), make_coarse(rounds=1, epochs=1)
    warm = whole_life(coarse, make_state(data), temperature=2.0, prior_strength=3.0)[-1][0]
    plain = whole_life(coarse, make_state(data))[-1][0]
    inputs = data.test.inputs[:]
    counts = torch.bincount(torch.cat([data.train.labels, data.validation.labels]), minlength=4).float()
    prior = class_prior(counts, torch.tensor(CLASS_SHARES), 3.0)
    with torch.no_grad():
        told, logits = (shipped_model(s.memory).eval()(inputs) for s in (warm, plain))
    torch.testing.assert_close(told, logits / 2 + prior, rtol=0, atol=1e-5)


def test_the_header_goes_up_in_a_byte_a_value() -> None:
    (state, exact), (_, short) = (whole_life(make_coarse(rounds=1, epochs=2, bits=b))[1] for b in (32, 8))
    sent = take(state.memory.tensors, "coarse")
    assert {t.dtype for n, t in short.tensors.items() if n.startswith("change.")} == {torch.int8}
    for name, tensor in header_of(short, sent).items():
        most = float((exact.tensors[f"header.{name}"] - sent[name]).abs().max())
        torch.testing.assert_close(tensor, exact.tensors[f"header.{name}"], rtol=0, atol=most / 200 + 1e-7)


def test_a_header_that_comes_is_scored_before_it_is_trained() -> None:
    coarse = make_coarse(rounds=2, epochs=1)
    state, first = whole_life(coarse)[1]
    tensors = {n: t for n, t in first.tensors.items() if n.startswith(("header.", "importance."))}
    whole = {f"average.{n.removeprefix('header.')}": t for n, t in tensors.items() if n.startswith("header.")}
    _, second = handle(state, RefineRound(step=3, round=2, tensors=tensors | whole))
    assert second.came == second.average
    assert second.came.num_samples == 8
    assert second.came.loss_sum != second.scores.loss_sum
    assert first.average.num_samples == 0


def test_inputs_without_labels_move_the_prior_to_what_they_are_of() -> None:
    coarse = make_coarse(rounds=1, epochs=30, learning_rate=1e-2, unlabelled=True)
    data = replace(make_data(train=40), unlabelled=make_samples(200, "unlabelled", (1,)))
    way = {"header": "refined", "prior_strength": 30.0}
    without = shipped_model(whole_life(coarse, make_state(data), **way)[-1][0].memory).header.last_linear.bias
    steps = whole_life(coarse, make_state(data), **way, shift_concentration=1.0)
    moved = shipped_model(steps[-1][0].memory).header.last_linear.bias - without
    assert int(moved.argmax()) == 1
    assert any(w.shift_concentration for w in ways_to_ship(coarse.refine, len(LABELS)))
    assert len(steps[-2][1].tensors["losses"]) == len(ways_to_ship(coarse.refine, len(LABELS)))


# -- odd devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity_sketch", ["samples", "sliced"])
@pytest.mark.parametrize(
    ("sizes", "classes", "notes"),
    [
        ((1, 0, 0), (0, 1, 2, 3), {"one training sample", "one class", "no test samples", "no validation samples"}),
        ((1, 1, 1), (0, 1, 2, 3), {"one training sample", "one class"}),
        ((2, 0, 1), (0, 1, 2, 3), {"no validation samples"}),
        ((20, 8, 8), (3,), {"one class"}),
        ((20, 0, 8), (0, 1, 2, 3), {"no validation samples"}),
        ((20, 8, 0), (0, 1, 2, 3), {"no test samples"}),
        ((17, 8, 8), (0, 1, 2, 3), set()),  # one more than a batch
    ],
)
def test_odd_devices_get_their_model_and_a_note(
    sizes: tuple[int, int, int], classes: tuple[int, ...], notes: set[str], similarity_sketch: str
) -> None:
    state = make_state(make_data(*sizes, classes=classes))
    steps = whole_life(make_coarse(rounds=2, epochs=2, sketch=similarity_sketch), state, prior_strength=10.0)
    for after, reply in steps:
        for message in (after.memory, reply):
            assert all(bool(t.isfinite().all()) for t in message.tensors.values())
            assert "NaN" not in message.model_dump_json()
        again = decode(encode(reply), type(reply))
        assert again.model_dump_json() == reply.model_dump_json()
    report = report_of(steps)
    assert len(report.notes) == len(notes)
    assert all(any(note.startswith(start) for note in report.notes) for start in notes)
    accuracies = (report.accuracy_coarse, report.accuracy_local, report.accuracy)
    if sizes[2] == 0:
        assert accuracies == (None, None, None)
    else:
        assert all(a is not None and 0 <= a <= 1 for a in accuracies)
    assert shipped_model(steps[-1][0].memory)(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    if sizes[1] == 0:
        assert steps[-2][1].num_samples == 0
        assert not bool(steps[-2][1].tensors["losses"].any())


def test_a_header_without_neurons_is_refined_too() -> None:
    for exchange in ("weights", "importance"):
        coarse = make_coarse(HeaderSpec(), rounds=2, epochs=1, exchange=exchange, importance="gate")
        report = report_of(whole_life(coarse))
        assert (report.neurons, report.kept_neurons) == (0, 0)


def test_the_report_says_what_the_shipped_model_does() -> None:
    steps = whole_life(make_coarse(rounds=1, epochs=5), prior_strength=10.0)
    (state, reply), report = steps[-1], report_of(steps)
    assert isinstance(reply, FinishReply)
    test = state.data.test
    with torch.no_grad():
        right = int((shipped_model(state.memory).eval()(test.inputs[:]).argmax(1) == test.labels).sum())
        coarse = header_in(state.memory, "coarse")(features_in(state.memory, "test"))
    assert report.accuracy == right / len(test)
    assert report.accuracy_coarse == int((coarse.argmax(1) == test.labels).sum()) / len(test)
    assert (report.num_train, report.num_test) == (20, 8)
    assert state.memory.report == report


def test_a_model_over_the_limit_is_refused_with_both_sizes() -> None:
    coarse = make_coarse(rounds=1, epochs=1)
    size = report_of(whole_life(coarse)).size_bytes
    assert report_of(whole_life(coarse, make_state(limit=size))).size_bytes == size
    # Told before anything is computed, and nothing of it is kept.
    small = make_state(limit=size - 1)
    after, reply = handle(small, coarse)
    assert after is small
    assert reply == Declined(reason=f"the model has {size} bytes, the device's limit is {size - 1}")


def test_what_ships_is_checked_against_the_limit_once_more() -> None:
    coarse = make_coarse(rounds=1, epochs=1)
    state = whole_life(coarse)[-2][0]
    size = report_of(whole_life(coarse)).size_bytes
    shrunk = replace(state, attributes=state.attributes.model_copy(update={"storage_limit_bytes": size - 1}))
    with pytest.raises(ValueError, match=rf"phones-1.* {size} bytes.* {size - 1}"):
        handle(shrunk, Finish(step=4, way=Way(header="refined")))


@pytest.mark.parametrize(
    ("spec", "share", "told"),
    [
        (HeaderSpec(), 0.2, "refine.prune_share 0.2 drops nothing: the linear header has no neurons"),
        (SPEC, 0.02, f"refine.prune_share 0.02 drops nothing: the searched header has {NUM_NEURONS} neurons, "),
        (SPEC, 0.5, None),
        (HeaderSpec(), 0.0, None),
    ],
)
def test_a_header_without_neurons_to_drop_is_told(spec: HeaderSpec, share: float, told: str | None) -> None:
    state, _ = started(make_coarse(spec, prune_share=share, rounds=1, epochs=1))
    state, reply = handle(state, RefineRound(step=2, round=1))
    state, _ = handle(state, Propose(step=3, tensors=personal(reply)))  # type: ignore[arg-type]
    _, done = handle(state, Finish(step=4, way=Way(header="refined")))
    assert isinstance(done, FinishReply)
    notes = done.report.notes
    assert any(note.startswith(told) for note in notes) if told else not any("prune" in note for note in notes)
    assert (done.report.kept_neurons < done.report.neurons) is (share == 0.5)


# -- what is not shipped, and what is not computed -------------------------------------------------------------------


def test_a_device_ships_what_it_was_sent_where_the_clusters_choice_is_clearly_worse() -> None:
    coarse = make_coarse()
    state, _ = started(coarse, make_state(make_data(classes=(0, 2, 3))))
    spoilt = {n: 100 * torch.ones_like(t) for n, t in take(coarse.tensors, "header").items()}
    spoilt["classifier.last.bias"] = torch.tensor([0.0, 50.0, 0.0, 0.0])
    tensors = dict(state.memory.tensors) | put("refined", spoilt)
    state = replace(state, memory=state.memory.model_copy(update={"tensors": tensors, "step": 4}))
    state, reply = handle(state, Finish(step=5, way=Way(header="refined")))
    assert isinstance(reply, FinishReply)
    assert reply.report.accuracy == reply.report.accuracy_coarse
    (note,) = [n for n in reply.report.notes if n.startswith("shipped as it was sent: ")]
    assert "nats as sent" in note
    assert "own validation samples" in note
    shipped = take(state.memory.tensors, "shipped")
    assert all(torch.equal(shipped[n], t) for n, t in take(coarse.tensors, "header").items())


def flat_header(bias: list[float]) -> Header:
    header = build_header(HeaderSpec(kind="linear"), FeatureShape(8, (2, 2)), len(LABELS))
    with torch.no_grad():
        header.last_linear.weight.zero_()
        header.last_linear.bias.copy_(torch.tensor(bias))
    return header


@pytest.mark.parametrize(
    ("ships", "labels", "refused"),
    [
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0, 0, 0], True),  # a guess, where the model as sent was right
        ([0.0, 0.0, 0.0, 0.0], [0], False),  # one sample loses less than a guess's worth
        ([-90.0, 0.0, 0.0, 0.0], [0], True),
        ([5.9, 0.0, 0.0, 0.0], [0] * 50, False),  # worse by next to nothing
        ([9.0, 0.0, 0.0, 0.0], [0] * 6, False),
        ([6.0, 6.0, 0.0, 0.0], [0, 1, 0, 0, 1, 1], False),  # better for one class, worse for another
        ([math.nan, 0.0, 0.0, 0.0], [0, 0, 0], True),
        ([0.0, 0.0, 0.0, 0.0], [], False),
    ],
)
def test_clearly_worse_is_beyond_noise(ships: list[float], labels: list[int], refused: bool) -> None:
    features = Features(torch.zeros(len(labels), 5, 8), torch.zeros(len(labels), 5, 8))
    told = worse_than_sent(flat_header([6.0, 0, 0, 0]), flat_header(ships), features, torch.tensor(labels).long())
    assert (told is not None) is refused


def test_numbers_that_no_model_has_are_refused_before_anything_is_computed() -> None:
    coarse = make_coarse()
    for name in ("header.classifier.last.bias", "backbone.layernorm.weight"):
        for bad in (math.nan, math.inf, -3e38, 1e7):
            spoilt = {**coarse.tensors, name: torch.full_like(coarse.tensors[name], bad)}
            with pytest.raises(ValueError, match=f"tensor '{name}' must be"):
                started(coarse.model_copy(update={"tensors": spoilt}))


def test_shares_are_one_a_label() -> None:
    with pytest.raises(ValueError, match="class_shares must be 4 shares"):
        started(make_coarse().model_copy(update={"class_shares": (0.5, 0.5)}))
