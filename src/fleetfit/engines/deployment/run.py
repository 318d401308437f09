"""`fleetfit run --engine flower`: the cloud's part of a job, over edges that are programs of their own."""

import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fleetfit.cloud.run import FleetResult, run_cloud
from fleetfit.config.job import Job
from fleetfit.core.encoding import put, take
from fleetfit.core.files import differences, locked, write_atomically
from fleetfit.core.hardware import torch_device_of
from fleetfit.core.progress import Progress
from fleetfit.core.records import DataSummary
from fleetfit.device.memory import DeviceMemory
from fleetfit.edge.messages import BackboneAssignment, ClusterReport
from fleetfit.engines.deployment.handshake import Status
from fleetfit.engines.deployment.kit import RUN_ID, Kit, hold, job_fields, read_kit, running
from fleetfit.engines.deployment.proxy import Tell
from fleetfit.engines.deployment.server import Attached, Hub, Server
from fleetfit.engines.deployment.start import POLL_SECONDS, Nodes, check_code, load_data
from fleetfit.engines.flower.link import FlowerLink
from fleetfit.runs.folder import RunFolder
from fleetfit.runs.summary import device_card, summarise, write_devices, write_front
from fleetfit.runs.tracking import tracking

LOOK_SECONDS = 0.5


def run(job: Job, cloud: Path, out: Path, progress: Progress, tell: Tell) -> dict[str, Any]:
    """Run a job over a fleet; a run that was killed is gone on with, by the cloud and by each edge.

    Args:
        job: The resolved job, which must be the one that the kits were made for.
        cloud: The cloud's kit. Where `fleetfit start` runs it already, that is used.
        out: The run folder.
        progress: Told how far each phase is.
        tell: Told in words who comes, goes, and is not let in.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: another job, a bad kit, bad data, edges that cannot do their part.
        OSError: the folder cannot be written.
    """
    kit = read_kit(cloud, "cloud")
    _check_job(job, kit)
    torch.set_num_threads(job.run.threads)
    torch_device_of(job.run.torch_device)  # what is not there is told before anything is done
    with RunFolder(out, job) as folder, tracking(job, out, progress) as progress:
        progress("data", 0, 1, kit.data_source)
        shares = job.data.test_share, job.data.public_share
        check_code(kit.data_source, kit.data_source == job.data.source)
        public = load_data(kit, shares[0] / (sum(shares) or 1.0), ("public",))
        progress("data", 1, 1, f"{len(public.train)} public samples to train on")
        assert public.summary is not None, "it is of files"
        folder.claim_data(public.summary)
        for line in public.summary.lines:
            progress("data", 0, 0, line)
        with _server(kit, tell) as server, _alone(kit):
            _wait_for_edges(server, progress)
            carrier = server.carrier(_run_id(out))
            try:
                edges = FlowerLink(
                    carrier,
                    Nodes(server),
                    folder.ledger,
                    "cloud_to_edge",
                    "edge_to_cloud",
                    max_message_bytes=job.links.max_message_bytes,
                    poll_seconds=POLL_SECONDS,
                    replied=_Show(server, progress),
                )
                cache = folder.cache(progress)
                result = run_cloud(job, public, edges, folder.steps, cache, progress)
            finally:
                carrier.close()
        summary = _results(job, kit, folder, result, public.summary)
        progress.finish(summary)
        return summary


@contextmanager
def _server(kit: Kit, tell: Tell) -> Iterator[Server]:
    if running(kit.folder):
        tell(f"`fleetfit start {kit.folder}` is at work; its edges are used")
        yield Attached(kit)
        return
    with hold(kit.folder), Hub(kit, tell) as hub:
        yield hub


@contextmanager
def _alone(kit: Kit) -> Iterator[None]:
    """Edges do one thing at a time.

    Raises:
        ValueError: another run is at it.
    """
    try:
        held = locked(kit.state / ".run")
    except ValueError:
        raise ValueError(f"another `fleetfit run` is at work with {kit.folder}; wait for it, or stop it") from None
    try:
        yield
    finally:
        held.close()


def _wait_for_edges(server: Server, progress: Progress) -> None:
    """All edges must have been there once: each is a cluster, and the cloud matches all clusters together."""
    while True:
        members = server.members()
        there = [name for name, member in members.items() if member.is_there]
        missing = [name for name in members if name not in there]
        progress("edges", len(there), len(members), f"waiting for {', '.join(missing)}" if missing else "")
        if not missing:
            return
        time.sleep(LOOK_SECONDS)


class _Show:
    """What the edges are at, in one line, while the cloud waits for their replies.

    Args:
        server: Who hears of them.
        progress: Where to show it.
    """

    def __init__(self, server: Server, progress: Progress) -> None:
        self.server = server
        self.progress = progress
        self._last: dict[str, Status] = {}

    def __call__(self, number: int, asked: int) -> None:
        """So many of those who were asked have replied."""
        if number == asked:  # those who stop when they have replied are gone already
            self.progress("edges at work", 100, 100, f"{number} of {asked} replied")
            return
        words, shares = [], []
        for name, member in self.server.members().items():
            status = self._last[name] = member.status or self._last.get(name) or Status(phase="", done=0, total=1)
            shares.append(status.done / status.total)
            known = member.is_there or status.done == status.total
            words.append(f"{name} {status.phase} {status.note}".rstrip() if known else f"{name} is not there")
        share = min(max(number / max(asked, 1), sum(shares) / max(len(shares), 1)), 0.99)
        self.progress("edges at work", round(100 * share), 100, " | ".join(words))


def _results(job: Job, kit: Kit, folder: RunFolder, result: FleetResult, data: DataSummary) -> dict[str, Any]:
    """What the cloud keeps: figures, of the devices too; and models, if the job lets devices send them up."""
    raw = 0
    for cluster, report in result.reports.items():
        folder.steps.step(f"finish/{cluster}", ClusterReport, _booked(folder, report))
        validation = int(report.rounds[0]["num_samples"]) if report.rounds else 0
        raw += (sum(d.num_train + d.num_test for d in report.devices) + validation) * kit.task.raw_bytes_per_sample
    summary = summarise(job, folder, raw or None, result, data, deployed=True)
    write_front(folder, result)
    if job.links.send_models:
        _write_models(kit, folder, result)
    write_devices(folder, summary)
    folder.write_json("summary.json", summary)
    return summary


def _write_models(kit: Kit, folder: RunFolder, result: FleetResult) -> None:
    """The models that devices have sent up, as they have them.

    Raises:
        ValueError: an edge's or a device's tensors make no model; names whose.
    """
    form = kit.task.form
    for cluster, report in result.reports.items():
        name = f"specialise/{cluster}"
        sent = folder.steps.step(name, BackboneAssignment, _missing(name))
        shape = result.candidates.candidates[result.choices[cluster].chosen].shape
        memory = DeviceMemory(family=sent.family, config=sent.config, header=report.header, labels=sent.labels)
        for device in report.devices:
            if not (own := take(report.tensors, f"{device.device_id}/header")):
                continue
            try:
                model = memory.build(put("backbone", take(report.tensors, "backbone")) | put("header", own))
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{cluster}: the model of {device.device_id} cannot be built: {error}") from error
            card = device_card(cluster, memory, device, shape, form, form.words)
            folder.write_device(model, card)


def _missing(step: str) -> Callable[[], BackboneAssignment]:
    def compute() -> BackboneAssignment:
        raise ValueError(f"step {step} is missing: the run folder is damaged; delete it and run again")

    return compute


def _booked(folder: RunFolder, report: ClusterReport) -> Callable[[], ClusterReport]:
    """The report, with the edge's costs in our books."""

    def compute() -> ClusterReport:
        folder.ledger.traffic.update(report.traffic)
        for phase, seconds in report.phase_seconds.items():
            folder.ledger.seconds[phase] += seconds  # type: ignore[assignment]
            folder.ledger.cpu_seconds[phase] += report.phase_cpu_seconds.get(phase, math.nan)  # type: ignore[assignment]
        return report

    return compute


def _run_id(out: Path) -> str:
    """By which edges and devices know this run again, after a kill of whomever."""
    path = out / "run.id"
    if path.exists() and RUN_ID.fullmatch(known := path.read_text().strip()):
        return known
    made = secrets.token_hex(8)
    write_atomically(path, made + "\n")
    return made


def _check_job(job: Job, kit: Kit) -> None:
    found = differences(job_fields(kit.job), job_fields(job))
    if found:
        raise ValueError(
            f"the kits were made for another job (it differs in {', '.join(found[:5])}): all participants must have "
            f"the same one. Provision again with this job and --anew, or run {kit.folder / 'job.toml'}"
        )
