"""What an edge's statistics and report must be like to be used."""

import re
from collections.abc import Mapping

from fleetfit.edge.checks import check_attributes, check_report
from fleetfit.edge.messages import ClusterReport, ClusterStats

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")  # fit for a file's name


def check_stats(stats: Mapping[str, ClusterStats]) -> None:
    """Whether the cloud may use what the edges say of their devices.

    Raises:
        ValueError: names an edge and what is wrong, or a device that two clusters have.
    """
    owner: dict[str, str] = {}
    for cluster, own in stats.items():
        if not own.devices:
            raise ValueError(f"{cluster}: it must know the attributes of a device at least")
        for device in (*(a.device_id for a in own.devices), *own.silent):
            if not NAME.fullmatch(device):
                rule = "must be at most 200 letters, digits, '-', '_' and '.', the first a letter or digit"
                raise ValueError(f"{cluster}: a device's name {rule}, got {device!r}")
            if device in owner:
                raise ValueError(f"{cluster}: device {device!r} is there twice, also in {owner[device]}")
            owner[device] = cluster
        for attributes in own.devices:
            try:
                check_attributes(attributes, attributes.device_id)
            except ValueError as error:
                raise ValueError(f"{cluster}: device {attributes.device_id}: {error}") from None


def check_cluster_report(cluster: str, report: ClusterReport, stats: ClusterStats) -> None:
    """Whether the cloud may use an edge's report: files are named after clusters and devices, so they must be known.

    Raises:
        ValueError: names the edge, and what is wrong.
    """
    if report.cluster != cluster:
        raise ValueError(f"{cluster}: its report is of {report.cluster!r}")
    members = {*(a.device_id for a in stats.devices), *stats.silent}
    names = [*(d.device_id for d in report.devices), *(d.device_id for d in report.absent)]
    unknown = [name for name in (*names, *(f.device_id for f in report.faults)) if name not in members]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"{cluster}: its report must name its own devices, each once, got {unknown or names}")
    for name, tensor in report.tensors.items():
        if name.partition("/")[0] not in names and not name.startswith("backbone."):
            raise ValueError(f"{cluster}: tensor {name!r} of its report is no device's of its own")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{cluster}: tensor {name!r} of its report must be finite")
    for device in report.devices:
        try:
            check_report(device, device.device_id)
        except ValueError as error:
            raise ValueError(f"{cluster}: device {device.device_id}: {error}") from None
