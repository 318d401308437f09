"""Pieces that the page is put together from: sections, panels, tables and bars."""

from collections.abc import Iterable, Mapping, Sequence

from fleetfit.core.records import HeaderSpec
from fleetfit.runs.report.markup import Child, Markup, element, known, plural
from fleetfit.runs.report.run_data import Run

MAX_CARDS = 8  # clusters whose cards stand open: more would be a dozen screens


def section(id_: str, title: str, *children: Child) -> Markup:
    """A part of the page that the navigation leads to."""
    title_id = f"{id_}-title"
    return element("section", element("h2", title, id=title_id), *children, id=id_, aria_labelledby=title_id)


def paragraph(*children: Child) -> Markup:
    """Running text."""
    return element("p", *children)


def note(*children: Child) -> Markup:
    """Small print."""
    return element("p", *children, class_="note")


def tag(words: str) -> Markup:
    """A short label in a frame."""
    return element("span", words, class_="tag")


def panel(title: Child, *children: Child) -> Markup:
    """A card; without a title where it is None."""
    return element("div", element("h3", title) if title is not None else None, *children, class_="panel")


def grid(*panels: Markup) -> Markup:
    """Cards side by side where there is room."""
    return element("div", *panels, class_="grid")


def per_cluster(run: Run, contents: Mapping[str, Markup]) -> Markup:
    """A card for each cluster; closed until asked for where there are many."""
    cards = grid(*(panel(c.id, contents[c.id]) for c in run.summary.clusters))
    if len(run.summary.clusters) <= MAX_CARDS:
        return cards
    return element("details", element("summary", f"Figures of {plural(len(run.summary.clusters), 'cluster')}"), cards)


def figure(drawing: Markup, *caption: Child) -> Markup:
    """A drawing and what it says."""
    return element("figure", drawing, element("figcaption", *caption) if caption else None)


def table(caption: str, columns: Sequence[str], rows: Iterable[Markup], numeric: Iterable[int] = ()) -> Markup:
    """A table that scrolls by itself on a narrow screen; ``numeric`` are numbers of columns set to the right."""
    right = set(numeric)
    head = [element("th", c, scope="col", class_="num" if i in right else None) for i, c in enumerate(columns)]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *head)),
        element("tbody", *rows),
    )
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def table_row(first: Child, *cells: Child, numeric: Iterable[int] = (), class_: str | None = None) -> Markup:
    """A row whose first cell is its heading."""
    right = set(numeric)
    body = [element("td", c, class_="num" if i in right else None) for i, c in enumerate(cells, start=1)]
    return element("tr", element("th", first, scope="row"), *body, class_=class_)


def bar_row(first: Child, share: float, value: str, *more: str, kind: str | None = None) -> Markup:
    """A row with a bar, its value, and more values."""
    filled = element("td", bar(share, kind), class_="barcell")
    values = [element("td", v, class_="num") for v in (value, *more)]
    return element("tr", element("th", first, scope="row"), filled, *values)


def bar(share: float | None, kind: str | None = None) -> Markup:
    """A bar that is filled to a share in 0..1; the number stands beside it."""
    filled = 100 * min(max(share, 0.0), 1.0) if share is not None and known(share) else 0.0
    return element("span", element("i", class_=kind, style=f"width:{filled:.1f}%"), class_="bar", aria_hidden="true")


def shape_text(width: float, depth: int) -> str:
    """'width 0.5, depth 2'."""
    return f"width {width:g}, depth {depth}"


def header_name(spec: HeaderSpec) -> str:
    """'searched, 3 blocks', or its name."""
    if not spec.blocks:
        return spec.name.replace("_", " ")
    return f"searched, {plural(len(spec.blocks) * spec.repeats, 'block')}"
