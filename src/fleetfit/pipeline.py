"""The whole paper as two readable functions: the cloud's over its edges, the edge's over its devices.

Both talk through a ``Link`` and know nothing of what carries it. Steps are named "<phase>/<who>[/<round>]".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from fleetfit import cloud, edge
from fleetfit.artifacts import content_hash
from fleetfit.cloud import Candidates, ClusterChoice, Elastic, Reference
from fleetfit.config import Job
from fleetfit.data.partition import Split
from fleetfit.edge import Decision, EdgeState, HeaderResult
from fleetfit.messages import (
    AttributesReply,
    AttributesRequest,
    BackboneAssignment,
    Checkpoints,
    ClusterReport,
    ClusterStats,
    CoarseReply,
    Finish,
    FinishReply,
    Link,
    Message,
    Progress,
    Propose,
    ProposeReply,
    RefineRound,
    Refused,
    Request,
    RoundReply,
    StatsRequest,
)
from fleetfit.models.elastic import Backbone
from fleetfit.models.pretrained import fingerprint

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class FleetResult:
    """All that the cloud knows in the end."""

    reference: Reference
    elastic: Elastic
    candidates: Candidates
    choices: Mapping[str, ClusterChoice]
    reports: Mapping[str, ClusterReport]


def run_cloud(
    job: Job, public: Split, edges: Link, steps: Checkpoints, cache: Checkpoints, progress: Progress
) -> FleetResult:
    """Phase 1 in the cloud, then phase 2 on every edge.

    Args:
        job: The resolved job.
        public: D_c.
        edges: One member per cluster.
        steps: Finished steps of this run.
        cache: Trained references of all runs.
        progress: Told how far each phase is.
    """
    stats = _ask(edges, {cluster: StatsRequest() for cluster in edges.members}, ClusterStats)

    def of(phase: str) -> cloud.ProgressOf:
        return lambda done, total, note: progress(phase, done, total, note)

    reference = steps.step("reference/cloud", Reference, lambda: cached_reference(job, public, cache, of("reference")))
    elastic = steps.step(
        "elastic/cloud", Elastic, lambda: cloud.make_elastic(job, reference, public, of("elastic training"))
    )
    candidates = steps.step(
        "candidates/cloud", Candidates, lambda: cloud.evaluate_candidates(job, elastic, public, of("candidates"))
    )
    num_patches = _num_patches(job, reference)
    choices = {
        cluster: cloud.match(job, candidates.candidates, stats[cluster], cluster, num_patches)
        for cluster in edges.members
    }
    assignments = {}
    for cluster, choice in choices.items():
        shape = candidates.candidates[choice.chosen].shape
        assignments[cluster] = steps.step(
            f"specialise/{cluster}",
            BackboneAssignment,
            lambda cluster=cluster, shape=shape: cloud.cut_and_specialise(  # type: ignore[misc]
                job, reference, elastic, public, cluster, shape, of("specialise")
            ),
        )
    reports = _ask(edges, assignments, ClusterReport)
    return FleetResult(reference, elastic, candidates, choices, reports)


def _ask(link: Link, messages: Mapping[str, Request], kind: type[M]) -> dict[str, M]:
    """The replies of all.

    Raises:
        ValueError: who did not reply, or why a reply was refused.
    """
    replies = {}
    for member, reply in (dict.fromkeys(messages) | link.ask(messages)).items():
        if not isinstance(reply, kind):
            raise ValueError(f"{member}: {reply.reason if isinstance(reply, Refused) else 'no reply'}")
        replies[member] = reply
    return replies


def cached_reference(job: Job, public: Split, cache: Checkpoints, progress: cloud.ProgressOf) -> Reference:
    """The trained reference, from the cache or into it; a training that was stopped is gone on with."""
    key = _reference_key(job, public)
    return cache.step(key, Reference, lambda: cloud.train_reference(job, public, progress, cache.bookmark(key)))


def gather_stats(cluster: str, devices: Link, steps: Checkpoints) -> ClusterStats:
    """The edge's answer to the cloud: its devices' attributes."""

    def ask() -> ClusterStats:
        replies = _ask(devices, {d: AttributesRequest(step=0) for d in devices.members}, AttributesReply)
        return ClusterStats(devices=tuple(r.attributes for r in replies.values()))

    return steps.step(f"attributes/{cluster}", ClusterStats, ask)


def run_edge(
    job: Job, assignment: BackboneAssignment, data: Split, devices: Link, steps: Checkpoints, progress: Progress
) -> ClusterReport:
    """Phase 2 on one edge: search the header, then refine it round by round with the devices.

    Args:
        job: The resolved job.
        assignment: The cluster's backbone.
        data: The edge's shared set.
        devices: The cluster's devices.
        steps: Finished steps of this run.
        progress: Told how far each phase is.
    """
    cluster = assignment.cluster
    stats = gather_stats(cluster, devices, steps)
    limit_bytes = min(d.storage_limit_bytes for d in stats.devices)

    found = steps.step(
        f"header_search/{cluster}",
        HeaderResult,
        lambda: edge.find_header(
            job, assignment, data, limit_bytes, lambda i, n, note: progress("header search", i, n, note)
        ),
    )

    return refine_cluster(job, assignment, found, data, devices, steps, progress)


def refine_cluster(
    job: Job,
    assignment: BackboneAssignment,
    found: HeaderResult,
    data: Split,
    devices: Link,
    steps: Checkpoints,
    progress: Progress,
) -> ClusterReport:
    """Phase 2-2 on one edge (Algorithm 2): send the coarse model, T rounds, decide together what to ship, finish."""
    cluster = assignment.cluster
    total = job.refine.rounds + 3
    progress("refine", 0, total, f"{cluster}: coarse model")

    def send_coarse() -> EdgeState:
        message = edge.coarse_model(job, assignment, found, data, step=1)
        return edge.first_state(job.refine, _ask(devices, dict.fromkeys(devices.members, message), CoarseReply))

    state = steps.step(f"refine/{cluster}/0", EdgeState, send_coarse)
    history = [state]
    for number in range(1, job.refine.rounds + 1):
        progress("refine", number, total, f"{cluster}: round {number} of {job.refine.rounds}")

        def one_round(number: int = number, state: EdgeState = state) -> EdgeState:
            asked = {
                d: RefineRound(step=1 + number, round=number, tensors=edge.personal(state, d)) for d in devices.members
            }
            return edge.next_state(state, _ask(devices, asked, RoundReply))

        state = steps.step(f"refine/{cluster}/{number}", EdgeState, one_round)
        history.append(state)

    last = 2 + job.refine.rounds
    progress("refine", last - 1, total, f"{cluster}: what to ship")

    def propose() -> Decision:
        asked = {d: Propose(step=last, tensors=edge.personal(state, d)) for d in devices.members}
        return edge.decide(job.refine, _ask(devices, asked, ProposeReply))

    decision = steps.step(f"propose/{cluster}", Decision, propose)

    def finish() -> ClusterReport:
        message = Finish(step=last + 1, header=decision.header, prior_strength=decision.prior_strength)
        replies = _ask(devices, dict.fromkeys(devices.members, message), FinishReply)
        return _report(cluster, found, history, decision, replies)

    report = steps.step(f"finish/{cluster}", ClusterReport, finish)
    progress("refine", total, total, f"{cluster}: done")
    return report


def _report(
    cluster: str,
    found: HeaderResult,
    history: list[EdgeState],
    decision: Decision,
    reports: Mapping[str, FinishReply],
) -> ClusterReport:
    return ClusterReport(
        cluster=cluster,
        header=found.header,
        trials=found.trials,
        similarity=history[-1].weights,
        distance=history[-1].distance,
        rounds=tuple({"round": s.round, **s.scores.model_dump()} for s in history),
        decision=decision.model_dump(),
        devices=tuple(r.report for r in reports.values()),
    )


def _reference_key(job: Job, public: Split) -> str:
    """Changes with what the reference depends on: its own settings, its start, the public samples, the seed."""
    start = fingerprint(job.model.pretrained) if job.model.pretrained else ""
    channels = job.header.channels if job.model.header == "pooled" else None  # of its own header
    shares = job.data.model_dump(include={"public_share", "test_share", "edge_share", "validation_share"})
    return (
        f"reference/{content_hash(job.model.model_dump(), channels, start, public.train.fingerprint, shares, job.seed)}"
    )


def _num_patches(job: Job, reference: Reference) -> int:
    """p of Eq. 1: grid tokens of one sample."""
    with torch.device("meta"):
        rows, columns = Backbone(job.model.family, reference.config).feature_shape.grid
    return rows * columns
