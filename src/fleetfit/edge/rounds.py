"""The edge's rounds of Phase 2-2: who is like whom, what each device's average is made of, and when to end.

Weights of Eq. 21 come from what devices show of their features (Eqs. 19-20), from their class counts, or (Beyond) from
the changes that they make to the header in their first, free training: devices with like changes form a group.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fleetfit.config.sections import RefineConfig
from fleetfit.core.encoding import Message, put, take
from fleetfit.core.records import Fault, ValidationScores
from fleetfit.device.messages import CoarseReply, RoundReply, header_of
from fleetfit.method.aggregation import aggregate, alone_weights, average_weights, unit_sum
from fleetfit.method.groups import CLEAR_SILHOUETTE, cosine_of_changes, group_weights, groups_of
from fleetfit.method.noise import flat, noise_of_sum
from fleetfit.method.robust import FACTOR, paired, shortened
from fleetfit.method.similarity import (
    calibrated_weights,
    distance_matrix,
    js_divergence,
    self_distances,
    similarity_weights,
    sliced_wasserstein,
    wasserstein,
)

JS_BINS = 8
SETTLED_SHARE = 0.02  # of the loss: less than that is no progress, nor is
SETTLED_NATS = 0.003
ERRORS_OF_GROUPS = 2.0  # standard errors by which averages inside groups must be better than one over all


class EdgeState(Message):
    """What the edge knows between rounds.

    Tensors: ``<device>/importance.*`` and ``<device>/header.*``, personal; ``<device>/sketch.*``, as it came;
    ``<device>/change``, of its header in its first training; ``<device>/average.*``, of the whole cluster, while it is
    not known whether groups are better; of groups that are not clear this is the groups', and the header the cluster's.
    """

    kind: ClassVar[str] = "edge_state"
    round: int = 0
    devices: tuple[str, ...] = Field(
        (), description="those that have the coarse model: rows and columns of what follows"
    )
    distance: tuple[tuple[float, ...], ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    groups: dict[str, int] = Field(default_factory=dict, description="device -> group, of those that showed a change")
    silhouettes: dict[int, float] = Field(default_factory=dict, description="by number of groups")
    num_found: int = Field(1, description="how many groups the changes showed, kept or not")
    grouping: Literal["", "one", "found", "kept", "dropped"] = Field("", description="what is known of the groups")
    scores: ValidationScores = Field(description="the cluster's pooled validation scores when this state was made")
    came: dict[str, ValidationScores] = Field(
        default_factory=dict, description="of the headers that devices were sent before this round, with their priors"
    )
    faults: tuple[Fault, ...] = Field((), description="of this round")


def pooled(scores: Sequence[ValidationScores]) -> ValidationScores:
    """Several devices' scores as one."""
    return ValidationScores(
        num_samples=sum(s.num_samples for s in scores),
        loss_sum=sum(s.loss_sum for s in scores),
        num_correct=sum(s.num_correct for s in scores),
    )


def weigh_devices(
    refine: RefineConfig, sketches: Sequence[Mapping[str, Tensor]], hidden_groups: Sequence[int] = ()
) -> tuple[Float[Tensor, "device peer"], Float[Tensor, "device peer"]]:
    """How alike devices are: (distances, weights of Eq. 21), both [device, peer].

    With one device, or for alone, average and oracle, nothing is measured and the distances are 0. For ``updates`` all
    count alike until changes are known.

    Args:
        refine: The similarity.
        sketches: What the devices have shown.
        hidden_groups: Of a simulated fleet, for ``oracle``.
    """
    number = len(sketches)
    nothing = torch.zeros(number, number)
    if refine.similarity == "alone" or number == 1:
        return nothing, alone_weights(number)
    if refine.similarity in ("average", "updates"):
        return nothing, average_weights(number)
    if refine.similarity == "oracle":
        return nothing, group_weights(tuple(hidden_groups))
    if refine.similarity == "labels":
        return _by_labels(torch.stack([sketch["counts"] for sketch in sketches]))
    whole = [sketch["all"] for sketch in sketches]
    if refine.similarity == "js":
        distance = distance_matrix(whole, lambda a, b: js_divergence(a, b, JS_BINS))
        return distance, similarity_weights(distance)
    measure = sliced_wasserstein if refine.sketch == "sliced" else wasserstein
    distance = distance_matrix(whole, measure)
    if refine.similarity == "wasserstein":
        return distance, similarity_weights(distance)
    if refine.sketch == "sliced":
        within = torch.tensor([measure(s["first"], s["second"]) for s in sketches], dtype=torch.float64)
    else:
        # A device with one sample cannot show its own noise; it takes the cluster's mean below.
        within = self_distances([torch.cat([w, w]) if len(w) < 2 else w for w in whole], measure)
    known = within[within > 0]
    if len(known) == 0:
        return distance, average_weights(number)
    within = torch.where(within > 0, within, known.mean())
    return distance, calibrated_weights(distance, within, refine.temperature)


def _by_labels(counts: Float[Tensor, "device class"]) -> tuple[Tensor, Tensor]:
    """Cosines of class counts as weights; who has no samples is like nobody but itself."""
    unit = counts.double() / counts.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosine = (unit @ unit.T).clamp(0, 1).fill_diagonal_(1.0)
    return 1 - cosine, cosine / cosine.sum(dim=1, keepdim=True)


def first_state(
    refine: RefineConfig, replies: Mapping[str, CoarseReply], hidden_groups: Mapping[str, int] | None = None
) -> EdgeState:
    """What the edge knows after the devices have got the coarse model."""
    state = EdgeState(scores=pooled([r.scores for r in replies.values()]))
    return with_joined(refine, state, replies, tuple(replies), hidden_groups)


def with_joined(
    refine: RefineConfig,
    state: EdgeState,
    replies: Mapping[str, CoarseReply],
    order: Sequence[str],
    hidden_groups: Mapping[str, int] | None = None,
) -> EdgeState:
    """The state with the devices that have got the coarse model just now; all are weighed again, in this order."""
    if not replies:
        return state
    tensors = dict(state.tensors)
    for device, reply in replies.items():
        tensors |= put(f"{device}/sketch", take(reply.tensors, "sketch"))
    devices = tuple(d for d in order if d in state.devices or d in replies)
    if refine.similarity == "updates":
        return _weighed(state.model_copy(update={"devices": devices, "tensors": tensors}))
    hidden = [hidden_groups.get(d, 0) for d in devices] if hidden_groups else []
    distance, weights = weigh_devices(refine, [take(tensors, f"{d}/sketch") for d in devices], hidden)
    return state.model_copy(
        update={
            "devices": devices,
            "groups": dict(zip(devices, hidden, strict=True)) if hidden else {},
            "distance": _tuples(distance),
            "weights": _tuples(weights),
            "tensors": tensors,
        }
    )


def _tuples(matrix: Float[Tensor, "device peer"]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _weighed(state: EdgeState) -> EdgeState:
    """Weights from groups: who has shown no change yet gets the average over all."""
    devices = state.devices
    weights = average_weights(len(devices))
    for row, device in enumerate(devices):
        if device in state.groups:
            same = [float(state.groups.get(d) == state.groups[device]) for d in devices]
            weights[row] = torch.tensor(same) / sum(same)
    return state.model_copy(update={"weights": _tuples(weights), "distance": _tuples(_change_distance(state))})


def _change_distance(state: EdgeState) -> Float[Tensor, "device peer"]:
    """1 - cosine of the first changes; 1 from and to who has shown none."""
    known = [i for i, d in enumerate(state.devices) if f"{d}/change" in state.tensors]
    distance = torch.ones(len(state.devices), len(state.devices), dtype=torch.float64).fill_diagonal_(0)
    if known:
        changes = torch.stack([state.tensors[f"{state.devices[i]}/change"] for i in known])
        distance[torch.tensor(known)[:, None], torch.tensor(known)] = 1 - cosine_of_changes(changes)
    return distance


def grouped(state: EdgeState, changes: Mapping[str, Float[Tensor, " value"]], noised: bool = False) -> EdgeState:
    """The state after devices' first changes have come: the first time groups are found, later ones join the nearest.

    Groups stay as they are from then on: a device's first training starts where all others' did, what follows does not.

    Args:
        state: Before.
        changes: To the header, of each device.
        noised: The changes are, and nobody will say on held-out samples what groups are worth: only clear ones count.
    """
    new = {d: change.float() for d, change in changes.items() if f"{d}/change" not in state.tensors}
    if not new:
        return state
    state = state.model_copy(update={"tensors": state.tensors | {f"{d}/change": change for d, change in new.items()}})
    known = [d for d in state.devices if f"{d}/change" in state.tensors]
    if not state.groups:
        cosine = cosine_of_changes(torch.stack([state.tensors[f"{d}/change"] for d in known]))
        found = groups_of(cosine, CLEAR_SILHOUETTE if noised else 0.0)
        update = {
            "groups": dict(zip(known, found.of_device, strict=True)),
            "silhouettes": found.silhouettes,
            "num_found": found.number,
            "grouping": "found" if found.number > 1 else "one",
        }
        return _weighed(state.model_copy(update=update))
    distance = _change_distance(state)
    groups = dict(state.groups)
    for device in new:
        own = distance[state.devices.index(device)]
        mean = {
            group: float(torch.stack([own[state.devices.index(d)] for d in groups if groups[d] == group]).mean())
            for group in sorted(set(state.groups.values()))
        }
        groups[device] = min(mean, key=mean.__getitem__)
    return _weighed(state.model_copy(update={"groups": groups}))


def groups_checked(state: EdgeState, replies: Mapping[str, RoundReply], ceiling: float) -> EdgeState:
    """Keep the groups that were found only if averages inside them do clearly better than the average over all.

    Groups that are not clear are on trial: devices go on from the average over all, and score that of their group
    beside it, so that groups which are none cost nothing but that.

    Devices have scored both on their validation splits, paired. Where nobody has (``[privacy]``), the groups stay if
    they are clear.

    Args:
        state: After the round in which groups were found.
        replies: Of the next round.
        ceiling: The most that a device's mean difference may count, in nats.
    """
    if state.grouping != "found":
        return state
    both = [r for r in replies.values() if r.average.num_samples and r.came.num_samples == r.average.num_samples]
    if not both and _is_clear(state):
        return state
    mean, error = 0.0, math.inf
    if both:
        numbers = torch.tensor([float(r.came.num_samples) for r in both])
        sums = torch.tensor([r.came.loss_sum - r.average.loss_sum for r in both], dtype=torch.float64)
        mean, error = paired(sums / numbers, numbers, ceiling)
        mean = mean if _is_clear(state) else -mean  # groups on trial are the other header
    without = {name: t for name, t in state.tensors.items() if "/average." not in name}
    state = state.model_copy(update={"tensors": without})
    if math.isfinite(error) and mean < -ERRORS_OF_GROUPS * error:
        return state.model_copy(update={"grouping": "kept"})
    return _weighed(state.model_copy(update={"grouping": "dropped", "groups": dict.fromkeys(state.groups, 0)}))


def _is_clear(state: EdgeState) -> bool:
    """Whether groups show so clearly that devices go on from their averages at once."""
    return state.silhouettes.get(state.num_found, 1.0) > CLEAR_SILHOUETTE


def weights_among(state: EdgeState, devices: Collection[str]) -> Float[Tensor, "device peer"]:
    """Weights of these devices for each other, [device, peer]; where others are left out, rows sum to 1 again.

    Who has never been weighed listens to itself.
    """
    weights = torch.tensor(state.weights, dtype=torch.float64)
    if tuple(devices) == state.devices:
        return weights
    among = alone_weights(len(devices))
    for row, device in enumerate(devices):
        if device in state.devices:
            own = weights[state.devices.index(device)]
            known = {d: own[i] for i, d in enumerate(state.devices) if d in devices}
            among[row] = torch.stack([known.get(d, torch.zeros_like(own[0])) for d in devices]) / sum(known.values())
    return among


def distance_among(state: EdgeState, devices: Collection[str]) -> tuple[tuple[float, ...], ...]:
    """Distances of these devices, [device, peer]; 0 from and to who has never been weighed."""
    place = {device: i for i, device in enumerate(state.devices)}
    return tuple(
        tuple(state.distance[place[a]][place[b]] if a in place and b in place else 0.0 for b in devices)
        for a in devices
    )


def next_state(
    refine: RefineConfig,
    state: EdgeState,
    replies: Mapping[str, RoundReply],
    sent: Mapping[str, Tensor],
    *,
    robust: bool,
    num_classes: int,
) -> EdgeState:
    """Aggregate a round's replies for each device (Eq. 21): importance sets scaled to unit sum, weights as they are.

    Only who replied is listened to. For who did not, what the edge knew before stays.

    Args:
        refine: What similarity is made of.
        state: Before the round.
        replies: Of the round.
        sent: The coarse header.
        robust: ``members.robust``: changes to it are shortened to a multiple of the median one, and who sent a longer
            one is named among the faults.
        num_classes: Bounds what one device's losses say of the groups.
    """
    sets = [header_of(r, sent) for r in replies.values()]
    faults: tuple[Fault, ...] = ()
    exchanged = all(sets)
    if exchanged and robust:
        sets, faults = _within_reason(sent, dict(zip(replies, sets, strict=True)), state.round + 1)
    if exchanged and refine.similarity == "updates":
        start = flat(sent)
        state = groups_checked(state, replies, 2 * math.log(max(num_classes, 2)))
        noised = any(r.noise for r in replies.values())
        state = grouped(state, {d: flat(one) - start for d, one in zip(replies, sets, strict=True)}, noised)
    weights = weights_among(state, replies)
    tensors = dict(state.tensors)
    if refine.scores_importance:
        importance = aggregate(weights, [unit_sum(take(r.tensors, "importance")) for r in replies.values()])
        for device, of_importance in zip(replies, importance, strict=True):
            tensors |= put(f"{device}/importance", of_importance)
    if exchanged:
        whole = aggregate(average_weights(len(sets))[:1], sets)[0] if state.grouping == "found" else None
        for device, own in zip(replies, aggregate(weights, sets), strict=True):
            first, beside = (own, whole) if whole is None or _is_clear(state) else (whole, own)
            tensors |= put(f"{device}/header", first) | put(f"{device}/average", beside or {})
    noise = noise_of_sum(weights, [r.noise for r in replies.values()])
    if bool(noise.any()):
        tensors |= {f"{device}/noise.header": of_device for device, of_device in zip(replies, noise, strict=True)}
    return state.model_copy(
        update={
            "round": state.round + 1,
            "tensors": tensors,
            "scores": pooled([r.scores for r in replies.values()]),
            "came": {device: reply.came for device, reply in replies.items()},
            "faults": faults,
        }
    )


def _within_reason(
    sent: Mapping[str, Tensor], sets: Mapping[str, Mapping[str, Tensor]], number: int
) -> tuple[list[dict[str, Tensor]], tuple[Fault, ...]]:
    """Header weights whose changes are not too long, and whose were."""
    changes = [{name: t.double() - sent[name].double() for name, t in one.items()} for one in sets.values()]
    changes, norms, most = shortened(changes)
    kept, faults = [], []
    for (device, one), change, norm in zip(sets.items(), changes, norms, strict=True):
        if norm <= most:
            kept.append(dict(one))
            continue
        kept.append({name: (sent[name].double() + change[name]).to(t.dtype) for name, t in one.items()})
        reason = f"its header changed by {norm:.3g}, shortened to {most:.3g}: {FACTOR:g} times the cluster's median"
        faults.append(Fault(device_id=device, step=f"round {number}", reason=reason, times=1, recovered=True))
    return kept, tuple(faults)


def personal(state: EdgeState, device: str) -> dict[str, Tensor]:
    """The tensors addressed to one device; none if it has not finished a round yet."""
    start = f"{device}/"
    own = {name[len(start) :]: t for name, t in state.tensors.items() if name.startswith(start)}
    return {name: t for name, t in own.items() if name != "change" and not name.startswith("sketch.")}


class RoundTracker:
    """Which round's averages were best so far, and whether the rounds have settled.

    A header is scored when it comes to its devices, a round after it was made, with the devices' priors and before any
    training. Two rounds are compared over the devices that scored both. Settled: the last header's pooled loss is lower
    than the best one's before it by less than 2 %, or 0.003 nats. The first comparison is with the header as it was
    sent; it never ends the rounds, since what a first round makes of a strange header is not yet good.
    """

    def __init__(self) -> None:
        self.best: EdgeState | None = None  # the state whose averages those are; None: none has been scored
        self.best_came: dict[str, ValidationScores] = {}
        self.settled = False

    def see(self, before: EdgeState, after: EdgeState) -> None:
        """Take in a round: ``after.came`` are the scores of the averages in ``before``."""
        came = after.came
        if self.best is None or before.round == 0:
            self.best, self.best_came = before, came
            return
        both = [d for d in came if d in self.best_came and came[d].num_samples]
        if not both:
            self.best = before  # nothing is known: the last is what there is
            return
        number = sum(came[d].num_samples for d in both)
        new, old = (sum(c[d].loss_sum for d in both) / number for c in (came, self.best_came))
        gained = old - new
        self.settled = before.round > 1 and gained < max(SETTLED_SHARE * old, SETTLED_NATS)
        if gained > 0 or self.best.round == 0:
            self.best, self.best_came = before, came
