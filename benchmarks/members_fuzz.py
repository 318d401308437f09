"""Messages that no program sends, to cloud, edge and device: part "fuzz" of benchmarks/results/members.md.

python benchmarks/members_fuzz.py --number 1000000      honest messages, changed at random
python benchmarks/members_fuzz.py --seconds 60          changed where that reaches new code (Atheris)
"""

import argparse
import contextlib
import json
import logging
import math
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from members_page import markdown

from fleetfit.cloud.checks import check_cluster_report, check_stats
from fleetfit.cloud.clusters import fleet_of
from fleetfit.config.job import Job, make_job
from fleetfit.core.bounds import FROM_ABOVE, from_edge
from fleetfit.core.encoding import Declined, Message, Request, decode
from fleetfit.core.files import own_version, write_atomically
from fleetfit.core.link import Refused
from fleetfit.core.progress import silent
from fleetfit.data.partition import FleetData, share_out
from fleetfit.data.sources import load_samples
from fleetfit.device.handler import declining, device_handler
from fleetfit.device.memory import DeviceMemory
from fleetfit.device.messages import CoarseModel, DeviceMessage
from fleetfit.edge.checks import check_reply, expected_of, reply_bounds
from fleetfit.edge.messages import BackboneAssignment, ClusterReport, ClusterStats, decode_any, read_reply
from fleetfit.edge.run import edge_handler
from fleetfit.engines import local
from fleetfit.engines.whole_fleet import LocalLink

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

    def step(self, name: str, result: type[Message], compute: Callable[[], Any], reads: object = None) -> Any:
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


def receivers(job: Job) -> dict[str, tuple[list[Any], Callable[[Any, bytes], bool]]]:
    """All who take messages, and what crosses their links in an honest run."""
    with tempfile.TemporaryDirectory() as folder:
        crossing = Crossing()
        crossing.run(job.model_copy(update={"run": job.run.model_copy(update={"cache": folder})}), Path(folder, "run"))
    samples, names = load_samples(job), {c: [a.device_id for a in m] for c, m in fleet_of(job).items()}
    return targets(job, share_out(samples, job.data, names, job.seed), crossing)


SHARES = {"device": 0.2, "edge, of devices": 0.4, "edge, of the cloud": 0.05, "cloud": 0.35}


def fuzz(number: int, seed: int = 0) -> dict[str, Any]:
    """So many messages, none of which may end a program."""
    job = make_job({**TINY, "seed": seed})
    log, root = Counting(), logging.getLogger()
    root.addHandler(log)
    root.setLevel(logging.INFO)
    taking = receivers(job)
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


def guided(seconds: int, out: Path) -> None:
    """Messages that a coverage-guided fuzzer finds; ends the process, with a code other than 0 if one gets through."""
    import atheris

    for name in [n for n in sys.modules if n.startswith("fleetfit")]:
        if name in (
            "fleetfit.core.bounds",
            "fleetfit.core.encoding",
            "fleetfit.edge.messages",
            "fleetfit.edge.checks",
            "fleetfit.cloud.checks",
        ):
            for thing in vars(sys.modules[name]).values():
                if getattr(thing, "__module__", "") == name and hasattr(thing, "__code__"):
                    atheris.instrument_func(thing)
    logging.disable(logging.CRITICAL)
    known = [(take_one, *one) for honest, take_one in receivers(make_job(TINY)).values() for one in honest]
    corpus = out / "corpus"
    corpus.mkdir(parents=True)
    for i, (_, _, blob) in enumerate(known):
        (corpus / str(i)).write_bytes(bytes([i % 256]) + blob)

    def take(given: bytes) -> None:
        if given:
            take_one, asked, _ = known[given[0] % len(known)]
            with contextlib.suppress(ValueError):
                take_one(asked, given[1:])

    options = [f"-max_total_time={seconds}", f"-artifact_prefix={out}/", "-timeout=20", "-max_len=65536", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], take)
    atheris.Fuzz()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, help="guided by coverage, for so long")
    parser.add_argument("--out", type=Path, help="of what the guided one finds; a new folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.seconds:
        guided(args.seconds, args.out or Path(tempfile.mkdtemp()))
    found = fuzz(args.number) | {"fleetfit": own_version()}
    write_atomically(RESULTS / "members_fuzz.json", json.dumps(found, indent=1) + "\n")
    write_atomically(RESULTS / "members.md", markdown(RESULTS))


if __name__ == "__main__":
    main()
