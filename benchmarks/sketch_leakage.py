"""What an edge can learn from what a device sends, and what privacy costs: benchmarks/results/sketch_leakage.md.

    python benchmarks/sketch_leakage.py             seeds 100-102 (about ten minutes on a core)

The attacker is the edge: it knows the backbone, every seed of the job but the devices' secrets, and the public images
with their labels. It sees what real devices reply (fifteen devices of the demo, five digits each, about 28 training
images each) and attacks that. Trained references are kept under runs/benchmark-digits, as those of digits.py.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from digits import Bench, Figures, Transient, bench, names_of
from digits_tables import SETTINGS
from scipy.stats import norm
from sketch_leakage_tables import markdown
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPRegressor

from fleetfit.cloud.reference import classifier_of
from fleetfit.config.job import Job, make_job
from fleetfit.config.sections import PrivacyConfig
from fleetfit.core.checkpoints import Ledger
from fleetfit.core.encoding import Message, put, take
from fleetfit.core.files import content_hash, write_atomically
from fleetfit.core.progress import silent
from fleetfit.core.randomness import named_generator
from fleetfit.core.records import DeviceAttributes
from fleetfit.data.partition import FleetData, Split, share_out
from fleetfit.data.samples import Samples
from fleetfit.device.device import SKETCH_PROJECTIONS, DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesRequest, CoarseModel, RoundReply
from fleetfit.device.privacy import DevicePrivacy, promise, releases
from fleetfit.edge.header import HeaderResult, cached_features
from fleetfit.edge.run import gather_stats, refine_cluster
from fleetfit.engines.local import LocalLink
from fleetfit.method.noise import clipped, flat
from fleetfit.method.similarity import random_projections, sketch_quantiles
from fleetfit.models.classifier import Classifier
from fleetfit.models.elastic import Backbone
from fleetfit.models.features import Features
from fleetfit.models.header import header_from_state

RESULTS = Path(__file__).parent / "results"
COST_SETTINGS = ("iid", "C2 (5 classes)")
NUM_CLASSES = 10
MAX_PIXEL = 16
SHADOWS = 1200  # devices that the attacker makes up from public images
MULTIPLIERS = (0.0, 0.001, 0.01, 0.1, 1.0)
SAMPLES = {"similarity": "calibrated"}
SLICED = {"similarity": "calibrated", "sketch": "sliced"}
NOTHING_SENT = {
    "exchange": "importance",
    "similarity": "alone",
    "guard": False,
    "class_prior": False,
}
WAYS: dict[str, dict[str, Any]] = {
    "no privacy, sketch of samples": {"refine": SAMPLES},
    "no privacy, sliced sketch": {"refine": SLICED},
    "nothing sent": {"refine": NOTHING_SENT},
    **{f"privacy, z = {z:g}": {"refine": SLICED, "privacy": {"noise_multiplier": z}} for z in MULTIPLIERS[1:]},
    "privacy, z = 1, no guard, fine-tuned": {
        "refine": {"similarity": "average", "sketch": "sliced", "guard": False, "fine_tune": True},
        "privacy": {"noise_multiplier": 1.0},
    },
}


def key_of(seed: int, device: str) -> bytes:
    """A device's secret, for a benchmark that can be repeated."""
    return f"{seed}/{device}/".encode() + bytes(32)


class Spy:
    """One seed's devices, and what the attacker knows."""

    def __init__(self, b: Bench) -> None:
        self.b = b
        self.model: Classifier = classifier_of(b.job, b.reference, NUM_CLASSES).eval()
        public = b.data.public.train
        self.images, self.features = pixels(public), self.features_of(public)
        self.labels = public.labels.numpy()

    def features_of(self, samples: Samples) -> torch.Tensor:
        """[CLS] of the last layer, [sample, channel]."""
        with torch.no_grad():
            return torch.cat([self.model.backbone(x).output[:, 0] for x in samples.inputs.batches()])

    def sketches(self, refine: Mapping[str, Any], multiplier: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
        """What the devices send, by device."""
        job = make_job({"seed": self.b.seed, "refine": refine, "privacy": {"noise_multiplier": multiplier}})
        message = CoarseModel(
            step=1,
            family="vit",
            config=self.model.backbone.config,
            labels=self.b.data.public.train.label_names,
            header=self.model.header.spec,
            refine=job.refine,
            seed=job.seed,
            class_shares=(1 / NUM_CLASSES,) * NUM_CLASSES,
            tensors=put("backbone", dict(self.model.backbone.model.state_dict()))
            | put("header", dict(self.model.header.state_dict())),
        )
        sent = {}
        for members in self.b.fleet.values():
            for attributes in members:
                roomy = attributes.model_copy(update={"storage_limit_bytes": 2**40})  # the whole reference fits
                state = state_of(job, roomy, self.b.data.devices[attributes.device_id])
                state, _ = handle(state, AttributesRequest(step=0))
                sent[attributes.device_id] = take(handle(state, message)[1].tensors, "sketch")
        return sent


def pixels(samples: Samples) -> np.ndarray:
    """Images with pixels 0..16, [sample, pixel]."""
    return ((samples.inputs[:].flatten(1) * 0.5 + 0.5) * MAX_PIXEL).numpy()


def state_of(job: Job, attributes: DeviceAttributes, data: Split) -> DeviceState:
    """A device before its first message."""
    attributes = attributes.model_copy(update={"num_samples": len(data.train) + len(data.validation)})
    private = DevicePrivacy(job.privacy, job.refine, key_of(job.seed, attributes.device_id)) if job.privacy.on else None
    return DeviceState(attributes, data, DeviceMemory(), privacy=private)


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square error over all pixels."""
    return float(np.sqrt(((a - b) ** 2).mean()))


def shares(labels: torch.Tensor) -> np.ndarray:
    """A device's class mix."""
    return torch.bincount(labels, minlength=NUM_CLASSES).numpy() / len(labels)


# -- attacks ----------------------------------------------------------------------------------------------------------


def attack_rows(spy: Spy) -> dict[str, float]:
    """The ``samples`` sketch: images, identities and labels from its rows."""
    sent = spy.sketches(SAMPLES)
    candidates = torch.cat([spy.features_of(d.train) for d in spy.b.data.devices.values()])
    images = np.concatenate([pixels(d.train) for d in spy.b.data.devices.values()])
    labels = np.concatenate([d.train.labels.numpy() for d in spy.b.data.devices.values()])
    rows = torch.cat([s["all"] for s in sent.values()])
    distance = torch.cdist(rows, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    truth = distance.argmin(dim=1).numpy()  # which image each row is of: the attacker with a candidate sees it at once
    inverters = [
        MLPRegressor(hidden_layer_sizes=(256,), max_iter=150, early_stopping=True, random_state=0).fit(
            spy.features, spy.images / MAX_PIXEL
        ),
        Ridge(1.0).fit(spy.features, spy.images / MAX_PIXEL),
    ]
    held = spy.b.data.public.validation
    inverter = min(inverters, key=lambda m: rmse(m.predict(spy.features_of(held)) * MAX_PIXEL, pixels(held)))
    guessed = np.clip(inverter.predict(rows) * MAX_PIXEL, 0, MAX_PIXEL)
    reader = LogisticRegression(max_iter=2000).fit(spy.features, spy.labels)
    read = reader.predict(rows)
    of_class = np.stack([spy.images[spy.labels == c].mean(axis=0) for c in range(NUM_CLASSES)])
    nearest = ((guessed[:, None] - images[None]) ** 2).sum(axis=2).argmin(axis=1)
    same_class = np.array([(labels == labels[i]).sum() for i in truth])
    probability = reader.predict_proba(rows)
    starts = np.cumsum([0, *(len(s["all"]) for s in sent.values())])
    mixes = np.stack([probability[a:z].mean(axis=0) for a, z in itertools.pairwise(starts)])
    return {
        "exact": float((distance.min(dim=1).values < 1e-4).double().mean()),  # but for rounding in batches
        "rmse": rmse(guessed, images[truth]),
        "rmse_class": rmse(of_class[read], images[truth]),
        "rmse_mean": rmse(spy.images.mean(axis=0)[None].repeat(len(truth), 0), images[truth]),
        "identified": float((nearest == truth).mean()),
        "identified_class": float((1 / same_class).mean()),
        "identified_chance": 1 / len(images),
        "labels": float((read == labels[truth]).mean()),
        **mix_scores(spy, mixes),
    }


def mix_scores(spy: Spy, mixes: np.ndarray) -> dict[str, float]:
    """How well guessed class mixes tell which classes a device has, and how many of each."""
    true = np.stack([shares(d.train.labels) for d in spy.b.data.devices.values()])
    guessed = np.clip(mixes, 0, None) + 1e-9
    guessed = guessed / guessed.sum(axis=1, keepdims=True)
    return {
        "presence": float(roc_auc_score((true > 0).ravel(), mixes.ravel())),
        "mix_distance": float(np.abs(true - guessed).sum(axis=1).mean() / 2),
        "mix_distance_uniform": float(np.abs(true - 1 / NUM_CLASSES).sum(axis=1).mean() / 2),
    }


def sketch_vector(features: torch.Tensor, directions: torch.Tensor, quantiles: int) -> torch.Tensor:
    """What a device sends as ``sliced``, before clipping and noise."""
    half = len(features) // 2
    parts = {"all": features, "first": features[:half], "second": features[-half:]}
    return flat({name: sketch_quantiles(part, directions, quantiles) for name, part in parts.items()})


def attack_quantiles(spy: Spy, multiplier: float) -> dict[str, float]:
    """The ``sliced`` sketch: who is in it, and the class mix."""
    b, quantiles = spy.b, make_job({}).refine.sketch_samples
    directions = random_projections(spy.features.shape[1], SKETCH_PROJECTIONS, named_generator(b.seed, "projections"))
    sent = spy.sketches(SLICED, multiplier)
    generator = np.random.default_rng(b.seed)
    number = int(np.median([len(d.train) for d in b.data.devices.values()]))
    bound = PrivacyConfig().clip_sketch * (3 * quantiles * SKETCH_PROJECTIONS) ** 0.5
    noise = multiplier * 2 * bound

    sketches, mixes = [], []
    for _ in range(SHADOWS):
        classes = generator.choice(NUM_CLASSES, 5, replace=False)
        rows = generator.choice(np.flatnonzero(np.isin(spy.labels, classes)), number, replace=False)
        vector = clipped(sketch_vector(spy.features[rows], directions, quantiles), bound).numpy()
        sketches.append(vector + noise * generator.standard_normal(len(vector)))
        mixes.append(np.bincount(spy.labels[rows], minlength=NUM_CLASSES) / number)
    mixer = RidgeCV(np.logspace(-2, 8, 11)).fit(np.stack(sketches), np.stack(mixes))
    guessed = mixer.predict(torch.stack([flat(s) for s in sent.values()]).numpy())

    # Members leave their projections among the quantiles: nearer than those that are not in it, up to the noise.
    scores, members, strongest = [], [], []
    width = max(noise, 1e-3)
    for name, sketch in sent.items():
        data = b.data.devices[name]
        train = spy.features_of(data.train)
        others = torch.cat([spy.features_of(data.validation), spy.features_of(data.test)])
        for features, member in ((train, 1), (others, 0)):
            projected = features @ directions
            near = (sketch["all"][None] - projected[:, None]) / width  # [sample, quantile, projection]
            scores += (torch.logsumexp(-0.5 * near.double() ** 2, dim=1).mean(dim=1)).tolist()
            members += [member] * len(features)
        # The strongest attacker knows all samples but one, and both that it may be: a test between two Gaussians.
        if noise:
            whole = clipped(sketch_vector(train, directions, quantiles), bound)
            for i in range(min(8, len(train))):
                other = torch.cat([train[:i], others[i % len(others)][None], train[i + 1 :]])
                moved = float((clipped(sketch_vector(other, directions, quantiles), bound) - whole).norm())
                strongest.append(norm.cdf(moved / noise / 2**0.5))
    return {
        "membership": float(roc_auc_score(members, scores)),
        "strongest": float(np.mean(strongest)) if strongest else 1.0,
        **mix_scores(spy, guessed),
    }


# -- cost -------------------------------------------------------------------------------------------------------------


def refined(b: Bench, setting: str, way: str) -> dict[str, float]:
    """Accuracies that the devices know of themselves, and what an edge reads from their headers."""
    job = make_job({"seed": b.seed, "data": SETTINGS[setting], **WAYS[way]})
    data: FleetData = share_out(b.samples, job.data, names_of(b.fleet), b.seed)
    rows, presence, raised = [], [], []
    for cluster, members in b.fleet.items():
        assignment, found = b.coarse(cluster)
        devices = {a.device_id: Watched(state_of(job, a, data.devices[a.device_id])) for a in members}
        link = LocalLink(devices, Ledger(), "down", "up")
        stats = gather_stats(job, cluster, link, Transient())
        refine_cluster(job, assignment, stats, found, data.edges[cluster], link, Transient(), silent)
        backbone = Backbone(assignment.family, assignment.config)
        backbone.model.load_state_dict(take(found.tensors, "backbone"))
        seen = cached_features(backbone.eval(), b.data.public.train).cached
        before = class_logits(found, seen, backbone, take(found.tensors, "header"))
        for device in devices.values():
            report = device.state.memory.report
            assert report is not None, "every device has finished"
            rows.append((report.accuracy_coarse, report.accuracy_local, report.accuracy))
            if device.header:
                raised.append(class_logits(found, seen, backbone, device.header) - before)
                presence.append(shares(device.state.data.train.labels) > 0)
    coarse, local, accuracy = np.array(rows, dtype=float).mean(axis=0)
    figures = {"coarse": float(coarse), "local": float(local), "accuracy": float(accuracy)}
    if raised:
        figures["presence"] = float(roc_auc_score(np.ravel(presence), np.ravel(raised)))
    return figures


class Watched:
    """A device in this process; the first header that it sends is kept."""

    def __init__(self, state: DeviceState) -> None:
        self.state = state
        self.header: dict[str, torch.Tensor] = {}

    def __call__(self, message: Message) -> Message:
        """Answer."""
        self.state, reply = handle(self.state, message)
        if isinstance(reply, RoundReply):
            self.header = self.header or take(reply.tensors, "header")
        return reply


def class_logits(found: HeaderResult, seen: Features, backbone: Backbone, tensors: Mapping[str, Any]) -> np.ndarray:
    """Mean logit of each class over public images."""
    header = header_from_state(found.header, backbone.feature_shape, NUM_CLASSES, tensors).eval()
    with torch.no_grad():
        mean: np.ndarray = header(seen).mean(dim=0).numpy()
    return mean


def kept(b: Bench, name: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Figures that were computed before, or now."""
    return b.steps.step(name, Figures, lambda: Figures(figures=compute())).figures


def promised_epsilon(way: str) -> float | None:
    """Of a whole run; None where nothing is promised."""
    job = make_job(WAYS[way])
    promised = promise(job)
    return promised["epsilon"] if promised else None if releases(job.refine) else 0.0


def joined(numbers: list[int]) -> str:
    """As on a command line."""
    return " ".join(map(str, numbers))


# -- the page ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Attack, refine, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--cost-seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--out", type=Path, default=RESULTS / "sketch_leakage", help="without the ending")
    options = parser.parse_args()
    start = time.process_time()
    rows: list[dict[str, float]] = []
    quantiles: dict[float, list[dict[str, float]]] = {z: [] for z in MULTIPLIERS}
    for seed in options.seeds:
        b = bench(seed)
        rows.append(kept(b, "leakage-rows", lambda b=b: attack_rows(Spy(b))))
        for z, found in quantiles.items():
            found.append(kept(b, f"leakage-{z:g}", lambda b=b, z=z: attack_quantiles(Spy(b), z)))
        print(f"seed {seed}: attacked, {time.process_time() - start:.0f} s", flush=True)
    cost: dict[str, dict[str, list[dict[str, float]]]] = {way: {s: [] for s in COST_SETTINGS} for way in WAYS}
    for seed in options.cost_seeds:
        b = bench(seed)
        for way, by_setting in cost.items():
            for setting, found in by_setting.items():
                name = f"cost-{content_hash(way, setting)}"
                found.append(kept(b, name, lambda b=b, s=setting, w=way: refined(b, s, w)))
        print(f"seed {seed}: refined, {time.process_time() - start:.0f} s", flush=True)
    results = {"rows": rows, "quantiles": {f"{z:g}": v for z, v in quantiles.items()}, "cost": cost}
    write_atomically(options.out.with_suffix(".json"), json.dumps(results, indent=1, sort_keys=True) + "\n")
    command = (
        f"python benchmarks/sketch_leakage.py --seeds {joined(options.seeds)} --cost-seeds {joined(options.cost_seeds)}"
    )
    promises = {way: promised_epsilon(way) for way in WAYS}
    page = markdown(rows, quantiles, cost, promises, command, time.process_time() - start)
    write_atomically(options.out.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    main()
