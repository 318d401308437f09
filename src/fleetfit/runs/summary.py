"""What a finished run leaves, whatever engine ran it: the table of candidates, each device's model, and the summary."""

import math
import resource
import sys
from collections.abc import Mapping
from typing import Any

from fleetfit.cloud.run import FleetResult
from fleetfit.config.job import Job
from fleetfit.core.records import BackboneShape, DataSummary, DeviceReport, Record
from fleetfit.data.partition import FleetData
from fleetfit.data.preprocessing import Form
from fleetfit.data.samples import Samples
from fleetfit.device.memory import DeviceMemory, shipped_model
from fleetfit.device.privacy import promise
from fleetfit.runs.device_folder import ModelCard
from fleetfit.runs.folder import RunFolder

COLUMNS = (  # of devices.csv, behind who it is
    *("width", "depth", "header", "parameters", "size_bytes", "limit_bytes"),
    *("accuracy_as_sent", "accuracy_alone", "accuracy", "notes"),
)


def write_front(folder: RunFolder, result: FleetResult) -> None:
    """The table of candidates, the cloud's view for the report."""
    rows = []
    for cluster, choice in result.choices.items():
        for i, candidate in enumerate(result.candidates.candidates):
            coordinates = choice.coordinates[i] or ("", "", "")
            rows.append(
                {
                    "cluster": cluster,
                    "width": candidate.shape.width,
                    "depth": candidate.shape.depth,
                    "loss": candidate.loss,
                    "accuracy": candidate.accuracy,
                    "energy_joules": choice.energy_joules[i],
                    "parameters": candidate.parameters,
                    "size_bytes": candidate.size_bytes,
                    "zeta": candidate.zeta,
                    "fits": choice.fits[i],
                    "grid_loss": coordinates[0],
                    "grid_energy": coordinates[1],
                    "grid_size": coordinates[2],
                    "on_front": choice.on_front[i],
                    "trade_off": choice.trade_off[i],
                    "trade_off_accuracy": choice.trade_off_accuracy[i],
                    "chosen_by": " ".join(name for name, index in choice.chosen_by.items() if index == i),
                    "chosen": choice.chosen == i,
                }
            )
    folder.write_table("cloud/front.csv", rows)


def write_models(job: Job, folder: RunFolder, result: FleetResult, samples: Samples) -> None:
    """The model of every device that finished, where the devices' memories are in the run folder."""
    form = samples.inputs.form
    for cluster, report in result.reports.items():
        shape = result.candidates.candidates[result.choices[cluster].chosen].shape
        for device in report.devices:
            memory = folder.memory_of(device.device_id).last(DeviceMemory)
            inputs = form.words if form else f"samples as data.source {job.data.source!r} gives them"
            folder.write_device(shipped_model(memory), device_card(cluster, memory, device, shape, form, inputs))


def device_card(
    cluster: str, memory: DeviceMemory, device: DeviceReport, shape: BackboneShape, form: Form | None, inputs: str
) -> ModelCard:
    """The card of a finished device's model.

    Args:
        cluster: Its cluster.
        memory: What it kept in the end.
        device: What it reported.
        shape: Of its backbone.
        form: How its inputs are made.
        inputs: The same in words.
    """
    return ModelCard(
        device_id=device.device_id,
        cluster=cluster,
        family=memory.family,
        config=memory.config,
        header=memory.header,
        labels=memory.labels,
        width=shape.width,
        depth=shape.depth,
        inputs=inputs,
        preprocessing=form,
        size_bytes=device.size_bytes,
        limit_bytes=device.limit_bytes,
        accuracy=device.accuracy,
        trained_on=memory.trained_on,
        expected_shares=memory.expected_shares,
        shifts=memory.shifts,
    )


def write_devices(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """devices.csv: the summary's devices, those without a model too, a line each, for a spreadsheet or pandas."""
    clusters = {c["id"]: c for c in summary["clusters"]}
    rows = []
    for d in summary["devices"]:
        shape = clusters[d["cluster"]]
        rows.append(
            {
                "device": d["id"],
                "cluster": d["cluster"],
                "status": "finished",
                "width": shape["width"],
                "depth": shape["depth"],
                "header": shape["header"],
                "parameters": d["parameters"],
                "size_bytes": d["size_bytes"],
                "limit_bytes": d["limit_bytes"],
                "accuracy_as_sent": d["accuracy_coarse"],
                "accuracy_alone": d["accuracy_local"],
                "accuracy": d["accuracy"],
                "notes": _no_formula("; ".join(d["notes"])),
            }
        )
    nothing = dict.fromkeys(("device", "cluster", "status", *COLUMNS))
    left_out = {d["device_id"]: d for d in summary["left_out"]}
    for name, d in left_out.items():
        said = {"device": name, "cluster": d["cluster"], "status": "left out", "limit_bytes": d["limit_bytes"]}
        rows.append(nothing | said | {"notes": d["reason"]})
    for d in summary["absent"]:
        if d["id"] not in left_out:
            said = {"device": d["id"], "cluster": d["cluster"], "status": "absent", "notes": f"since {d['since']}"}
            rows.append(nothing | said)
    folder.write_table("devices.csv", rows)


def _no_formula(text: str) -> str:
    """What a device says of itself, as a spreadsheet shows it and does not compute it."""
    return f" {text}" if text.startswith(("=", "+", "-", "@")) else text


class ClusterSummary(Record):
    """One cluster's line of the summary."""

    id: str
    limit_bytes: int
    width: float
    depth: int
    parameters: int
    size_bytes: int
    energy_joules: float
    loss: float
    accuracy: float
    header: str


def _known(value: float) -> float | None:
    """A measured share, or None where there was nothing to measure it on."""
    return None if math.isnan(value) else value


def raw_bytes(data: FleetData) -> int:
    """What the devices' samples would cost on the wire as they are."""
    return sum(
        (len(d.train) + len(d.validation) + len(d.test) + len(d.unlabelled or ())) * d.train.raw_bytes_per_sample
        for d in data.devices.values()
    )


def summarise(
    job: Job,
    folder: RunFolder,
    raw: int | None,
    result: FleetResult,
    data: DataSummary | None,
    *,
    deployed: bool = False,
) -> dict[str, Any]:
    """Every figure of the run, as summary.json holds it; shares in 0..1, None where nothing was measured.

    ``seconds`` of a phase are wall time, ``cpu_seconds`` the CPU time of the processes that ran its steps: of devices
    only where these run in the same process.

    Args:
        job: The resolved job.
        folder: With what the run has cost.
        raw: ``raw_bytes`` of the devices, where the data is at hand.
        result: What the cloud knows.
        data: What was read here: all of it, or in a deployment the cloud's own.
        deployed: Edges and devices are machines of their own; their data and models are there.
    """
    traffic = folder.ledger.traffic
    clusters = []
    for cluster, choice in result.choices.items():
        candidate = result.candidates.candidates[choice.chosen]
        clusters.append(
            ClusterSummary(
                id=cluster,
                limit_bytes=choice.limit_bytes,
                width=candidate.shape.width,
                depth=candidate.shape.depth,
                parameters=candidate.parameters,
                size_bytes=candidate.size_bytes,
                energy_joules=choice.energy_joules[choice.chosen],
                loss=candidate.loss,
                accuracy=candidate.accuracy,
                header=result.reports[cluster].header.name,
            )
        )
    devices = [
        {
            "id": d.device_id,
            "cluster": cluster,
            "accuracy_coarse": d.accuracy_coarse,
            "accuracy_local": d.accuracy_local,
            "accuracy": d.accuracy,
            "parameters": d.parameters,
            "size_bytes": d.size_bytes,
            "limit_bytes": d.limit_bytes,
            "notes": list(d.notes),
        }
        for cluster, report in result.reports.items()
        for d in report.devices
    ]
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "method": job.method,
        "seed": job.seed,
        "deployed": deployed,
        "data": data.model_dump(mode="json") if data else None,
        "reference": {"accuracy": _known(result.reference.accuracy), "parameters": result.reference.parameters},
        "clusters": [c.model_dump() for c in clusters],
        "devices": devices,
        "absent": [
            {"id": d.device_id, "cluster": cluster, "since": d.since}
            for cluster, report in result.reports.items()
            for d in report.absent
        ]
        + [
            {"id": d.device_id, "cluster": d.cluster, "since": "coarse model"}
            for d in result.left_out
            if d.cluster not in result.reports
        ],
        "left_out": [device.model_dump() for device in result.left_out],
        "faults": [
            {"id": f.device_id, "cluster": cluster, **f.model_dump(exclude={"device_id"})}
            for cluster, report in result.reports.items()
            for f in report.faults
        ],
        "traffic": {
            "device_to_edge_bytes": traffic["device_to_edge"],
            "edge_to_device_bytes": traffic["edge_to_device"],
            "edge_to_cloud_bytes": traffic["edge_to_cloud"],
            "cloud_to_edge_bytes": traffic["cloud_to_edge"],
            "raw_data_bytes": raw,
            "upload_ratio": traffic["device_to_edge"] / raw if raw else None,
        },
        "privacy": promise(job),
        "from_cache": sorted(folder.from_cache),
        "seconds": {phase: round(s, 3) for phase, s in folder.ledger.seconds.items()},
        "cpu_seconds": folder.ledger.known_cpu_seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
    }
