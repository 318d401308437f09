"""The whole paper as two readable functions: the cloud's over its edges, the edge's over its devices.

Both talk through a ``Link`` and know nothing of what carries it. Steps are named "<phase>/<who>[/<round>]".
"""

from collections.abc import Mapping, Sequence

from fleetfit.config.job import Job
from fleetfit.core.checkpoints import Checkpoints
from fleetfit.core.encoding import Message, take
from fleetfit.core.files import differences
from fleetfit.core.link import Handler, Link
from fleetfit.core.progress import Progress
from fleetfit.core.records import (
    AbsentDevice,
    DeviceAttributes,
    Fault,
    JsonDict,
    counted,
)
from fleetfit.data.partition import Split
from fleetfit.data.shifts import hidden_groups
from fleetfit.device.messages import (
    ATTRIBUTES_STEP,
    AttributesReply,
    AttributesRequest,
    CoarseReply,
    Finish,
    FinishReply,
    Propose,
    ProposeReply,
    RefineRound,
    RoundReply,
    finish_step,
    propose_step,
    round_step,
)
from fleetfit.edge import header as edge
from fleetfit.edge import rounds, shipping
from fleetfit.edge.checks import expected_of
from fleetfit.edge.header import HeaderResult
from fleetfit.edge.messages import BackboneAssignment, ClusterReport, ClusterStats, StatsRequest
from fleetfit.edge.polling import Cluster
from fleetfit.edge.rounds import EdgeState
from fleetfit.edge.shipping import Decision


def gather_stats(
    job: Job,
    cluster: str,
    devices: Link,
    steps: Checkpoints,
    known: Mapping[str, DeviceAttributes] | None = None,
) -> ClusterStats:
    """The edge's answer to the cloud: its devices' attributes.

    Args:
        job: The resolved job.
        cluster: Its name.
        devices: The cluster's devices.
        steps: Finished steps of this run.
        known: What is known of devices' hardware, where it is: that counts, and what a device says otherwise is told.
    """

    def ask() -> ClusterStats:
        everybody = devices.members
        came = Cluster(cluster, devices, job.links).ask(
            "attributes", AttributesReply, lambda _: AttributesRequest(step=ATTRIBUTES_STEP), everybody
        )
        taken = [_as_known(r.attributes, (known or {}).get(d)) for d, r in came.replies.items()]
        return ClusterStats(
            devices=tuple(attributes for attributes, _ in taken),
            silent=tuple(d for d in everybody if d not in came.replies),
            faults=(*came.faults, *(fault for _, fault in taken if fault is not None)),
        )

    return steps.step(f"attributes/{cluster}", ClusterStats, ask)


def _as_known(said: DeviceAttributes, known: DeviceAttributes | None) -> tuple[DeviceAttributes, Fault | None]:
    """A device's attributes as they count; only the number of its samples is its own to say."""
    if known is None:
        return said, None
    counts = known.model_copy(update={"num_samples": said.num_samples})
    differing = differences(said.model_dump(), counts.model_dump())
    if not differing:
        return counts, None
    told = f"it says another {', '.join(differing[:3])} than its edge's kit has, which counts"
    return counts, Fault(device_id=said.device_id, step="attributes", reason=told, times=1, recovered=True)


def run_edge(
    job: Job,
    assignment: BackboneAssignment,
    data: Split,
    devices: Link,
    steps: Checkpoints,
    progress: Progress,
    cache: Checkpoints | None = None,
) -> ClusterReport:
    """Phase 2 on one edge: search the header, then refine it round by round with the devices.

    Args:
        job: The resolved job.
        assignment: The cluster's backbone.
        data: The edge's shared set.
        devices: The cluster's devices.
        steps: Finished steps of this run.
        progress: Told how far each phase is.
        cache: Results of header searches, of all runs; None: what is searched is kept with this run only.
    """
    cluster = assignment.cluster

    def told(done: int, total: int, note: str) -> None:
        progress("header search", done, total, note)

    stats = gather_stats(job, cluster, devices, steps)
    too_small = edge.too_small(job, assignment, stats)
    if len(too_small) == len(stats.devices):
        raise ValueError(f"{cluster}: its backbone fits none of its devices")
    limit_bytes = min(d.storage_limit_bytes for d in stats.devices if d.device_id not in too_small)

    found = steps.step(
        f"header_search/{cluster}",
        HeaderResult,
        lambda: (
            edge.cached_header(job, assignment, data, limit_bytes, cache, told)
            if cache
            else edge.find_header(job, assignment, data, limit_bytes, told)
        ),
    )

    return refine_cluster(job, assignment, stats, found, data, devices, steps, progress)


def refine_cluster(
    job: Job,
    assignment: BackboneAssignment,
    stats: ClusterStats,
    found: HeaderResult,
    data: Split,
    devices: Link,
    steps: Checkpoints,
    progress: Progress,
) -> ClusterReport:
    """Phase 2-2 on one edge (Algorithm 2): send the coarse model, T rounds, decide together what to ship, finish.

    Each step goes on with those devices that reply. Who missed a step is asked the next one all the same, with what the
    edge last knew for it; who has not got the coarse model gets it first.
    """
    name = assignment.cluster
    total = finish_step(job.refine.rounds)
    progress("refine", 0, total, f"{name}: coarse model")
    if told := edge.pruning_note(job, assignment, found):
        progress("pruning", 1, 1, f"{name}: {told}")
    coarse = edge.coarse_model(job, assignment, found)
    known = {a.device_id: a for a in stats.devices}
    expected = expected_of(coarse, known, job.privacy, job.links.send_models)
    too_small = edge.too_small(job, assignment, stats)
    cluster = Cluster(name, devices, job.links, expected, coarse, frozenset(too_small))
    sent, num_classes = take(coarse.tensors, "header"), len(assignment.labels)
    hidden = hidden_groups(job.data, name, devices.members, job.seed) if job.refine.similarity == "oracle" else None

    def send_coarse() -> EdgeState:
        came = cluster.ask("coarse model", CoarseReply, lambda _: coarse, devices.members)
        return rounds.first_state(job.refine, came.replies, hidden).model_copy(update={"faults": came.faults})

    state = steps.step(f"refine/{name}/0", EdgeState, send_coarse)
    history, tracker = [_without_tensors(state)], rounds.RoundTracker()
    for number in range(1, job.refine.rounds + 1):
        progress("refine", number, total, f"{name}: round {number} of {job.refine.rounds}")

        def one_round(number: int = number, state: EdgeState = state) -> EdgeState:
            def question(device: str) -> RefineRound:
                return RefineRound(step=round_step(number), round=number, tensors=rounds.personal(state, device))

            came = cluster.ask(f"round {number}", RoundReply, question, state.devices)
            state = rounds.with_joined(job.refine, state, came.joined, devices.members, hidden)
            robust = job.members.robust
            state = rounds.next_state(job.refine, state, came.replies, sent, robust=robust, num_classes=num_classes)
            return state.model_copy(update={"faults": (*came.faults, *state.faults)})

        before, state = state, steps.step(f"refine/{name}/{number}", EdgeState, one_round)
        history.append(_without_tensors(state))
        tracker.see(before, state)
        if job.refine.settle and tracker.settled:
            progress("refine", number, total, f"{name}: settled after {counted(number, 'rounds')}")
            break
    best = tracker.best if job.refine.settle and tracker.settled and tracker.best is not None else state

    last = propose_step(job.refine.rounds)
    progress("refine", last - 1, total, f"{name}: what to ship")

    def propose() -> Decision:
        def question(device: str) -> Propose:
            return Propose(step=last, tensors=rounds.personal(best, device))

        came = cluster.ask("proposal", ProposeReply, question, state.devices)
        decision = shipping.decide(
            job.refine, came.replies, state.groups, num_classes, robust=job.members.robust, private=job.privacy.on
        )
        return decision.model_copy(
            update={"devices": tuple(came.replies), "joined": tuple(came.joined), "faults": came.faults}
        )

    decision = steps.step(f"propose/{name}", Decision, propose)

    def finish() -> ClusterReport:
        def question(device: str) -> Finish:
            missed = {} if device in decision.devices else rounds.personal(best, device)
            return Finish(step=total, way=decision.way_of(device), tensors=missed)

        came = cluster.ask("finish", FinishReply, question, (*state.devices, *decision.joined))
        of_rounds = [f for state in history for f in state.faults]
        faults = (*stats.faults, *too_small.values(), *of_rounds, *decision.faults, *came.faults)
        return _report(cluster, found, history, state, decision, came.replies, faults)

    report = steps.step(f"finish/{name}", ClusterReport, finish)
    progress("refine", total, total, f"{name}: done")
    return report


def _report(
    cluster: Cluster,
    found: HeaderResult,
    history: Sequence[EdgeState],
    state: EdgeState,
    decision: Decision,
    replies: Mapping[str, FinishReply],
    faults: Sequence[Fault],
) -> ClusterReport:
    steps = ["attributes", "coarse model", *(f"round {s.round}" for s in history[1:]), "proposal", "finish"]
    absent = [d for d in cluster.devices.members if d not in replies]
    since = {d: "coarse model" if d in cluster.left_out else absent_since(d, steps, faults) for d in absent}
    models = {f"{device}/{name}": t for device, reply in replies.items() for name, t in reply.tensors.items()}
    if models:
        models |= {name: t for name, t in found.tensors.items() if name.startswith("backbone.")}
    return ClusterReport(
        cluster=cluster.name,
        header=found.header,
        trials=found.trials,
        similarity=rounds.weights_among(state, replies).tolist(),
        distance=rounds.distance_among(state, replies),
        rounds=tuple({"round": s.round, **s.scores.model_dump(), "came": _came(s)} for s in history),
        decision=decision.model_dump(mode="json", include={"way", "loss_by_way", "groups"})
        | {
            "grouping": state.grouping,
            "num_found": state.num_found,
            "silhouettes": {str(k): v for k, v in state.silhouettes.items()},
        },
        devices=tuple(r.report for r in replies.values()),
        absent=tuple(AbsentDevice(device_id=d, since=since[d]) for d in absent),
        faults=tuple(faults),
        tensors=models,
    )


def _without_tensors(state: EdgeState) -> EdgeState:
    """What the report needs of a round that is over."""
    return state.model_copy(update={"tensors": {}})


def _came(state: EdgeState) -> JsonDict:
    """Pooled scores of what devices were sent before this round."""
    scores: JsonDict = rounds.pooled(list(state.came.values())).model_dump()
    return scores


def absent_since(device: str, steps: Sequence[str], faults: Sequence[Fault]) -> str:
    """The first of the steps that a device missed without coming back."""
    missed = {f.step for f in faults if f.device_id == device and not f.recovered}
    heard = max((place for place, step in enumerate(steps[:-1]) if step not in missed), default=-1)
    return steps[heard + 1]


def edge_handler(
    job: Job,
    cluster: str,
    data: Split,
    devices: Link,
    steps: Checkpoints,
    progress: Progress,
    known: Mapping[str, DeviceAttributes] | None = None,
    cache: Checkpoints | None = None,
) -> Handler:
    """An edge that goes on from its finished steps: asked again after a kill, it does what is left.

    Args:
        job: The resolved job.
        cluster: Its name.
        data: The edge's shared set.
        devices: The cluster's devices.
        steps: Finished steps of this run.
        progress: Told how far each phase is.
        known: What is known of the devices' hardware, whatever they say.
        cache: Results of header searches, of all runs.
    """

    def answer(message: Message) -> Message:
        if isinstance(message, StatsRequest):
            return gather_stats(job, cluster, devices, steps, known)
        if isinstance(message, BackboneAssignment):
            return run_edge(job, message, data, devices, steps, progress, cache)
        raise ValueError(f"edge {cluster}: cannot answer a {message.kind!r}")

    return answer
