"""What members of a fleet, and strangers, can do to others: benchmarks/results/members.md, of members_*.json.

python benchmarks/members_fuzz.py           a million messages to cloud, edge and device
python benchmarks/members.py privacy        an edge that wants to know which classes a device has
python benchmarks/members.py connections    2,000 idle and slow callers at the port of a fleet's edge
python benchmarks/members.py page           the page, of these and of members_liars.py
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tomli_w
import torch
from members_fuzz import TINY, Crossing
from members_page import markdown
from scipy.stats import beta, norm

from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import make_job
from fleetfit.config.sections import PrivacyConfig
from fleetfit.core.encoding import encode, put, take
from fleetfit.core.files import own_version, write_atomically
from fleetfit.data.partition import share_out
from fleetfit.data.sources import load_samples
from fleetfit.device.device import DeviceState, handle
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import AttributesRequest, CoarseModel, DeviceMessage, Finish, Propose, RefineRound
from fleetfit.device.privacy import DevicePrivacy, promise, releases

RESULTS = Path(__file__).parent / "results"
# -- an edge that wants to know ---------------------------------------------------------------------------------------

CLASS, TRIALS = 1, 300
ORACLES: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "as it is": lambda header: None,
    "last bias -3e38": lambda header: _set_bias(header, -3e38),
    "last bias -900,000": lambda header: _set_bias(header, -9e5),
    "all weights x 10,000": lambda header: [t.mul_(1e4) for t in header.values()] and None,
    "all but one class at -50": lambda header: _all_but_one(header),
}


def _set_bias(header: dict[str, torch.Tensor], value: float) -> None:
    header["classifier.last.bias"][CLASS] = value


def _all_but_one(header: dict[str, torch.Tensor]) -> None:
    header["classifier.last.bias"].fill_(-50.0)
    header["classifier.last.bias"][CLASS] = 50.0


def privacy(z: float = 1.0) -> dict[str, Any]:
    """How well a cheating edge tells devices that have a class from those that have not."""
    refine = {"rounds": 2, "epochs": 3, "sketch": "sliced"}
    job = make_job({**TINY, "refine": refine, "privacy": {"noise_multiplier": z}})
    with tempfile.TemporaryDirectory() as folder:
        crossing = Crossing()
        plain = make_job({**TINY, "refine": refine, "run": {"cache": folder}})
        crossing.run(plain, Path(folder, "run"))
    script = [r for to, r, _ in crossing.down if to == "device" and isinstance(r, DeviceMessage)]
    kinds = (AttributesRequest, CoarseModel, RefineRound, Propose, Finish)
    by_step = {r.step: r for r in script if isinstance(r, kinds)}
    samples = load_samples(job)
    data = share_out(
        samples, job.data, {c: [a.device_id for a in m] for c, m in fleet_of(job).items()}, job.seed
    ).devices
    members = [a for m in fleet_of(job).values() for a in m]
    rows = {}
    attacks = [(oracle, change, True) for oracle, change in ORACLES.items()]
    attacks += [
        (f"{oracle}, without [privacy]", ORACLES[oracle], False) for oracle in ("as it is", "last bias -900,000")
    ]
    for oracle, change, kept in attacks:
        coarse = by_step[1]
        header = {n: t.clone() for n, t in take(coarse.tensors, "header").items()}
        change(header)
        messages = [by_step[s] for s in sorted(by_step)]
        messages[1] = coarse.model_copy(update={"tensors": coarse.tensors | put("header", header)})
        told: dict[bool, list[np.ndarray]] = {True: [], False: []}
        forms: dict[bool, set[Any]] = {True: set(), False: set()}
        for trial in range(2 * TRIALS):
            has = trial % 2 == 0
            chance = random.Random(trial)
            others = chance.sample([c for c in range(10) if c != CLASS], 4 if has else 5)
            classes = [CLASS, *others] if has else others
            own = data[members[trial % len(members)].device_id]
            rows_of = torch.tensor([i for i in range(len(samples)) if int(samples.labels[i]) in classes])
            rows_of = rows_of[torch.randperm(len(rows_of), generator=torch.Generator().manual_seed(trial))]
            own = replace(own, train=samples.rows(rows_of[:40]), validation=samples.rows(rows_of[40:50]))
            private = DevicePrivacy(job.privacy, job.refine, trial.to_bytes(32, "little")) if kept else None
            state = DeviceState(members[0], own, DeviceMemory(), privacy=private)
            numbers: list[float] = []
            form: list[Any] = []
            for message in messages:
                try:
                    state, reply = handle(state, message)
                except ValueError as error:
                    form.append(str(error))
                    continue
                form.append((reply.kind, len(encode(reply)), sorted(reply.tensors)))
                numbers += [float(v) for _, t in sorted(reply.tensors.items()) for v in t.flatten()]
            told[has].append(np.array(numbers))
            forms[has].add(json.dumps(form))
        rows[oracle] = guessed(told) | {"forms differ": forms[True] != forms[False]}
        print(oracle, rows[oracle], flush=True)
    promised = promise(job)
    assert promised is not None
    mu = math.sqrt(len(releases(job.refine))) / z
    return {
        "z": z,
        "epsilon": promised["epsilon"],
        "delta": PrivacyConfig().delta,
        "the most that the noise allows": float(2 * norm.cdf(mu / 2) - 1),
        "trials": 2 * TRIALS,
        "rows": rows,
    }


def guessed(told: dict[bool, list[np.ndarray]]) -> dict[str, Any]:
    """An attacker who has seen half of the devices, with their classes, and guesses for the other half.

    Along the difference of both means, numbers in units of their spread; the threshold that is best on the first half.
    """
    lengths = {len(v) for own in told.values() for v in own}
    if lengths == {0}:  # no device answers: what is sent is refused before any data is looked at
        return {"advantage": 0.0, "low": 0.0, "high": 0.0}
    if len(lengths) > 1:  # a length tells by itself
        return {"advantage": 1.0, "low": 0.0, "high": 1.0}
    sets = {has: np.stack(own) for has, own in told.items()}
    half = {has: len(own) // 2 for has, own in sets.items()}
    shown = np.concatenate([sets[has][: half[has]] for has in sets])
    spread = shown.std(0) + 1e-12
    direction = (sets[True][: half[True]].mean(0) - sets[False][: half[False]].mean(0)) / spread**2
    score = {has: own @ direction for has, own in sets.items()}
    cuts = np.sort(np.concatenate([score[has][: half[has]] for has in sets]))
    best = max(cuts, key=lambda c: (score[True][: half[True]] > c).mean() - (score[False][: half[False]] > c).mean())
    hits, alarms = (int((score[has][half[has] :] > best).sum()) for has in (True, False))
    number = {has: len(sets[has]) - half[has] for has in sets}
    low = interval(hits, number[True])[0] - interval(alarms, number[False])[1]
    high = interval(hits, number[True])[1] - interval(alarms, number[False])[0]
    return {"advantage": hits / number[True] - alarms / number[False], "low": low, "high": high}


def interval(hits: int, number: int) -> tuple[float, float]:
    """Clopper and Pearson's, so that both together hold in 95 %."""
    alpha = 0.025
    low = 0.0 if hits == 0 else float(beta.ppf(alpha / 2, hits, number - hits + 1))
    high = 1.0 if hits == number else float(beta.ppf(1 - alpha / 2, hits + 1, number - hits))
    return low, high


# -- callers that do not hang up --------------------------------------------------------------------------------------

CALLERS = 2000
ATTACK = """
import resource, socket, ssl, sys, time
port, number = int(sys.argv[1]), int(sys.argv[2])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
hello = bytes.fromhex("16030100c8010000c40303") + bytes(20)
lines = {}
def call(i):
    try:
        line = socket.create_connection(("127.0.0.1", port), timeout=5)
        line.setblocking(False)
        lines[i] = line
    except OSError:
        pass
for i in range(number):
    call(i)
print("there", flush=True)
turn = 0
while True:
    for i in range(number):
        line = lines.get(i)
        if line is None or i % 2:  # half of them idle until they are cut off, half send a byte a second
            continue
        try:
            line.send(hello[turn % len(hello):turn % len(hello) + 1])
            if line.recv(1) == b"":
                raise OSError
        except BlockingIOError:
            pass
        except OSError:  # and call again
            line.close()
            call(i)
    turn += 1
    time.sleep(1)
"""


def connections() -> dict[str, Any]:
    """Members' requests beside callers that hold connections, and how long their traces last."""
    from fleetfit.engines.deployment.certificates import read_member_key
    from fleetfit.engines.deployment.handshake import Greeter
    from fleetfit.engines.deployment.kit import read_kit
    from fleetfit.engines.deployment.kit_file import kit_toml
    from fleetfit.engines.deployment.provision import provision
    from fleetfit.engines.deployment.server import Hub, free_port

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = {**TINY, "run": {"cache": str(folder / "cache")}}
        (folder / "job.toml").write_text(tomli_w.dumps(fields))
        (folder / "FLEET.toml").write_text(tomli_w.dumps({"job": "job.toml", "edges": [{"name": "near"}]}))
        provision(folder / "FLEET.toml", folder / "kits", split_data=True)
        port = free_port()
        for who in ("near", "near-1", "near-2", "near-3"):
            kit = read_kit(folder / "kits" / who)
            part = "server" if who == "near" else "upstream"
            changed = getattr(kit.file, part).model_copy(update={"port": port})
            (folder / "kits" / who / "kit.toml").write_text(kit_toml(kit.file.model_copy(update={part: changed})))
        told: list[str] = []
        kit = read_kit(folder / "kits" / "near")
        (kit.state).mkdir(mode=0o700, exist_ok=True)
        with Hub(kit, told.append) as hub:
            devices = [read_kit(folder / "kits" / f"near-{i}") for i in (1, 2, 3)]
            greeters = [Greeter(d, read_member_key(d.node_key), f"{i}") for i, d in enumerate(devices)]

            def rounds(number: int) -> dict[str, list[float]]:
                found: dict[str, list[float]] = {"kept": [], "new": []}
                for _ in range(number):
                    for device, greeter in zip(devices, greeters, strict=True):
                        for kind in found:
                            other = greeter
                            if kind == "new":
                                greeter.close()  # the next one has a connection to make
                            begun = time.perf_counter()
                            other.greet()
                            found[kind].append(time.perf_counter() - begun)
                            assert device.file.name in hub.gate.present
                return found

            rounds(5)
            before = rounds(40)
            attacker = subprocess.Popen(
                [sys.executable, "-c", ATTACK, str(port), str(CALLERS)], stdout=subprocess.PIPE, text=True
            )
            try:
                assert attacker.stdout is not None
                attacker.stdout.readline()
                during = rounds(40)
                time.sleep(12)  # the first ones are cut off, and half call again
                later = rounds(40)
                alive = hub._watch.is_alive() and len(hub.members()) == 3
                most = hub.gate._door.num_connections
            finally:
                begun = time.perf_counter()
                attacker.kill()
                attacker.wait()
            while hub.gate._door.num_connections[1] and time.perf_counter() - begun < 60:
                time.sleep(0.1)
            recovered = time.perf_counter() - begun
            for greeter in greeters:
                greeter.close()
    times = {
        name: {kind: 1e3 * statistics.median(values) for kind, values in found.items()}
        for name, found in (("before", before), ("just after", during), ("12 s later", later))
    }
    slowest = {
        name: {kind: 1e3 * max(values) for kind, values in found.items()}
        for name, found in (("before", before), ("just after", during), ("12 s later", later))
    }
    return {
        "callers": CALLERS,
        "milliseconds, median": times,
        "milliseconds, slowest": slowest,
        "the thread of the state lives": alive,
        "connections of members and of strangers": list(most),
        "recovered after, s": recovered,
        "lines told": len(told),
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "privacy": privacy,
    "connections": connections,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "page"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part != "page":
        found = PARTS[args.part]()
        found["fleetfit"] = own_version()
        write_atomically(RESULTS / f"members_{args.part}.json", json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    write_atomically(RESULTS / "members.md", markdown(RESULTS))


if __name__ == "__main__":
    main()
