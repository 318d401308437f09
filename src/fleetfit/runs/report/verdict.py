"""What a run came to: one sentence, a row for every device with what to look at, and the commands that come next.

All of it follows from summary.json alone, and is plain text: whoever shows it escapes it. Names are those of devices.
"""

import shlex
from collections.abc import Iterable
from pathlib import Path

from fleetfit.core.records import ONE_CLASS_NOTE, Record
from fleetfit.runs.report.markup import count, known, percent, plural, points
from fleetfit.runs.report.summary import DeviceLine, Summary, mean

OVER, LEFT_OUT, ABSENT = "over", "left-out", "absent"
BELOW_SENT, BELOW_ALONE = "below-sent", "below-alone"
UNUSED, ONE_CLASS = "unused", "one-class"
LOOKS = {
    OVER: "over its limit",
    LEFT_OUT: "left out",
    ABSENT: "absent",
    BELOW_SENT: "worse than as sent",
    BELOW_ALONE: "worse than fine-tuned alone",
    UNUSED: "unused storage",
    ONE_CLASS: "one class only",
}
SMALL_SHARE = 0.5  # of a device's own limit; a model below it leaves storage unused
MOST_NAMES = 3  # of devices named in a sentence


class Look(Record):
    """Something about a device that is worth a look; ``kind`` is a key of LOOKS."""

    kind: str
    detail: str = ""


class DeviceRow(Record):
    """A device of the fleet in one line; accuracies are shares in 0..1, None where not known.

    A device without a model (left out, absent) has no shape, no size and no accuracies.
    """

    name: str
    cluster: str
    width: float | None = None
    depth: int | None = None
    parameters: int | None = None
    size_bytes: int | None = None
    limit_bytes: int | None = None
    as_sent: float | None = None
    alone: float | None = None
    fleetfit: float | None = None
    looks: tuple[Look, ...] = ()

    @property
    def room(self) -> float | None:
        """Share of its own limit that its model takes."""
        return self.size_bytes / self.limit_bytes if self.size_bytes is not None and self.limit_bytes else None

    def has(self, kind: str) -> bool:
        """Whether this is something to look at here."""
        return any(look.kind == kind for look in self.looks)


class NextCommand(Record):
    """What one may want to do next, and the command line that does it."""

    wish: str
    command: str


def device_rows(summary: Summary) -> list[DeviceRow]:
    """Every device of the fleet: those with a model in their order, then those that got none."""
    shapes = {c.id: (c.width, c.depth) for c in summary.clusters}
    rows = [_finished(device, *shapes.get(device.cluster, (None, None))) for device in summary.devices]
    rows += [
        DeviceRow(
            name=left.device_id,
            cluster=left.cluster,
            limit_bytes=left.limit_bytes,
            looks=(Look(kind=LEFT_OUT, detail=left.reason),),
        )
        for left in summary.left_out
    ]
    told = {row.name for row in rows}
    rows += [
        DeviceRow(name=a.id, cluster=a.cluster, looks=(Look(kind=ABSENT, detail=f"since {a.since}"),))
        for a in summary.absent
        if a.id not in told
    ]
    return rows


def _finished(device: DeviceLine, width: float | None, depth: int | None) -> DeviceRow:
    as_sent, alone, fleetfit = (
        value if known(value) else None for value in (device.accuracy_coarse, device.accuracy_local, device.accuracy)
    )
    looks = []
    if device.size_bytes > device.limit_bytes:
        looks.append(Look(kind=OVER))
    for kind, earlier in ((BELOW_SENT, as_sent), (BELOW_ALONE, alone)):
        if earlier is not None and fleetfit is not None and fleetfit < earlier:
            looks.append(Look(kind=kind, detail=points(fleetfit - earlier)))
    if device.size_bytes < SMALL_SHARE * device.limit_bytes:
        looks.append(Look(kind=UNUSED))
    if ONE_CLASS_NOTE in device.notes:
        looks.append(Look(kind=ONE_CLASS))
    return DeviceRow(
        name=device.id,
        cluster=device.cluster,
        width=width,
        depth=depth,
        parameters=device.parameters,
        size_bytes=device.size_bytes,
        limit_bytes=device.limit_bytes,
        as_sent=as_sent,
        alone=alone,
        fleetfit=fleetfit,
        looks=tuple(looks),
    )


def verdict(summary: Summary) -> str:
    """The run in one sentence: who has a model that fits, how good they are, and who is worth a look."""
    rows = device_rows(summary)
    return "; ".join([_fit(rows), *_without(rows), *_accuracy(summary, rows)]) + "."


def _fit(rows: list[DeviceRow]) -> str:
    number, fit = len(rows), sum(row.size_bytes is not None and not row.has(OVER) for row in rows)
    if number == 1:
        return f"The one device has {'a' if fit else 'no'} model within its storage"
    if not fit:
        return f"None of {plural(number, 'device')} has a model within its storage"
    if fit == number:
        return f"All {count(number)} devices have a model within their storage"
    have = "has a model within its" if fit == 1 else "have a model within their"
    return f"{count(fit)} of {count(number)} devices {have} storage"


def _without(rows: list[DeviceRow]) -> list[str]:
    said = {
        OVER: ("is", "are", "over the limit"),
        LEFT_OUT: ("was", "were", "left out"),
        ABSENT: ("is", "are", "absent"),
    }
    parts = []
    for kind, (one, many, what) in said.items():
        names = [row.name for row in rows if row.has(kind)]
        if names:
            parts.append(f"{count(len(names))} {one if len(names) == 1 else many} {what}: {listed(names)}")
    return parts


def _accuracy(summary: Summary, rows: list[DeviceRow]) -> list[str]:
    if summary.privacy is not None:
        return ["accuracies stay on the devices, as the job’s privacy asks"]
    sent, alone, fleetfit = (mean(getattr(row, of) for row in rows) for of in ("as_sent", "alone", "fleetfit"))
    if fleetfit is None:
        return ["accuracies are not known, since no device has test samples"]
    parts = [f"mean accuracy {percent(fleetfit)} ({percent(sent)} as sent, {percent(alone)} fine-tuned alone)"]
    below_sent, below_alone = ([row.name for row in rows if row.has(kind)] for kind in (BELOW_SENT, BELOW_ALONE))
    if not below_sent and not below_alone:
        return [*parts, "no device ended below as sent or fine-tuned alone"]
    if below_sent == below_alone:
        return [*parts, _ended(below_sent, "as sent and fine-tuned alone")]
    told = ((below_sent, "as sent"), (below_alone, "fine-tuned alone"))
    return [*parts, *(_ended(names, words) for names, words in told if names)]


def _ended(names: list[str], below: str) -> str:
    return f"{plural(len(names), 'device')} ended below {below}: {listed(names)}"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many there are more."""
    every = list(names)
    if len(every) <= MOST_NAMES + 1:  # "and 1 more" would be no shorter than the name
        return ", ".join(every)
    return f"{', '.join(every[:MOST_NAMES])} and {count(len(every) - MOST_NAMES)} more"


def next_commands(summary: Summary, folder: Path) -> list[NextCommand]:
    """What comes after a run, with a device of this fleet; nothing that its folder has no models for.

    Args:
        summary: The run's.
        folder: Its folder, as the person who types names it.
    """
    run = shlex.quote(str(folder))
    found = []
    if summary.devices:
        first = summary.devices[0].id
        kind = summary.data.kind if summary.data else None
        sample = {"image": "picture.png", "text": '"a text to label"'}.get(kind or "", "INPUT")
        if summary.deployed:
            found.append(
                NextCommand(
                    wish="Label an input, on a device: each has its model in its kit",
                    command=f"fleetfit predict KIT/model {sample}",
                )
            )
        else:
            model = shlex.quote(str(folder / "devices" / first))
            found += [
                NextCommand(wish="Label an input with a device’s model", command=f"fleetfit predict {model} {sample}"),
                NextCommand(
                    wish="Write a model for a device without fleetfit (ONNX)",
                    command=f"fleetfit export {run} --device {shlex.quote(first)}",
                ),
                NextCommand(wish="The same for all devices", command=f"fleetfit export {run} --all"),
            ]
    return [
        *found,
        NextCommand(wish="Write this page again", command=f"fleetfit report {run}"),
        NextCommand(wish="Your own data and devices", command="fleetfit init my-job.toml"),
    ]
