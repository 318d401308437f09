"""What members of a fleet, and strangers, can do to others: benchmarks/results/members.md, of members_*.json.

python benchmarks/members.py fuzz           a million messages to cloud, edge and device
python benchmarks/members.py privacy        an edge that wants to know which classes a device has
python benchmarks/members.py connections    2,000 idle and slow callers at the port of a fleet's edge
python benchmarks/members.py page           the page, of these and of members_liars.py
"""

import argparse
import json
import logging
import math
import os
import random
import re
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tomli_w
import torch
from members_page import markdown
from scipy.stats import beta, norm

from fleetfit.bounds import FROM_ABOVE, from_edge
from fleetfit.config import Job, PrivacyConfig, make_job
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device import DeviceMemory, DeviceState, handle
from fleetfit.engines import local
from fleetfit.engines.whole_fleet import LocalLink, fleet_of
from fleetfit.files import own_version, write_atomically
from fleetfit.members import declining, device_handler, edge_handler
from fleetfit.messages import (
    AttributesRequest,
    BackboneAssignment,
    ClusterReport,
    ClusterStats,
    CoarseModel,
    Declined,
    DeviceMessage,
    Finish,
    Message,
    Propose,
    RefineRound,
    Refused,
    Request,
    decode,
    decode_any,
    encode,
    put,
    read_reply,
    silent,
    take,
)
from fleetfit.privacy import DevicePrivacy, promise, releases
from fleetfit.replies import check_cluster_report, check_reply, check_stats, expected_of, reply_bounds

RESULTS = Path(__file__).parent / "results"
TINY: dict[str, Any] = {
    "model": {
        "config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "epochs": 1,
    },
    "data": {"split": "classes", "classes_per_device": 5},
    "fleet": {"devices": [{"count": 3, "cluster": "near", "storage_limit": "1 MB", "gpu_capacity": 50}]},
    "backbone": {"steps": 4, "specialise_steps": 0, "importance_samples": 16},
    "header": {"search": "distilled"},
    "refine": {"rounds": 2, "epochs": 1},
}


# -- fuzzed messages --------------------------------------------------------------------------------------------------


class Crossing:
    """All that crosses links in one honest run: (who receives it, the request, the bytes)."""

    def __init__(self) -> None:
        self.down: list[tuple[str, Request, bytes]] = []
        self.up: list[tuple[str, str, Request, bytes]] = []

    def run(self, job: Job, out: Path) -> None:
        """One run in this process."""
        deliver = LocalLink.deliver

        def noting(link: LocalLink, member: str, sent: bytes) -> list[bytes]:
            answers = deliver(link, member, sent)
            request = decode_any(sent)
            assert isinstance(request, Request)
            to, of = ("edge", "cloud") if link.down == "cloud_to_edge" else ("device", "edge")
            self.down.append((to, request, sent))
            self.up.extend((of, member, request, answer) for answer in answers)
            return answers

        LocalLink.deliver = noting  # type: ignore[method-assign]
        try:
            local.run(job, out)
        finally:
            LocalLink.deliver = deliver  # type: ignore[method-assign]


NUMBER = re.compile(rb"-?\d[-+.\deE]*")
TOKENS = (
    *(b"0", b"-1", b"1e999", b"true", b'"1"', b"1.0", b"null", b"NaN", b"[]", b"{}", b"9" * 30, b"2147483648"),
    *(b"9223372036854775808", b"4611686018427387904", b"1e-400", b'""', b"[" * 200 + b"]" * 200, b"8192"),
)
VALUES = (math.nan, math.inf, -3e38, 3e38, 1e-45, 1e7)


def mutated(blob: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One of many things that may become of a message."""
    (length,) = struct.unpack("<Q", blob[:8])
    head, data = blob[8 : 8 + length], blob[8 + length :]
    kind = chance.randrange(12)
    if kind == 0:  # bits
        damaged = bytearray(blob)
        for _ in range(chance.choice((1, 1, 4, 32))):
            damaged[chance.randrange(min(len(damaged), 8 + length + 64))] ^= 1 << chance.randrange(8)
        return bytes(damaged)
    if kind == 1:
        return blob[: chance.randrange(len(blob))]
    if kind == 2:
        return struct.pack("<Q", chance.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + head + data
    if kind == 3:  # another's middle
        other = chance.choice(others)
        cut, end = chance.randrange(len(blob)), chance.randrange(len(other))
        return blob[:cut] + other[end:]
    if kind == 4 and len(data) >= 4:
        place = chance.randrange(len(data) // 4) * 4
        return blob[: 8 + length + place] + struct.pack("<f", chance.choice(VALUES)) + data[place + 4 :]
    if kind == 5:
        return chance.randbytes(chance.randrange(400))
    if kind == 6:  # a piece twice
        begin = chance.randrange(len(head))
        end = min(len(head), begin + chance.randrange(1, 200))
        head = head[:end] + head[begin:end] * chance.choice((1, 1, 50)) + head[end:]
    elif kind == 7:
        begin = chance.randrange(len(head))
        head = head[:begin] + head[begin + chance.randrange(1, 60) :]
    elif kind == 8:
        name = chance.choice((b'"step', b'"kind', b"F32", b"header.", b"sketch.", b"shape", b"version", b"I64"))
        head = head.replace(name, chance.choice((b"", b'"', b"F64", b"BOOL", b"../", b"\\u0000", b"x")), 1)
    else:  # numbers, of fields and of shapes
        for _ in range(chance.choice((1, 1, 2))):
            found = list(NUMBER.finditer(head))
            if found:
                at = chance.choice(found)
                token = chance.choice(TOKENS).replace(b'"', b'\\"')
                head = head[: at.start()] + token + head[at.end() :]
    return struct.pack("<Q", len(head)) + head + data


class Memories:
    """A device's memory, not in files."""

    def __init__(self) -> None:
        self.of: dict[int, DeviceMemory] = {}

    def before(self, step: int, _: object) -> DeviceMemory | None:
        """The memory that a device has when it is asked for `step`."""
        return self.of.get(max((s for s in self.of if s < step), default=-1))

    def save(self, step: int, memory: DeviceMemory) -> None:
        """Keep it, unless there is one of that step."""
        self.of.setdefault(step, memory)  # what an honest edge began stays, so that later steps have a model


class Transient:
    """Steps that are not kept."""

    def step(self, name: str, result: type[Message], compute: Callable[[], Any]) -> Any:
        """Compute."""
        return compute()


class Counting(logging.Handler):
    """Counts the bytes of a log."""

    size = 0

    def emit(self, record: logging.LogRecord) -> None:
        """As it would be written."""
        self.size += len(self.format(record)) + 1


def targets(job: Job, data: FleetData, crossing: Crossing) -> dict[str, tuple[list[Any], Callable[[Any, bytes], bool]]]:
    """Who receives: honest messages to begin with, and what takes one; it says whether it refused."""
    cluster, members = next(iter(fleet_of(job).items()))
    attributes = {a.device_id: a.model_copy(update={"num_samples": 10**6}) for a in members}
    first = members[0].device_id
    device = declining(device_handler(attributes[first], data.devices[first], Memories()))  # type: ignore[arg-type]
    coarse = next(r for to, r, _ in crossing.down if isinstance(r, CoarseModel))
    expected = expected_of(coarse, attributes)
    stats = next(decode(b, ClusterStats) for of, _, r, b in crossing.up if r.kind == "stats_request")

    class Nobody:
        members = tuple(attributes)

        def ask(self, messages: Any, bounds: Any) -> dict[str, Any]:
            return {}

    edge = declining(edge_handler(job, cluster, data.edges[cluster], Nobody(), Transient(), silent))  # type: ignore[arg-type]
    for to, request, _ in crossing.down:
        if to == "device" and isinstance(request, DeviceMessage):
            device(request)  # the device has a model and has come to the end, as an honest one

    def by_device(_: Any, blob: bytes) -> bool:
        return isinstance(device(decode_any(blob, "it", FROM_ABOVE)), Declined)

    def by_edge_from_cloud(_: Any, blob: bytes) -> bool:
        return isinstance(edge(decode_any(blob, "it", FROM_ABOVE)), Declined)

    def by_edge(asked: Any, blob: bytes) -> bool:
        member, request = asked
        reply = read_reply([blob], request, reply_bounds(request, expected))
        if isinstance(reply, Refused):
            return True
        check_reply(member, request, reply, expected)
        return False

    def by_cloud(asked: Any, blob: bytes) -> bool:
        member, request = asked
        reply = read_reply([blob], request, from_edge(len(members)))
        if isinstance(reply, ClusterStats):
            check_stats({member: reply})
        elif isinstance(reply, ClusterReport):
            check_cluster_report(member, reply, stats)
        return isinstance(reply, Refused)

    def downs(to: str) -> list[Any]:
        return [(None, b) for t, r, b in crossing.down if t == to and not isinstance(r, BackboneAssignment)]

    def ups(of: str) -> list[Any]:
        return [((m, r), b) for o, m, r, b in crossing.up if o == of]

    assignment = [(None, b) for _, r, b in crossing.down if isinstance(r, BackboneAssignment)]
    return {
        "device": (downs("device"), by_device),
        "edge, of devices": (ups("edge"), by_edge),
        "edge, of the cloud": (downs("edge") + assignment, by_edge_from_cloud),
        "cloud": (ups("cloud"), by_cloud),
    }


SHARES = {"device": 0.2, "edge, of devices": 0.4, "edge, of the cloud": 0.05, "cloud": 0.35}


def fuzz(number: int, seed: int = 0) -> dict[str, Any]:
    """So many messages, none of which may end a program."""
    job = make_job({**TINY, "seed": seed})
    log, root = Counting(), logging.getLogger()
    root.addHandler(log)
    root.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        crossing = Crossing()
        crossing.run(job.model_copy(update={"run": job.run.model_copy(update={"cache": folder})}), Path(folder, "run"))
    data = share_out(
        load_samples(job), job.data, {c: [a.device_id for a in m] for c, m in fleet_of(job).items()}, job.seed
    )
    taking = targets(job, data, crossing)
    chance, ended, log.size = random.Random(seed), Counter[str](), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = {}
    for name, (honest, take_one) in taking.items():
        blobs, seconds, refused = [b for _, b in honest], [], 0
        for _ in range(round(number * SHARES[name])):
            asked, blob = chance.choice(honest)
            sent = mutated(blob, blobs, chance)
            begun = time.perf_counter()
            try:
                refused += take_one(asked, sent)
            except ValueError:
                refused += 1
            except Exception as error:
                ended[f"{name}: {error!r}"[:200]] += 1
            seconds.append(time.perf_counter() - begun)
        found = np.array(seconds)
        rows[name] = {
            "messages": len(seconds),
            "refused": refused,
            "milliseconds, median": 1e3 * float(np.median(found)),
            "milliseconds, 99.9th percentile": 1e3 * float(np.quantile(found, 0.999)),
            "milliseconds, longest": 1e3 * float(found.max()),
        }
        print(name, rows[name], flush=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"rows": rows, "ended": dict(ended), "memory over idle, MiB": grown, "log, MB": log.size / 1e6}


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
    for oracle, change in ORACLES.items():
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
            private = DevicePrivacy(job.privacy, job.refine, trial.to_bytes(32, "little"))
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
                if reply.kind == "propose_reply":
                    numbers += [s.loss_sum for s in reply.scores.values()]  # type: ignore[attr-defined]
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
    if not told[True][0].size or len({len(v) for own in told.values() for v in own}) != 1:
        return {"advantage": 0.0, "low": -1.0, "high": 1.0}
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
    from fleetfit.engines.flower.certificates import read_member_key
    from fleetfit.engines.flower.greeting import Greeter
    from fleetfit.engines.flower.hub import Hub, free_port
    from fleetfit.engines.flower.kit import kit_toml, read_kit
    from fleetfit.engines.flower.provision import provision

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
            assert attacker.stdout is not None
            attacker.stdout.readline()
            during = rounds(40)
            time.sleep(12)  # the first ones are cut off, and half call again
            later = rounds(40)
            alive = (
                hub._watch.is_alive()
                and len(hub.members()) == 3
                and all(m.is_there or True for m in hub.members().values())
            )
            most = hub.gate._door.num_connections
            attacker.kill()
            attacker.wait()
            begun = time.perf_counter()
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
    "fuzz": lambda: fuzz(1_000_000),
    "privacy": privacy,
    "connections": connections,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "page"])
    parser.add_argument("--number", type=int, help="of fuzzed messages")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part != "page":
        found = fuzz(args.number) if args.part == "fuzz" and args.number else PARTS[args.part]()
        found["fleetfit"] = own_version()
        write_atomically(RESULTS / f"members_{args.part}.json", json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
    write_atomically(RESULTS / "members.md", markdown(RESULTS))


if __name__ == "__main__":
    main()
