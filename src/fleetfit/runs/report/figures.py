"""The report's figures: plain numbers in, inline SVG out. Colours are the style sheet's, so both colour modes work."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fleetfit.runs.report.markup import Markup, bytes_text, decimal, element, join, known, percent

LEVELS = 16  # shades of a large matrix; its cells are drawn shade by shade
MAX_NUMBERED = 12  # a matrix up to this size shows its numbers
MAX_ROWS = 40  # a cluster up to this size shows every device; a larger one its distribution


def svg(width: float, height: float, label: str, *children: Markup) -> Markup:
    """A figure of its own; ``label`` is what a screen reader says."""
    return element(
        "svg",
        *children,
        width=math.ceil(width),
        height=math.ceil(height),
        viewbox=f"0 0 {math.ceil(width)} {math.ceil(height)}",
        role="img",
        aria_label=label,
    )


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """One line of text."""
    return element("text", content, x=x, y=y, text_anchor=anchor if anchor != "start" else None, class_=class_)


def path(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return element("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=class_)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` or below to ``high`` or above."""
    span = high - low if high > low else max(abs(high), 1e-9)
    raw = span / max(about - 1, 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two positive numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return inside or [low, high]


def number_on(shade: float) -> str | None:
    """The class of a number on a cell of this shade in 0..1, so that it can be read in both colour modes."""
    return None if shade <= 0.45 else "mid" if shade <= 0.72 else "paper"


def shorten(name: str, length: int) -> str:
    """At most ``length`` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


# -- the front --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrontPoint:
    """One candidate as a cluster sees it; ``letters`` stand for who chooses it."""

    name: str
    size_bytes: float
    loss: float
    fits: bool
    on_front: bool
    letters: str
    chosen: bool


def mark(kind: str) -> Callable[[float, float], Markup]:
    """How a candidate is drawn: front, fits, over (the limit), or choice, the ring around the chosen one."""
    radius = {"front": 5.0, "choice": 6.5}.get(kind, 3.5)
    return lambda x, y: element("circle", cx=x, cy=y, r=radius, class_=kind)


def front_figure(cluster: str, candidates: Sequence[FrontPoint], limit_bytes: float, usable_bytes: float) -> Markup:
    """Candidates by size (logarithmic) and loss; over the limit hollow, on the Pareto front grid coloured."""
    width, height, left, right, top, bottom = 360, 270, 40, 352, 22, 228
    shown = [c for c in candidates if known(c.loss) and c.size_bytes > 0]
    if not shown:
        return svg(width, 60, f"{cluster}: no candidate has a loss", text(left, 34, "no finite losses"))
    low = math.log(min(min(c.size_bytes for c in shown), usable_bytes) * 0.85)
    high = math.log(max(max(c.size_bytes for c in shown), limit_bytes) * 1.15)
    ticks = nice_ticks(min(c.loss for c in shown), max(c.loss for c in shown))

    def at(size: float, loss: float) -> tuple[float, float]:
        x = left + (math.log(size) - low) / (high - low) * (right - left)
        return x, bottom - (loss - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts = [
        _y_axis(ticks, left, right, top, bottom),
        text(left, 12, "validation loss, nats per sample", class_="small"),
    ]
    for tick in log_ticks(math.exp(low), math.exp(high)):
        x, _ = at(tick, ticks[0])
        parts += [
            path([(x, bottom), (x, bottom + 4)], "axis"),
            text(x, bottom + 17, bytes_text(tick), "end" if x > right - 14 else "middle", "small"),
        ]
    parts.append(text((left + right) / 2, height - 6, "size of the candidate", "middle", "small"))
    x, _ = at(limit_bytes, ticks[0])
    parts += [
        path([(x, top), (x, bottom)], "limit"),
        text(x - 4, top + 9, f"limit {bytes_text(limit_bytes)}", "end", "limit-text"),
    ]
    if usable_bytes < limit_bytes:
        x, _ = at(usable_bytes, ticks[0])
        parts.append(path([(x, top + 14), (x, bottom)], "axis"))
    for c in sorted(shown, key=lambda c: (c.chosen, bool(c.letters), c.on_front, c.fits)):
        x, y = at(c.size_bytes, c.loss)
        kind = "front" if c.fits and c.on_front else "fits" if c.fits else "over"
        title = element("title", f"{c.name}: loss {decimal(c.loss)}, {bytes_text(c.size_bytes)}")
        parts.append(element("circle", title, cx=x, cy=y, r=5 if kind == "front" else 3.5, class_=kind))
        if c.chosen:
            parts.append(element("circle", cx=x, cy=y, r=9, class_="choice"))
        if c.letters:
            offset = 12 if c.chosen else 8
            ends = x > (left + 2 * right) / 3
            parts.append(
                text(x - offset if ends else x + offset, y - 5, c.letters, "end" if ends else "start", "letters")
            )
    fitting = sum(c.fits for c in candidates)
    label = f"{cluster}: {len(candidates)} candidates by size and validation loss, {fitting} within the limit"
    return svg(width, height, label, *parts)


def _y_axis(ticks: Sequence[float], left: float, right: float, top: float, bottom: float) -> Markup:
    parts = []
    for tick in ticks:
        y = bottom - (tick - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)
        parts += [path([(left, y), (right, y)], "axis"), text(left - 6, y + 4, f"{tick:g}", "end", "small")]
    return join(*parts)


# -- heat maps --------------------------------------------------------------------------------------------------------


def heat_map(
    label: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    shown: Callable[[float], str],
    row_title: str,
    column_title: str,
    marks: Mapping[tuple[int, int], str] | None = None,
    cell: tuple[float, float] = (62, 40),
) -> Markup:
    """Shades from the lowest to the highest value, with numbers; ``marks`` frame cells and name who is there."""
    marks = marks or {}
    finite = [v for row in values for v in row if v is not None and known(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    left, top = 34, 40
    parts = [
        text(left + len(columns) * cell[0] / 2, 13, column_title, "middle", "small"),
        element(
            "text",
            row_title,
            transform=f"translate(11 {top + len(rows) * cell[1] / 2:.0f}) rotate(-90)",
            text_anchor="middle",
            class_="small",
        ),
    ]
    parts += [text(left + (j + 0.5) * cell[0], top - 8, name, "middle", "small") for j, name in enumerate(columns)]
    for i, row in enumerate(values):
        y = top + i * cell[1]
        parts.append(text(left - 6, y + cell[1] / 2 + 4, rows[i], "end", "small"))
        for j, value in enumerate(row):
            x = left + j * cell[0]
            shade = 0.0 if value is None or not known(value) else (value - low) / (high - low or 1)
            parts.append(
                element(
                    "rect",
                    x=x + 1,
                    y=y + 1,
                    width=cell[0] - 2,
                    height=cell[1] - 2,
                    rx=3,
                    class_="heat",
                    fill_opacity=f"{0.06 + 0.94 * shade:.2f}",
                )
            )
            who = marks.get((i, j))
            middle = y + cell[1] / 2 + (4 if who is None else -2)
            number = shown(value) if value is not None and known(value) else "–"
            on = number_on(shade)
            parts.append(text(x + cell[0] / 2, middle, number, "middle", on))
            if who is not None:
                frame = {"x": x + 2, "y": y + 2, "width": cell[0] - 4, "height": cell[1] - 4, "rx": 3}
                parts.append(element("rect", **frame, class_="choice"))
                parts.append(text(x + cell[0] / 2, y + cell[1] - 8, who, "middle", f"strong {on or ''}".strip()))
    return svg(left + len(columns) * cell[0] + 2, top + len(rows) * cell[1] + 2, label, *parts)


def matrix(label: str, values: Sequence[Sequence[float]]) -> Markup:
    """A square matrix of shares, devices numbered from 1; the full colour is the largest entry.

    Its cells are short thick lines, one path a shade: a fleet of large clusters still makes a small page.
    """
    n = len(values)
    cell = min(44.0, 330.0 / max(n, 1))
    left, top = 26.0, 36.0
    high = max((v for row in values for v in row if known(v)), default=1.0) or 1.0
    levels: dict[int, list[str]] = {}
    numbers = []
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            level = round((LEVELS - 1) * max(value, 0.0) / high) if known(value) else 0
            levels.setdefault(level, []).append(f"M{j} {i}.5h.96")
            if n <= MAX_NUMBERED:
                on = number_on(level / (LEVELS - 1))
                number = f"{100 * value:.0f}" if known(value) else "–"
                numbers.append(text(left + (j + 0.5) * cell, top + (i + 0.5) * cell + 4, number, "middle", on))
    shades = [
        element("path", d="".join(cells), class_="cells", stroke_opacity=f"{0.05 + 0.95 * level / (LEVELS - 1):.2f}")
        for level, cells in sorted(levels.items())
    ]
    drawn = element("g", *shades, transform=f"translate({left:g} {top:g}) scale({cell:.4g})")
    every = 1 if n <= MAX_NUMBERED else 5
    names = [i for i in range(n) if i == 0 or (i + 1) % every == 0]
    axes = [text(left + (i + 0.5) * cell, top - 6, str(i + 1), "middle", "small") for i in names]
    axes += [text(left - 5, top + (i + 0.5) * cell + 4, str(i + 1), "end", "small") for i in names]
    axes.append(text(left, 12, "row: device, column: whom it listens to", class_="small"))
    return svg(max(left + n * cell + 2, 230), top + n * cell + 2, label, drawn, *numbers, *axes)


# -- lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One line; ``colour`` is accent, second or muted; ``marked`` is the place that gets a ring."""

    name: str
    values: Sequence[float | None]
    colour: str
    marked: int | None = None


def line_chart(
    label: str, series: Sequence[Series], x_names: Sequence[str], x_title: str, y_title: str, width: float = 330
) -> Markup:
    """Lines over named places; unknown values are left out."""
    height, left, right, top, bottom = 214, 40, width - 14, 40, 170
    finite = [v for s in series for v in s.values if v is not None and known(v)]
    if not finite:
        return svg(width, 60, f"{label}: not known", text(left, 34, "no finite values"))
    ticks = nice_ticks(min(finite), max(finite), 4)
    parts = [_y_axis(ticks, left, right, top, bottom), text(left, 12, y_title, class_="small")]

    def at(place: int, value: float) -> tuple[float, float]:
        x = left + 22 + place * (right - left - 44) / max(len(x_names) - 1, 1)
        return x, bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    parts += [text(at(i, 0)[0], bottom + 17, name, "middle", "small") for i, name in enumerate(x_names)]
    parts.append(text((left + right) / 2, height - 6, x_title, "middle", "small"))
    x = float(left)
    for s in series if len(series) > 1 else ():
        parts += [
            path([(x, 25), (x + 16, 25)], f"line-{s.colour}"),
            text(x + 21, 29, s.name, class_="small"),
        ]
        x += 34 + 6.2 * len(s.name)
    for s in series:
        places = [(i, at(i, v), v) for i, v in enumerate(s.values) if v is not None and known(v)]
        parts.append(path([place for _, place, _ in places], f"line-{s.colour}") if len(places) > 1 else Markup())
        for i, (x, y), value in places if len(places) <= 12 else ():
            title = element("title", f"{s.name}, {x_names[i]}: {decimal(value)}")
            parts.append(element("circle", title, cx=x, cy=y, r=3.5, class_=f"dot-{s.colour}"))
            if i == s.marked:
                parts.append(element("circle", cx=x, cy=y, r=8, class_="choice"))
            if len(series) == 1 and len(places) <= 6:
                parts.append(text(x, y - 9, decimal(value), "middle", "value"))
    return svg(width, height, label, *parts)


# -- devices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceDots:
    """One device's three accuracies, shares in 0..1."""

    name: str
    coarse: float | None
    alone: float | None
    fleetfit: float | None
    num_test: int

    @property
    def known(self) -> list[float]:
        """Those that are known."""
        return [v for v in (self.coarse, self.alone, self.fleetfit) if v is not None and known(v)]


def ring(x: float, y: float) -> Markup:
    """The model as it was sent."""
    return element("circle", cx=x, cy=y, r=6, class_="coarse")


def tick(x: float, y: float) -> Markup:
    """Fine-tuned alone."""
    return path([(x, y - 7), (x, y + 7)], "alone")


def dot(x: float, y: float) -> Markup:
    """What fleetfit ships."""
    return element("circle", cx=x, cy=y, r=3.6, class_="dot-accent")


def legend_mark(mark: Callable[[float, float], Markup]) -> Markup:
    """One mark alone, for a legend."""
    return element("svg", mark(8, 8), width=16, height=16, viewbox="0 0 16 16", aria_hidden="true")


def accuracy_floor(devices: Sequence[DeviceDots]) -> float:
    """Where the accuracy axis starts: a tenth below the lowest value."""
    lowest = min((v for d in devices for v in d.known), default=0.0)
    return max(0.0, math.floor(lowest * 10 - 0.5) / 10)


def dot_plot(cluster: str, devices: Sequence[DeviceDots], floor: float) -> Markup:
    """One row a device: ring as sent, tick fine-tuned alone, dot fleetfit; n test samples at the right."""
    row, left, right, top = 21, 104, 300, 20
    bottom = top + row * len(devices)
    axis, at = _accuracy_axis(floor, left, right, top, bottom)
    parts = [axis, text(352, 12, "n test", "end", "small")]
    for i, d in enumerate(devices):
        y = top + (i + 0.5) * row
        says = (
            f"as sent {percent(d.coarse)}, alone {percent(d.alone)}, fleetfit {percent(d.fleetfit)}, n = {d.num_test}"
        )
        marks = [element("title", f"{d.name}: {says}"), text(left - 14, y + 4, shorten(d.name, 14), "end")]
        if d.known:
            marks.append(path([(at(min(d.known)), y), (at(max(d.known)), y)], "range"))
        else:
            marks.append(text(left + 6, y + 4, "not known", class_="small"))
        for mark, value in ((ring, d.coarse), (tick, d.alone), (dot, d.fleetfit)):
            if value is not None and known(value):
                marks.append(mark(at(value), y))
        marks.append(text(352, y + 4, str(d.num_test), "end", "small"))
        parts.append(element("g", *marks))
    return svg(360, bottom + 36, f"{cluster}: test accuracy of {len(devices)} devices", *parts)


def quantile_plot(cluster: str, devices: Sequence[DeviceDots], floor: float) -> Markup:
    """For large clusters: the share of devices that stay below each accuracy, a line for each of the three."""
    left, right, top, bottom = 44, 340, 44, 214
    axis, at = _accuracy_axis(floor, left, right, top, bottom)
    parts = [axis, text(left, 12, "share of devices below that accuracy", class_="small")]
    parts += [
        text(left - 6, bottom - s * (bottom - top) + 4, percent(s, 0), "end", "small")
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    lines = {
        "line-muted": ("as sent", [d.coarse for d in devices]),
        "line-second": ("alone", [d.alone for d in devices]),
        "line-accent": ("fleetfit", [d.fleetfit for d in devices]),
    }
    x = float(left)
    for class_, (name, values) in lines.items():
        parts += [path([(x, 27), (x + 16, 27)], class_), text(x + 21, 31, name, class_="small")]
        x += 90
        ordered = sorted(v for v in values if v is not None and known(v))
        if len(ordered) > 1:
            shares = [q / 100 for q in range(101)]
            places = [(at(ordered[round(s * (len(ordered) - 1))]), bottom - s * (bottom - top)) for s in shares]
            parts.append(path(places, class_))
    return svg(360, bottom + 36, f"{cluster}: distribution of test accuracy over {len(devices)} devices", *parts)


def _accuracy_axis(
    floor: float, left: float, right: float, top: float, bottom: float
) -> tuple[Markup, Callable[[float], float]]:
    def at(value: float) -> float:
        return left + (value - floor) / (1 - floor) * (right - left) if floor < 1 else right

    parts = [text((left + right) / 2, bottom + 32, "test accuracy", "middle", "small")]
    for value in (t for t in nice_ticks(floor, 1.0, 5) if floor - 1e-9 <= t <= 1 + 1e-9):
        parts.append(path([(at(value), top), (at(value), bottom)], "axis"))
        parts.append(text(at(value), bottom + 16, percent(value, 0), "middle", "small"))
    return join(*parts), at
