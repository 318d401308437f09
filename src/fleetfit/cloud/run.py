"""The cloud: reference, elastic backbone, candidates, the choice for each cluster, and the question to the edges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fleetfit.cloud import candidates as cloud_candidates
from fleetfit.cloud import elastic as cloud_elastic
from fleetfit.cloud.candidates import Candidates, ClusterChoice
from fleetfit.cloud.checks import check_cluster_report, check_stats
from fleetfit.cloud.elastic import Elastic
from fleetfit.cloud.reference import ProgressOf, Reference, train_reference
from fleetfit.config.job import Job, narrowed, reads_of
from fleetfit.core.bounds import from_edge
from fleetfit.core.checkpoints import Checkpoints
from fleetfit.core.encoding import Message, Request
from fleetfit.core.files import content_hash
from fleetfit.core.link import Link, Refused
from fleetfit.core.progress import Progress
from fleetfit.core.records import (
    BackboneShape,
    LeftOut,
)
from fleetfit.core.step_cache import cached, code_of, content_of
from fleetfit.data.partition import Split
from fleetfit.edge.messages import BackboneAssignment, ClusterReport, ClusterStats, StatsRequest
from fleetfit.edge.polling import ATTEMPTS, NO_REPLY
from fleetfit.models.families import feature_shape_of
from fleetfit.models.pretrained import fingerprint, other_split


@dataclass(frozen=True)
class FleetResult:
    """All that the cloud knows in the end."""

    reference: Reference
    elastic: Elastic
    candidates: Candidates
    choices: Mapping[str, ClusterChoice]
    reports: Mapping[str, ClusterReport]
    left_out: Sequence[LeftOut] = ()


def run_cloud(
    job: Job, public: Split, edges: Link, steps: Checkpoints, cache: Checkpoints, progress: Progress
) -> FleetResult:
    """Phase 1 in the cloud, then phase 2 on every edge.

    Args:
        job: The resolved job.
        public: D_c.
        edges: One member per cluster.
        steps: Finished steps of this run.
        cache: Results of the cloud's steps, of all runs.
        progress: Told how far each phase is.
    """
    if told := other_split(job.model.pretrained, job.data.model_dump(mode="json"), job.seed):
        progress("checkpoint", 1, 1, told)
    stats = ask_edges(edges, {cluster: StatsRequest() for cluster in edges.members}, ClusterStats)
    check_stats(stats)
    sized = cloud_candidates.sized_shapes(job, public.train)
    kept, left_out = cloud_candidates.with_room(job, sized, stats)
    for device in left_out:
        progress("left out", 0, 0, f"{device.device_id}: {device.reason}")

    def of(phase: str) -> ProgressOf:
        return lambda done, total, note: progress(phase, done, total, note)

    reference = steps.step("reference/cloud", Reference, lambda: cached_reference(job, public, cache, of("reference")))
    elastic = steps.step(
        "elastic/cloud", Elastic, lambda: cached_elastic(job, reference, public, cache, of("elastic training"))
    )
    candidates = steps.step(
        "candidates/cloud", Candidates, lambda: cached_candidates(job, elastic, public, cache, of("candidates"))
    )
    num_patches = _num_patches(job, reference)
    choices = {
        cluster: cloud_candidates.match(
            job,
            candidates.candidates,
            devices,
            cluster,
            num_patches,
            cloud_candidates.shapes_within(job, sized, devices.devices),
        )
        for cluster, devices in kept.items()
    }
    assignments: dict[str, BackboneAssignment] = {}
    by_shape: dict[BackboneShape, BackboneAssignment] = {}

    def specialised(cluster: str, shape: BackboneShape) -> BackboneAssignment:
        if same := by_shape.get(shape):  # nothing about the cluster goes into it but its name
            return same.model_copy(update={"cluster": cluster})
        return cached_specialised(job, reference, elastic, public, cluster, shape, cache, of("specialise"))

    for cluster, choice in choices.items():
        shape = candidates.candidates[choice.chosen].shape
        assignments[cluster] = by_shape[shape] = steps.step(
            f"specialise/{cluster}",
            BackboneAssignment,
            lambda cluster=cluster, shape=shape: specialised(cluster, shape),  # type: ignore[misc]
        )
    most = max(len(s.devices) + len(s.silent) for s in stats.values())
    reports = ask_edges(edges, assignments, ClusterReport, most)
    for cluster, report in reports.items():
        check_cluster_report(cluster, report, stats[cluster])
    return FleetResult(reference, elastic, candidates, choices, reports, left_out)


OF_PUBLIC_DATA = ("data.public_share", "data.test_share", "data.edge_share", "data.validation_share")
OF_MODEL = ("model.family", "model.header", "header.channels")
OF_ELASTIC = (
    *("seed", *OF_MODEL, "model.shift_pixels", "model.flip", "backbone.widths", "backbone.depths"),
    *("backbone.importance", "backbone.importance_samples", "backbone.depth_order", "backbone.distillation"),
    *("backbone.steps", "backbone.batch_size", "backbone.learning_rate"),
    *("backbone.weight_logits", "backbone.weight_embeddings", "run.precision"),
)
OF_CANDIDATES = ("seed", *OF_MODEL, "backbone.widths", "backbone.depths")
OF_SPECIALISED = (
    *("seed", *OF_MODEL, "model.shift_pixels", "model.flip", "backbone.specialise_steps"),
    *("backbone.batch_size", "backbone.learning_rate", "backbone.weight_logits", "run.precision"),
)
CODE = ("cloud", "models", "method", "data", "core")


def cached_reference(job: Job, public: Split, cache: Checkpoints, progress: ProgressOf) -> Reference:
    """The trained reference, from the cache or into it; a training that was stopped is resumed."""
    return cached(
        cache,
        "reference",
        reference_reads(job, public),
        Reference,
        lambda bookmark: train_reference(job, public, progress, bookmark),
    )


def reference_reads(job: Job, public: Split) -> dict[str, object]:
    """What the reference depends on: its own settings, its start, the public samples, the seed."""
    start = fingerprint(job.model.pretrained) if job.model.pretrained else ""
    own = {f"model.{name}": value for name, value in job.model.model_dump(mode="json").items()}
    if job.model.header == "pooled":  # its own header has them
        own["header.channels"] = job.header.channels
    samples = {"public samples": public.train.fingerprint}
    return own | samples | reads_of(job, ("seed", *OF_PUBLIC_DATA)) | {"pretrained weights": start}


def reference_key(job: Job, public: Split) -> str:
    """Its name in the cache."""
    return f"reference/{content_hash(reference_reads(job, public))}"


def cached_elastic(job: Job, reference: Reference, public: Split, cache: Checkpoints, progress: ProgressOf) -> Elastic:
    """The elastic backbone, from the cache or into it."""
    reads = reads_of(job, OF_ELASTIC) | {"reference": content_of(reference), "public samples": public.fingerprint}
    own = narrowed(job, OF_ELASTIC)
    return cached(
        cache,
        "elastic",
        reads | {"fleetfit's code": code_of(*CODE)},
        Elastic,
        lambda bookmark: cloud_elastic.make_elastic(own, reference, public, progress, bookmark),
    )


def cached_candidates(
    job: Job, elastic: Elastic, public: Split, cache: Checkpoints, progress: ProgressOf
) -> Candidates:
    """All candidates with their losses, from the cache or into it."""
    reads = reads_of(job, OF_CANDIDATES) | {"elastic backbone": content_of(elastic)}
    own = narrowed(job, OF_CANDIDATES)
    return cached(
        cache,
        "candidates",
        reads | {"public samples": public.fingerprint, "fleetfit's code": code_of(*CODE)},
        Candidates,
        lambda _: cloud_candidates.evaluate_candidates(own, elastic, public, progress),
    )


def cached_specialised(
    job: Job,
    reference: Reference,
    elastic: Elastic,
    public: Split,
    cluster: str,
    shape: BackboneShape,
    cache: Checkpoints,
    progress: ProgressOf,
) -> BackboneAssignment:
    """A cluster's backbone, from the cache or into it; nothing about the cluster goes into it but its name."""
    inputs: dict[str, object] = {"reference": content_of(reference), "elastic backbone": content_of(elastic)}
    inputs |= {"public samples": public.fingerprint, "width": shape.width, "depth": shape.depth}
    own = narrowed(job, OF_SPECIALISED)
    found = cached(
        cache,
        "specialise",
        reads_of(job, OF_SPECIALISED) | inputs | {"fleetfit's code": code_of(*CODE)},
        BackboneAssignment,
        lambda bookmark: cloud_elastic.cut_and_specialise(
            own, reference, elastic, public, cluster, shape, progress, bookmark
        ),
    )
    return found.model_copy(update={"cluster": cluster})


def _num_patches(job: Job, reference: Reference) -> int:
    """p of Eq. 1: grid tokens of one sample."""
    rows, columns = feature_shape_of(job.model.family, reference.config).grid
    return rows * columns


M = TypeVar("M", bound=Message)


def ask_edges(edges: Link, messages: Mapping[str, Request], kind: type[M], num_devices: int = 0) -> dict[str, M]:
    """Every edge's reply. A cluster cannot do without its edge, so the cloud cannot go on without one.

    Args:
        edges: Their link.
        messages: What each is asked.
        kind: Of a reply.
        num_devices: The most whose models or similarities one of them may report.

    Raises:
        ValueError: an edge did not reply, or not validly, after some attempts; names it, and why.
    """
    replies: dict[str, M] = {}
    reasons: dict[str, str] = {}
    for _ in range(ATTEMPTS):
        asked = {e: m for e, m in messages.items() if e not in replies}
        for edge, reply in edges.ask(asked, from_edge(num_devices)).items():
            if isinstance(reply, kind):
                replies[edge] = reply
            elif isinstance(reply, Refused):
                reasons[edge] = reply.reason
        missing = [e for e in messages if e not in replies]
        if not missing:
            return {e: replies[e] for e in messages}
    told = "; ".join(f"{e} ({reasons.get(e, NO_REPLY)})" for e in missing)
    raise ValueError(f"edges are missing: {told}. Run again when they are back: it goes on from here")
