"""The whole method on the real digits, with a small budget: fifteen devices, by our choices and by the paper's."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fleetfit
from fleetfit.cloud.clusters import fleet_of
from fleetfit.cloud.elastic import Elastic
from fleetfit.config.job import Job, load_job, make_job
from fleetfit.config.presets import PAPER
from fleetfit.core.encoding import Message, decode, encode, take
from fleetfit.core.records import Way
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device.messages import CoarseModel, CoarseReply, RefineRound, RoundReply
from fleetfit.edge.messages import BackboneAssignment, decode_any
from fleetfit.edge.rounds import EdgeState
from fleetfit.edge.shipping import Decision
from fleetfit.engines import whole_fleet
from fleetfit.runs.device_folder import read_card
from fleetfit.runs.report import build_report

torch.set_num_threads(1)

METHODS = ("fleetfit", "paper")
LIMITS = {str(group.cluster): group.storage_limit[0] for group in Job().fleet.devices}


class Digits:
    """A finished run and every message that crossed a link."""

    def __init__(self, method: str, folder: Path) -> None:
        backbone: dict[str, Any] = {"steps": 20, "importance_samples": 64}
        if method == "fleetfit":
            backbone["specialise_steps"] = 20
        fields = {
            "method": method,
            "data": {"limit": 900},
            "model": {"epochs": 4},
            "backbone": backbone,
            "header": {"budget_steps": 100 if method == "fleetfit" else 60},
            "refine": {"epochs": 3, "sketch_samples": 12},
            "run": {"cache": str(folder / "cache")},
        }
        self.job: Job = make_job(fields)
        self.out = folder / method
        self.messages: list[Message] = []

        def encoding(message: Message) -> bytes:
            blob = encode(message)
            self.messages.append(decode_any(blob))
            return blob

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(whole_fleet, "encode", encoding)
            self.summary = fleetfit.run(fields, self.out)
        fleet = {c: [a.device_id for a in members] for c, members in fleet_of(self.job).items()}
        self.data: FleetData = share_out(load_samples(self.job), self.job.data, fleet, self.job.seed)

    def of(self, kind: type[Message]) -> Iterator[Any]:
        return (m for m in self.messages if isinstance(m, kind))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Digits]:
    folder = tmp_path_factory.mktemp("digits")
    return {method: Digits(method, folder) for method in METHODS}


@pytest.fixture(params=METHODS)
def run(request: pytest.FixtureRequest, runs: dict[str, Digits]) -> Digits:
    return runs[request.param]


@pytest.fixture
def paper(runs: dict[str, Digits]) -> Digits:
    return runs["paper"]


def test_every_device_has_a_model_that_fits(run: Digits) -> None:
    assert list(LIMITS) == ["phones", "boxes", "servers"]
    devices = {d["id"]: d for d in run.summary["devices"]}
    assert set(devices) == {f"{c}-{i}" for c in LIMITS for i in range(1, 6)}
    assert {p.name for p in (run.out / "devices").iterdir()} == set(devices)
    for name, device in devices.items():
        card = read_card(run.out / "devices" / name)
        size = (run.out / "devices" / name / "model.safetensors").stat().st_size
        assert size == device["size_bytes"] == card.size_bytes
        assert size <= device["limit_bytes"] == card.limit_bytes == LIMITS[card.cluster]
        assert card.cluster == device["cluster"] == name.partition("-")[0]


def test_a_loaded_model_has_exactly_the_accuracy_of_the_summary(run: Digits) -> None:
    accuracies = []
    for device in run.summary["devices"]:
        model, test = fleetfit.load(run.out / "devices" / device["id"]), run.data.devices[device["id"]].test
        with torch.no_grad():
            right = int((model(test.inputs[:]).argmax(1) == test.labels).sum())
        assert device["accuracy"] == right / len(test)
        assert sum(p.numel() for p in model.parameters()) == device["parameters"]
        accuracies.append(device["accuracy"])
    # Far over chance with the least of training; what it should be is for the benchmarks to say.
    assert sum(accuracies) / 15 > 0.35


def test_the_files_say_what_the_run_returned(run: Digits) -> None:
    assert json.loads((run.out / "summary.json").read_text()) == run.summary
    assert load_job(run.out / "job.toml") == run.job
    steps = [json.loads(line)["step"] for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps))
    of_rounds = [step for step in steps if step.startswith("refine/")]
    assert len(steps) - len(of_rounds) == 3 + 3 * (1 + 1 + 1 + 1 + 1)
    assert 3 * 3 <= len(of_rounds) <= 3 * (run.job.refine.rounds + 1)


def test_the_front_has_every_candidate_of_every_cluster(run: Digits) -> None:
    with (run.out / "cloud" / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 6 * 3
    assert len({(r["cluster"], r["width"], r["depth"]) for r in rows}) == len(rows)
    chosen = {r["cluster"]: r for r in rows if r["chosen"] == "True"}
    assert list(chosen) == list(LIMITS)
    for cluster in run.summary["clusters"]:
        row = chosen[cluster["id"]]
        assert (float(row["width"]), int(row["depth"])) == (cluster["width"], cluster["depth"])
        assert row["fits"] == row["on_front"] == "True"
        assert int(row["size_bytes"]) <= LIMITS[cluster["id"]]
        card = read_card(run.out / "devices" / f"{cluster['id']}-1")
        assert (card.width, card.depth) == (cluster["width"], cluster["depth"])


def test_the_report_is_built(run: Digits) -> None:
    path = build_report(run.out)
    assert path == run.out / "report.html"
    page = path.read_text()
    assert all(d["id"] in page for d in run.summary["devices"])


def test_summary_repeats_the_devices_reports(run: Digits) -> None:
    limits = {c["id"]: c["limit_bytes"] for c in run.summary["clusters"]}
    assert limits == LIMITS
    assert all(
        0 <= d[a] <= 1 for d in run.summary["devices"] for a in ("accuracy", "accuracy_local", "accuracy_coarse")
    )
    assert run.summary["traffic"]["upload_ratio"] > 0


# -- the paper's choices ----------------------------------------------------------------------------------------------


def test_the_paper_s_job_resolves_to_the_paper_s_choices(paper: Digits) -> None:
    resolved = paper.job.model_dump()
    for section, choices in PAPER.items():
        for key, value in choices.items():
            assert resolved[section][key] == value, f"{section}.{key}"
    saved = load_job(paper.out / "job.toml")
    assert saved.refine.exchange == "importance"
    assert saved.method == "paper"


def test_importance_is_sent_per_parameter_and_weights_never(paper: Digits) -> None:
    shapes = {}
    for message in paper.of(CoarseModel):
        shapes[message.header.model_dump_json()] = {n: t.shape for n, t in take(message.tensors, "header").items()}
    replies = list(paper.of(RoundReply))
    assert len(replies) == 15 * paper.job.refine.rounds
    for reply in replies:
        assert all(name.startswith("importance.") for name in reply.tensors)
        assert {n: t.shape for n, t in take(reply.tensors, "importance").items()} in shapes.values()
    rounds = list(paper.of(RefineRound))
    assert {name.partition(".")[0] for m in rounds for name in m.tensors} == {"importance"}


def test_the_search_is_enas_and_trains_the_backbone(paper: Digits) -> None:
    assignments = {m.cluster: take(m.tensors, "backbone") for m in paper.of(BackboneAssignment)}
    coarse = list(paper.of(CoarseModel))
    assert {m.header.kind for m in coarse} == {"blocks"}
    assert {len(m.header.blocks) for m in coarse} == {paper.job.header.max_blocks}
    for cluster, message in zip(assignments, coarse[::5], strict=True):
        sent, trained = assignments[cluster], take(message.tensors, "backbone")
        assert sent.keys() == trained.keys()
        assert any(not torch.equal(sent[n], trained[n]) for n in sent)


def test_the_backbone_is_the_elastic_ones_prefix(paper: Digits) -> None:
    """Spread layers, cut and sent without training of its own."""
    elastic = decode((paper.out / "steps" / "elastic" / "cloud.safetensors").read_bytes(), Elastic)
    assert elastic.depth_order == "spread"
    header = take(elastic.tensors, "header")
    for message in paper.of(BackboneAssignment):
        torch.testing.assert_close(take(message.tensors, "header"), header, rtol=0, atol=0)
        name = "embeddings.patch_embeddings.projection.weight"
        assert torch.equal(message.tensors[f"backbone.{name}"], elastic.tensors[f"backbone.{name}"])


def test_samples_of_features_literal_weights_no_guard_no_prior(paper: Digits) -> None:
    for reply in paper.of(CoarseReply):
        assert {n: len(t) for n, t in reply.tensors.items()} == {"sketch.all": paper.job.refine.sketch_samples}
    for cluster in LIMITS:
        steps = paper.out / "steps"
        decision = decode((steps / "propose" / f"{cluster}.safetensors").read_bytes(), Decision)
        assert decision.way == Way(header="refined")
        assert set(decision.loss_by_way) == {"coarse", "refined"}
        state = decode((steps / "refine" / cluster / "0.safetensors").read_bytes(), EdgeState)
        distance, weights = torch.tensor(state.distance), torch.tensor(state.weights)
        expected = (1 / (1 + distance)).softmax(1)  # symmetric: its own root product
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_our_own_choices_differ_in_what_crosses(runs: dict[str, Digits]) -> None:
    ours = runs["fleetfit"]
    names = {name.partition(".")[0] for m in ours.of(RoundReply) for name in m.tensors}
    assert names == {"change", "level"}
    for reply in ours.of(RoundReply):
        assert all(t.ndim == 1 for t in take(reply.tensors, "importance").values())
    assignments = {m.cluster: take(m.tensors, "backbone") for m in ours.of(BackboneAssignment)}
    for cluster, message in zip(assignments, list(ours.of(CoarseModel))[::5], strict=True):
        torch.testing.assert_close(take(message.tensors, "backbone"), assignments[cluster], rtol=0, atol=0)
