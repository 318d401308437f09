"""A header drawn as a graph: the backbone's outputs at the top, blocks with their operations, the classifier below."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fleetfit.core.records import Block, HeaderSpec
from fleetfit.method.search_space import loose_ends
from fleetfit.runs.report.figures import path, svg, text
from fleetfit.runs.report.markup import Markup, element, join

FIXED_BODIES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "mlp": (),
    "cnn_ignore": ("without [CLS]", "two 3×3 convolutions, pooling"),
    "cnn_add": ("[CLS] added to every token", "two 3×3 convolutions, pooling"),
    "cnn_project": ("[CLS] projected into every token", "two 3×3 convolutions, pooling"),
    "vit_block": ("one more Transformer layer,", "then its [CLS]"),
    "mlp_mixer": ("MLP-mixer block,", "mean over the tokens"),
    "resmlp": ("ResMLP block,", "mean over the tokens"),
}
OPERATION_NAMES = {
    "conv1": "conv 1×1",
    "conv3": "conv 3×3",
    "conv5": "conv 5×5",
    "identity": "identity",
    "downsample": "halve grid",
    "avg_pool": "avg pool",
    "max_pool": "max pool",
}
BOX, CHIP, LANE = 186.0, 82.0, 9.0  # widths


def header_graph(label: str, spec: HeaderSpec) -> Markup:
    """The header from the backbone's outputs, at the top, to the classes."""
    if spec.kind == "blocks":
        return _blocks_graph(label, spec)
    tokens = "[CLS] of the backbone output" if spec.kind in ("linear", "mlp") else "backbone output"
    hidden = spec.hidden or (64 if spec.kind == "mlp" else 0)
    chain: list[tuple[tuple[str, ...], str]] = [((tokens,), "source")]
    body = FIXED_BODIES.get(spec.kind, (spec.kind,))
    if body:
        chain.append((body, "box"))
    chain.append((_classifier(hidden), "box"))
    width = 230.0
    parts, y = [], 2.0
    for i, (lines, class_) in enumerate(chain):
        height = 14.0 + 16 * len(lines)
        parts.append(_box(width / 2, y, 196, lines, class_))
        y += height
        if i < len(chain) - 1:
            parts.append(_arrow([(width / 2, y), (width / 2, y + 22)]))
            y += 22
    return svg(width, y + 2, label, *parts)


def _classifier(hidden: int) -> tuple[str, ...]:
    return (f"hidden layer of {hidden}, GELU", "linear → classes") if hidden else ("linear → classes",)


def _box(x: float, y: float, width: float, lines: Sequence[str], class_: str) -> Markup:
    height = 14.0 + 16 * len(lines)
    parts = [element("rect", x=x - width / 2, y=y, width=width, height=height, rx=5, class_=class_)]
    parts += [text(x, y + 19 + 16 * i, line, "middle") for i, line in enumerate(lines)]
    return join(*parts)


def _arrow(points: Sequence[tuple[float, float]]) -> Markup:
    """A line that ends in an arrow head, which points the way of the last stretch."""
    (x0, y0), (x, y) = points[-2], points[-1]
    length = math.hypot(x - x0, y - y0) or 1.0
    u, v = (x - x0) / length, (y - y0) / length
    ends = [(x - 7 * u - 3.5 * v, y - 7 * v + 3.5 * u), (x - 7 * u + 3.5 * v, y - 7 * v - 3.5 * u)]
    head = element("path", d=f"M{x:.1f} {y:.1f}" + "".join(f"L{a:.1f} {b:.1f}" for a, b in ends) + "z", class_="arrow")
    return join(path([*points[:-1], (x - 5 * u, y - 5 * v)], "wire"), head)


@dataclass(frozen=True)
class _Wires:
    """Who feeds whom: operation 1 is fed from lanes at the left, operation 2 from the right; a source has one lane."""

    left: dict[int, list[int]]  # source -> blocks
    right: dict[int, list[int]]
    ends: tuple[int, ...]  # blocks whose average is the cell's output


def _wires(blocks: Sequence[Block]) -> _Wires:
    left: dict[int, list[int]] = {}
    right: dict[int, list[int]] = {}
    for b, block in enumerate(blocks):
        left.setdefault(block.input_1, []).append(b)
        right.setdefault(block.input_2, []).append(b)
    return _Wires(left, right, loose_ends(blocks))


def _blocks_graph(label: str, spec: HeaderSpec) -> Markup:
    blocks = spec.blocks
    wires = _wires(blocks) if blocks else _Wires({}, {}, ())
    joined = len(wires.ends) > 1  # then the right lanes also carry the loose ends to their average
    skipping = wires.ends[:-1]
    right_sources = sorted({*wires.right, *(2 + e for e in skipping)})
    side = 26 + LANE * max(len(wires.left), len(right_sources), 2)
    width = max(BOX + 2 * side, 300.0)
    middle = width / 2
    parts: list[Markup] = []
    box_left, box_right = middle - BOX / 2, middle + BOX / 2

    # Boxes, from top to bottom; y_of[source] is where its lanes leave it, chips[b] where block b is fed.
    y = 2.0
    y_of: dict[int, float] = {}
    chips: dict[int, float] = {}
    again = spec.repeats > 1 and bool(blocks)
    used = {0, 1} if again else {*wires.left, *wires.right} if blocks else {0}
    order = (1, 0) if 1 in used else (0,)  # the penultimate layer comes before the output
    for source in order:
        name = ("backbone output", "penultimate layer")[source]
        later = (("then: the last cell’s output", "then: the one before that")[source],) if again else ()
        lines = (f"{name} → {spec.channels} ch.", *later)
        box = _box(middle, y, BOX, lines, "source")
        parts.append(box if source in used else element("g", box, element("title", "not used"), class_="unused"))
        y_of[source] = y + 15
        y += 14 + 16 * len(lines) + 12
    cell_top = y
    y += 14 if blocks else 0
    for b, block in enumerate(blocks):
        parts.append(element("rect", x=box_left, y=y, width=BOX, height=66, rx=6, class_="box"))
        for x, operation in ((box_left + 6, block.operation_1), (box_right - 6 - CHIP, block.operation_2)):
            parts.append(element("rect", x=x, y=y + 7, width=CHIP, height=22, rx=11, class_="chip"))
            parts.append(text(x + CHIP / 2, y + 22, OPERATION_NAMES.get(operation, operation), "middle", "paper"))
        parts += [
            path([(box_left + 6 + CHIP / 2, y + 29), (middle - 9, y + 46)], "wire"),
            path([(box_right - 6 - CHIP / 2, y + 29), (middle + 9, y + 46)], "wire"),
            element("circle", cx=middle, cy=y + 48, r=9, class_="source"),
            text(middle, y + 52, "+", "middle"),
            text(box_left + 8, y + 59, f"block {b + 1}", class_="small"),
        ]
        chips[b] = y + 18
        y_of[2 + b] = y + 52
        y += 66 + 22
    last_bottom = y - 22
    if joined:
        parts.append(_arrow([(middle, last_bottom), (middle, y)]))
        parts.append(_box(middle, y, BOX, ("mean of " + ", ".join(f"{e + 1}" for e in wires.ends),), "box"))
        join_y = y + 15
        y += 30
        last_bottom = y
        y += 22
    for sources, sign, edge in ((wires.left, -1.0, box_left), (wires.right, 1.0, box_right)):
        lanes = sorted(sources) if sign < 0 else right_sources
        for number, source in enumerate(lanes):
            lane = edge + sign * (14 + LANE * (len(lanes) - 1 - number))
            places = [chips[b] for b in sources.get(source, ())]
            to_join = sign > 0 and source - 2 in skipping
            stops = places + ([join_y] if to_join else [])
            start = y_of[source]
            parts.append(path([(edge, start), (lane, start), (lane, stops[-1])], "wire"))
            for place in stops:
                inner = edge + (sign * -6 if place in places else 0)
                parts.append(_arrow([(lane, place), (inner, place)]))
            parts += [element("circle", cx=lane, cy=place, r=2.5, class_="joint") for place in stops[:-1]]
    if blocks:
        cell = {"x": 2, "y": cell_top, "width": width - 4, "height": last_bottom - cell_top + 20, "rx": 8}
        repeat = f"cell, {spec.repeats} times in a row" if again else "cell"
        parts += [element("rect", **cell, class_="cell"), text(10, last_bottom + 14, repeat, class_="small")]
    else:
        last_bottom = y_of[0] + 15
    y = last_bottom + 46

    # The tail: pooling beside [CLS], both into the classifier.
    pooled, token = middle - 62, middle + 84
    parts.append(_arrow([(middle, last_bottom), (middle, y - 15), (pooled, y - 15), (pooled, y)]))
    parts.append(_box(pooled, y, 164, (f"pool to {spec.pooling}×{spec.pooling}, flatten",), "box"))
    parts.append(_box(token, y, 104, ("[CLS] × gate",), "source"))
    y += 30
    for x in (pooled, token):
        parts.append(_arrow([(x, y), (x, y + 24)]))
    lines = _classifier(spec.hidden)
    parts.append(_box(middle, y + 24, 280, lines, "box"))
    return svg(width, y + 24 + 14 + 16 * len(lines) + 2, label, *parts)


def header_words(spec: HeaderSpec) -> str:
    """The header in words, for those who do not see the graph."""
    if spec.kind != "blocks":
        return spec.kind.replace("_", " ") + " header"
    names = ("the backbone output", "the penultimate layer", *(f"block {i + 1}" for i in range(len(spec.blocks))))
    lines = [
        f"block {b + 1} adds {OPERATION_NAMES[k.operation_1]} of {names[k.input_1]} "
        f"and {OPERATION_NAMES[k.operation_2]} of {names[k.input_2]}"
        for b, k in enumerate(spec.blocks)
    ]
    return "; ".join([*lines, f"pooling to {spec.pooling} by {spec.pooling}, joined by [CLS], then the classifier"])
