"""HTML and SVG by construction: elements that escape what they are given, and numbers as text."""

import html
import math

NOT_KNOWN = "–"
_VOID = frozenset({"meta", "br"})
_SVG_NAMES = {"viewbox": "viewBox"}


class Markup(str):
    """Text that is HTML already; any other text is escaped when it becomes a child or an attribute."""

    __slots__ = ()

    def __html__(self) -> str:
        """What template engines ask for, so that they do not escape it again."""
        return self


Child = str | int | None
Attribute = str | int | float | bool | None


def join(*children: Child) -> Markup:
    """Children one after the other; None is nothing, plain text is escaped."""
    parts = (c if isinstance(c, Markup) else html.escape(str(c)) for c in children if c is not None)
    return Markup("".join(parts))


def element(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """One element: ``class_`` is class, ``font_size`` is font-size; None and False leave an attribute out."""
    text = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None)
    if name in _VOID:
        return Markup(f"<{name}{text}>")
    return Markup(f"<{name}{text}>{join(*children)}</{name}>")


def _attribute(key: str, value: str | int | float | bool) -> str:
    name = _SVG_NAMES.get(key, key.rstrip("_").replace("_", "-"))
    if isinstance(value, bool):
        return f" {name}" if value else ""
    shown = f"{round(value, 1):g}" if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(shown)}"'


def known(value: float | None) -> bool:
    """Whether there is a finite number; None, NaN and infinities look the same on the page."""
    return value is not None and math.isfinite(value)


def decimal(value: float | None, places: int = 3) -> str:
    """0.123, or a dash."""
    return f"{value:.{places}f}".replace("-", "−") if value is not None and known(value) else NOT_KNOWN


def percent(value: float | None, places: int = 1) -> str:
    """A share in 0..1 as '94.4 %', or a dash."""
    return f"{100 * value:.{places}f}\u00a0%" if value is not None and known(value) else NOT_KNOWN


def points(difference: float | None) -> str:
    """A difference of two shares as '+1.2 points', or a dash."""
    if difference is None or not known(difference):
        return NOT_KNOWN
    return f"{100 * difference:+.1f} points".replace("-", "−")


def count(value: int) -> str:
    """203,082."""
    return f"{value:,}"


def plural(number: int, noun: str) -> str:
    """'1 device', '15 devices'."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g}\u00a0{units[power]}" if power else f"{value:.0f}\u00a0{units[0]}"


def bytes_text(value: float) -> str:
    """Powers of ten, as a job file writes them: '79.2 KB'."""
    return _scaled(value, ("bytes", "KB", "MB", "GB", "TB"))


def joules_text(value: float | None) -> str:
    """'5.7 kJ', or a dash."""
    return _scaled(value, ("J", "kJ", "MJ", "GJ")) if value is not None and known(value) else NOT_KNOWN


def seconds_text(value: float) -> str:
    """'0.43 s', '1 min 2 s', '2 h 5 min'; here and above, units stay on the line of their number."""
    if value < 60:
        return f"{value:.{1 if value >= 1 else 2}f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    parts = f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    return parts.replace(" ", "\u00a0")
