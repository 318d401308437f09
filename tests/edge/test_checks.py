"""Which replies may be used: what must be refused, and that nothing is refused which a real device may say."""

import math
from typing import Any

import pytest
import torch

from fleetfit.cloud.checks import check_cluster_report, check_stats
from fleetfit.config.sections import RefineConfig
from fleetfit.core.encoding import Message, put, take
from fleetfit.core.randomness import seeded_init
from fleetfit.core.records import (
    AbsentDevice,
    DeviceAttributes,
    DeviceReport,
    EnergyModel,
    Fault,
    HeaderSpec,
    ValidationScores,
    Way,
)
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
)
from fleetfit.device.refinement import SKETCH_PROJECTIONS
from fleetfit.device.ways import ways_to_ship
from fleetfit.edge.checks import check_reply, expected_of
from fleetfit.edge.messages import ClusterReport, ClusterStats
from fleetfit.models.elastic import Backbone
from fleetfit.models.header import build_header, header_from_state
from fleetfit.models.pruning import extract, prunable_layers

torch.set_num_threads(1)

CONFIG = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
SCORES = ValidationScores(num_samples=3, loss_sum=1.5, num_correct=2)
ATTRIBUTES = DeviceAttributes(device_id="d-1", storage_limit_bytes=50_000, energy=EnergyModel(), num_samples=20)
REPORT = DeviceReport(
    device_id="d-1",
    accuracy_coarse=0.5,
    accuracy_local=None,
    accuracy=1.0,
    num_train=15,
    num_test=4,
    parameters=1000,
    size_bytes=40_000,
    limit_bytes=50_000,
    kept_neurons=3,
    neurons=4,
    notes=("one training sample",),
)


def coarse_model(**refine: Any) -> CoarseModel:
    with seeded_init(0, "replies"):
        backbone = Backbone("vit", CONFIG)
        header = build_header(HeaderSpec(kind="mlp", hidden=4), backbone.feature_shape, 3)
    return CoarseModel(
        step=1,
        family="vit",
        config=backbone.config,
        labels=("a", "b", "c"),
        header=header.spec,
        refine=RefineConfig(**({"similarity": "wasserstein", "bits": 32, "prune_share": 0.1} | refine)),
        seed=0,
        class_shares=(),
        tensors=put("header", dict(header.state_dict())),
    )


COARSE = coarse_model()
EXPECTED = expected_of(COARSE, {"d-1": ATTRIBUTES})
ROUND = {
    **{f"importance.{n}": torch.rand(shape) for n, (shape, _) in EXPECTED.importance.items()},
    **put("header", {n: torch.randn(shape) for n, (shape, _) in EXPECTED.header.items()}),
}
QUESTIONS = {
    "attributes": AttributesRequest(step=0),
    "coarse": COARSE,
    "round": RefineRound(step=2, round=1),
    "propose": Propose(step=4),
    "finish": Finish(step=5, way=Way(header="coarse")),
}
GOOD: dict[str, Any] = {
    "attributes": AttributesReply(step=0, attributes=ATTRIBUTES),
    "coarse": CoarseReply(step=1, scores=SCORES, tensors={"sketch.all": torch.randn(5, 8)}),
    "round": RoundReply(step=2, scores=SCORES, tensors=ROUND),
    "propose": ProposeReply(
        step=4, num_samples=3, tensors={"losses": torch.ones(len(ways_to_ship(COARSE.refine, len(COARSE.labels))))}
    ),
    "finish": FinishReply(step=5, report=REPORT),
}


def check(kind: str, reply: Message, device: str = "d-1") -> None:
    check_reply(device, QUESTIONS[kind], reply, EXPECTED)


def changed(kind: str, **fields: Any) -> Message:
    message: Message = GOOD[kind].model_copy(update=fields)
    return message


def scored(**fields: Any) -> ValidationScores:
    return SCORES.model_copy(update=fields)


def measured(**fields: Any) -> AttributesReply:
    energy = EnergyModel().model_copy(update={k: v for k, v in fields.items() if k in EnergyModel.model_fields})
    rest = {k: v for k, v in fields.items() if k not in EnergyModel.model_fields}
    return AttributesReply(step=0, attributes=ATTRIBUTES.model_copy(update={"energy": energy, **rest}))


def reported(**fields: Any) -> FinishReply:
    return FinishReply(step=5, report=REPORT.model_copy(update=fields))


@pytest.mark.parametrize("kind", GOOD)
def test_good_replies_pass_and_only_as_answers_to_their_question(kind: str) -> None:
    check(kind, GOOD[kind])
    for other in GOOD:
        if other != kind:
            with pytest.raises(ValueError, match=r"^it is a '\w+', expected a '\w+'$"):
                check(other, GOOD[kind])
    for step in (GOOD[kind].step + 1, GOOD[kind].step + 100):
        with pytest.raises(ValueError, match=f"^it answers step {step}, expected {GOOD[kind].step}$"):
            check(kind, changed(kind, step=step))


def test_what_odd_devices_say_passes_too() -> None:
    nothing = ValidationScores(num_samples=0, loss_sum=0.0, num_correct=0)
    for kind in ("coarse", "round"):
        check(kind, changed(kind, scores=nothing))
    check("coarse", changed("coarse", tensors={"sketch.all": torch.zeros(1, 8)}))
    check("coarse", changed("coarse", tensors={"sketch.all": torch.zeros(COARSE.refine.sketch_samples, 8)}))
    check("round", changed("round", tensors={n: torch.zeros_like(t) for n, t in ROUND.items()}))
    check("round", changed("round", scores=scored(loss_sum=1e5)))
    check("finish", reported(accuracy=None, accuracy_coarse=None, num_test=0, kept_neurons=0, neurons=0, notes=()))
    check("finish", reported(size_bytes=50_000))


def test_a_device_whose_attributes_are_not_known_may_join_in() -> None:
    stranger = expected_of(COARSE, {})
    check_reply("d-1", QUESTIONS["coarse"], changed("coarse", scores=scored(num_samples=1000)), stranger)
    check_reply("d-1", QUESTIONS["finish"], reported(limit_bytes=45_000), stranger)


INFINITE, NAN = math.inf, math.nan
BAD: list[tuple[str, Any, str]] = [
    ("attributes", measured(device_id="d-2"), "device_id must be 'd-1', got 'd-2'"),
    ("attributes", measured(storage_limit_bytes=10**400), "storage_limit_bytes must be within 1 and"),
    ("attributes", measured(num_samples=2**60), "num_samples must be within 0 and"),
    ("attributes", measured(power_watts=INFINITE), "power_watts must be within 0 and 1000000000, got inf"),
    ("attributes", measured(latency_seconds=1e300), "latency_seconds must be within"),
    ("attributes", changed("attributes", tensors={"x": torch.zeros(1)}), "tensor 'x' is unexpected"),
    ("coarse", changed("coarse", tensors={}), "tensor 'sketch.all' is missing"),
    ("coarse", changed("coarse", tensors={"sketch.all": torch.randn(25, 8)}), r"must be torch.float32 \(24, 8\)"),
    ("coarse", changed("coarse", tensors={"sketch.all": torch.randn(0, 8)}), r"must be torch.float32 \(1, 8\)"),
    ("coarse", changed("coarse", tensors={"sketch.all": torch.randn(5, 9)}), r"must be torch.float32 \(5, 8\)"),
    ("coarse", changed("coarse", tensors={"sketch.all": torch.tensor(0.0)}), r"got torch.float32 \(\)"),
    ("coarse", changed("coarse", tensors={"sketch.all": torch.randn(5, 8).half()}), "got torch.float16"),
    ("coarse", changed("coarse", tensors={"sketch.all": torch.full((5, 8), NAN)}), "must be finite"),
    (
        "coarse",
        changed("coarse", tensors={"sketch.all": torch.full((5, 8), 1e7)}),
        r"must be within 1e\+06, got 1e\+07",
    ),
    ("coarse", changed("coarse", scores=scored(num_samples=21)), "num_samples must be within 0 and 20, got 21"),
    ("round", changed("round", scores=scored(num_correct=4)), "num_correct must be within 0 and 3, got 4"),
    ("round", changed("round", scores=scored(loss_sum=NAN)), "loss_sum must be within .* got nan"),
    ("round", changed("round", scores=scored(loss_sum=INFINITE)), "loss_sum must be within .* got inf"),
    ("round", changed("round", scores=scored(loss_sum=1e300)), "loss_sum must be within"),
    ("round", changed("round", scores=scored(loss_sum=-1e-3)), "loss_sum must be within 0 and"),
    ("round", changed("round", tensors=ROUND | {"importance.x": torch.zeros(1)}), "'importance.x' is unexpected"),
    ("round", changed("round", tensors={n: t for n, t in ROUND.items() if "header" in n}), "'importance.* is missing"),
    ("round", changed("round", tensors={n: -t for n, t in ROUND.items()}), "importance of '.*' must be >= 0"),
    ("round", changed("round", tensors={n: t * INFINITE for n, t in ROUND.items()}), "must be finite"),
    ("round", changed("round", tensors={n: t[None] for n, t in ROUND.items()}), "must be torch.float32"),
    ("round", changed("round", tensors={n: t.double() for n, t in ROUND.items()}), "got torch.float64"),
    ("propose", changed("propose", tensors={"losses": torch.ones(3)}), "tensor 'losses' must be"),
    ("propose", changed("propose", num_samples=10**9), "num_samples must be within"),
    ("propose", changed("propose", tensors={"losses": -GOOD["propose"].tensors["losses"]}), "loss_sum must be within"),
    ("finish", reported(device_id="../d-1"), "device_id must be 'd-1', got '../d-1'"),
    ("finish", reported(accuracy=1.5), "accuracy must be within 0 and 1, got 1.5"),
    ("finish", reported(accuracy_local=NAN), "accuracy_local must be within"),
    ("finish", reported(size_bytes=50_001), "size_bytes must be within 1 and 50000"),
    ("finish", reported(limit_bytes=60_000), "limit_bytes must be 50000, got 60000"),
    ("finish", reported(kept_neurons=5), "kept_neurons must be within 0 and 4"),
    ("finish", reported(num_train=-1), "num_train must be within 0"),
    ("finish", reported(notes=("x",) * 21), "notes must be at most 20 lines"),
    ("finish", reported(notes=("x" * 201,)), "notes must be at most"),
    ("finish", reported(notes=("\x1b[2J",)), "notes must be at most"),
]


@pytest.mark.parametrize(("kind", "reply", "says"), BAD, ids=[f"{kind}: {says}" for kind, _, says in BAD])
def test_bad_replies_are_refused_with_the_reason(kind: str, reply: Message, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(kind, reply)


def test_where_only_importance_is_exchanged_no_weights_may_come() -> None:
    expected = expected_of(coarse_model(exchange="importance", importance="parameter"), {})
    sets = {f"importance.{n}": torch.rand(shape) for n, (shape, _) in expected.importance.items()}
    assert {n: tuple(t.shape) for n, t in sets.items()} == {
        f"importance.{n}": shape for n, (shape, _) in expected.header.items()
    }
    check_reply("d", QUESTIONS["round"], RoundReply(step=2, scores=SCORES, tensors=sets), expected)
    more = RoundReply(step=2, scores=SCORES, tensors=sets | {n: t for n, t in ROUND.items() if "header" in n})
    with pytest.raises(ValueError, match=r"'header\..*' is unexpected"):
        check_reply("d", QUESTIONS["round"], more, expected)


def test_a_sliced_sketch_has_three_parts_of_one_shape() -> None:
    coarse = coarse_model(sketch="sliced", sketch_samples=7)
    parts = {f"sketch.{n}": torch.rand(7, SKETCH_PROJECTIONS) for n in ("all", "first", "second")}
    check_reply("d", coarse, CoarseReply(step=1, scores=SCORES, tensors=parts), expected_of(coarse, {}))
    for tensors in ({"sketch.all": parts["sketch.all"]}, {n: t[:6] for n, t in parts.items()}):
        with pytest.raises(ValueError, match=r"is missing|must be torch.float32 \(7, 32\)"):
            check_reply("d", coarse, CoarseReply(step=1, scores=SCORES, tensors=tensors), expected_of(coarse, {}))


def test_a_model_may_come_only_where_the_job_lets_it_and_is_the_header_that_was_sent_or_less_of_it() -> None:
    expected = expected_of(COARSE, {}, models=True)
    with torch.device("meta"):
        shape = Backbone("vit", CONFIG).feature_shape
    whole = header_from_state(COARSE.header, shape, 3, take(COARSE.tensors, "header"))
    fewer = extract(whole, {n: torch.tensor([True, False, True, False]) for n in prunable_layers(whole)})
    assert sum(t.numel() for t in fewer.state_dict().values()) < sum(t.numel() for t in whole.state_dict().values())
    sent, cut = (put("header", dict(header.state_dict())) for header in (whole, fewer))
    for tensors in ({}, sent, cut):
        check_reply("d-1", QUESTIONS["finish"], changed("finish", tensors=tensors), expected)
    first = next(iter(sent))
    for tensors, told in (
        (sent | {"backbone.x": torch.zeros(1)}, "'backbone.x' is unexpected"),
        (sent | {"header.x": torch.zeros(1)}, "'header.x' is unexpected"),
        (sent | {"header.x.kept": torch.zeros(1)}, "'header.x.kept' is unexpected"),
        (sent | {"header.x.kept": torch.zeros(1, dtype=torch.int64)}, "its model cannot be built: .* unexpected"),
        ({n: t for n, t in sent.items() if n != first}, "its model cannot be built"),
        (sent | {first: torch.zeros([s + 1 for s in sent[first].shape])}, "its model cannot be built"),
        (sent | {first: torch.zeros([0] * sent[first].ndim)}, "its model cannot be built"),
        (sent | {first: sent[first].double()}, "must be torch.float32, got torch.float64"),
        (sent | {first: sent[first] * math.nan}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=told):
            check_reply("d-1", QUESTIONS["finish"], changed("finish", tensors=tensors), expected)
    with pytest.raises(ValueError, match=r"'header\..*' is unexpected"):
        check("finish", changed("finish", tensors=sent))


# -- what edges say to the cloud --------------------------------------------------------------------------------------


def stats(*names: str, silent: tuple[str, ...] = ()) -> ClusterStats:
    return ClusterStats(devices=tuple(ATTRIBUTES.model_copy(update={"device_id": n}) for n in names), silent=silent)


def test_names_of_devices_are_fit_for_files_and_there_once() -> None:
    check_stats({"near": stats("near-1", "n.2_x"), "far": stats("far-1", silent=("far-2",))})
    for name in ("../x", "/x", "", ".x", "a/b", "a\\b", "a b", "a\n", "ä", "x" * 201, "a\0"):
        for own in (stats(name), stats("d", silent=(name,))):
            with pytest.raises(ValueError, match=r"^near: a device's name must be at most 200 letters"):
                check_stats({"near": own})
    for other in (stats("a"), stats("b", silent=("a",)), stats("b", "b")):
        with pytest.raises(ValueError, match=r"far: device '[ab]' is there twice, also in "):
            check_stats({"near": stats("a"), "far": other})
    with pytest.raises(ValueError, match="near: it must know the attributes of a device at least"):
        check_stats({"near": stats(silent=("a",))})
    odd = stats("a").devices[0].model_copy(update={"num_samples": 2**60})
    with pytest.raises(ValueError, match="near: device a: num_samples must be within"):
        check_stats({"near": ClusterStats(devices=(odd,))})


def cluster_report(
    *devices: str, absent: tuple[str, ...] = (), faults: tuple[str, ...] = (), **fields: Any
) -> ClusterReport:
    reports = tuple(REPORT.model_copy(update={"device_id": d, **fields}) for d in devices)
    return ClusterReport(
        cluster="far",
        header=HeaderSpec(),
        trials=(),
        similarity=(),
        distance=(),
        rounds=(),
        decision={},
        devices=reports,
        absent=tuple(AbsentDevice(device_id=d, since="finish") for d in absent),
        faults=tuple(Fault(device_id=d, step="finish", reason="x", times=1, recovered=False) for d in faults),
    )


def test_a_report_names_known_devices_once() -> None:
    known = stats("a", "b", silent=("c",))
    check_cluster_report("far", cluster_report("a", "c", absent=("b",), faults=("b", "b", "c")), known)
    with pytest.raises(ValueError, match=r"^near: its report is of 'far'$"):
        check_cluster_report("near", cluster_report("a"), known)
    for report in (
        cluster_report("a", "../x"),
        cluster_report("a", absent=("near-1",)),
        cluster_report("a", faults=("x",)),
        cluster_report("a", "a"),
        cluster_report("a", absent=("a",)),
    ):
        with pytest.raises(ValueError, match=r"^far: its report must name its own devices, each once, got"):
            check_cluster_report("far", report, known)
    with pytest.raises(ValueError, match=r"^far: device a: accuracy must be within"):
        check_cluster_report("far", cluster_report("a", accuracy=7.0), known)


def test_models_that_come_with_a_report_are_its_own_devices() -> None:
    own = {"d-1/header.a": torch.zeros(1), "backbone.b": torch.zeros(1)}
    check_cluster_report("far", cluster_report("d-1").model_copy(update={"tensors": own}), stats("d-1"))
    for tensors, told in (
        ({"d-2/header.a": torch.zeros(1)}, "tensor 'd-2/header.a' of its report is no device's of its own"),
        ({"../d-1/header.a": torch.zeros(1)}, "is no device's of its own"),
        ({"d-1/header.a": torch.tensor([math.nan])}, "must be finite"),
    ):
        report = cluster_report("d-1").model_copy(update={"tensors": tensors})
        with pytest.raises(ValueError, match=told):
            check_cluster_report("far", report, stats("d-1"))
