"""Three kinds of charts as SVG: bars (the paper beside us), points over K (Fig. 2) and training curves.

Written out by hand: a page that stands alone, in light and in dark, wants a few lines and texts, no plotting library.
Inside a page the lines and texts take the page's colour (currentColor); a file of its own gets a white ground. Texts
are large enough to be read when a phone shrinks the drawing to its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

# Told apart in light and dark, by most people who see colours differently, and by shape (hollow, dashed) in print.
PAPER, OURS, THIRD = "#c8690c", "#2f7fc4", "#7a7a7a"
FONT = "font-family:system-ui,-apple-system,'Segoe UI',sans-serif"
WIDTH = 460  # units; a phone shows them on some 340 pixels


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row: the paper's number and ours, in percent, ours with an interval; None where there is none."""

    label: str
    paper: float | None
    ours: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""  # instead of ours


@dataclass(frozen=True, kw_only=True)
class Series:
    """`points` are (x, y, low, high), low and high None without an interval."""

    name: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    colour: str
    hollow: bool = False  # hollow points and a dashed line
    dots: bool = True


@dataclass(kw_only=True)
class Drawing:
    """Elements on a ground of some size."""

    title: str
    width: float
    height: float
    elements: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, *, size: float = 14, anchor: str = "start", more: str = "") -> None:
        """A line of text that stands on y."""
        self.elements.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" fill="currentColor"{more}>'
            f"{escape(text)}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "currentColor", more: str = "") -> None:
        """A straight line."""
        self.elements.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{more}/>')

    def svg(self, *, alone: bool = False) -> str:
        """The drawing for a page, or as a file of its own."""
        ground = f'<rect width="{self.width:g}" height="{self.height:g}" fill="#fff"/>' if alone else ""
        look = f"{FONT};color:#1b1b1b" if alone else FONT
        size = f' width="{2 * self.width:g}" height="{2 * self.height:g}"' if alone else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}"{size} role="img" '
            f'style="{look}"><title>{escape(self.title)}</title>{ground}{"".join(self.elements)}</svg>'
        )


def bars(title: str, items: Sequence[Bar]) -> Drawing:
    """A row for each: its label, under it the paper's bar and ours, from 0 to 100 percent, the values at their ends."""
    step, top, left, right = 54, 34, 6, WIDTH - 58
    made = Drawing(title=title, width=WIDTH, height=top + step * len(items) + 26)

    def x(percent: float) -> float:
        return left + (right - left) * percent / 100

    _legend(made, [("paper", PAPER, True), ("ours, with its interval", OURS, False)])
    bottom = made.height - 22
    for percent in (0, 25, 50, 75, 100):
        made.line(x(percent), top - 4, x(percent), bottom, more=' stroke-opacity=".18"')
        made.text(x(percent), bottom + 16, f"{percent} %", size=12, anchor="middle" if percent else "start")
    for number, bar in enumerate(items):
        y = top + step * number
        made.text(left, y + 13, bar.label, size=14)
        if bar.paper is not None:
            made.elements.append(
                f'<rect x="{left}" y="{y + 19:.1f}" width="{x(bar.paper) - left:.1f}" height="10" fill="{PAPER}" '
                f'fill-opacity=".35" stroke="{PAPER}"/>'
            )
            made.text(x(bar.paper) + 6, y + 28.5, f"{bar.paper:.2f}", size=12)
        if bar.ours is None:
            made.text(left, y + 42, bar.note or "not run", size=12, more=' fill-opacity=".75" font-style="italic"')
            continue
        made.elements.append(
            f'<rect x="{left}" y="{y + 32:.1f}" width="{max(0.5, x(bar.ours) - left):.1f}" height="10" fill="{OURS}"/>'
        )
        end = bar.ours
        if bar.low is not None and bar.high is not None:
            _whisker_across(made, x(max(bar.low, 0)), x(min(bar.high, 100)), y + 37, bar.low >= 0, bar.high <= 100)
            end = max(end, min(bar.high, 100))
        made.text(x(end) + 6, y + 41.5, f"{bar.ours:.2f}", size=12)
    return made


def points(title: str, series: Sequence[Series], *, x_label: str, y_label: str, ticks: Sequence[float]) -> Drawing:
    """Points over x, joined by lines, with intervals; the y axis covers what there is."""
    return _plot(title, series, x_label, y_label, ticks, width=WIDTH, height=310, size=14)


def curves(title: str, series: Sequence[Series]) -> Drawing:
    """A small panel of curves over epochs, in percent."""
    last = max((point[0] for of in series for point in of.points), default=1)
    step = _nice(last / 4) if last > 4 else 1
    ticks = [n * step for n in range(1, int(last / step) + 1)] if last > 4 else list(range(1, int(last) + 1))
    return _plot(title, series, "epoch", "%", ticks, width=300, height=200, size=12, bounds=(0, 100))


def grid(title: str, drawings: Sequence[Drawing], columns: int = 2) -> Drawing:
    """Several drawings of one size as one."""
    if not drawings:
        return Drawing(title=title, width=WIDTH, height=20)
    wide, high = max(of.width for of in drawings), max(of.height for of in drawings)
    columns = min(columns, len(drawings))
    made = Drawing(title=title, width=columns * wide, height=math.ceil(len(drawings) / columns) * high)
    for number, of in enumerate(drawings):
        x, y = number % columns * wide, number // columns * high
        made.elements.append(f'<g transform="translate({x:g} {y:g})">{"".join(of.elements)}</g>')
    return made


def _plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    ticks: Sequence[float],
    *,
    width: float,
    height: float,
    size: float,
    bounds: tuple[float, float] | None = None,
) -> Drawing:
    made = Drawing(title=title, width=width, height=height)
    left, right, top, bottom = 3.3 * size, width - 14, 3.6 * size, height - 3.2 * size
    xs = [*ticks, *(point[0] for of in series for point in of.points)] or [0.0]
    low_x, high_x = min(xs), max(xs)
    values = [value for of in series for point in of.points for value in point[1:] if value is not None]
    low_y, high_y, step = _axis(values, bounds)

    def x(value: float) -> float:
        return left + 10 + (right - left - 20) * ((value - low_x) / (high_x - low_x) if high_x > low_x else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low_y) / (high_y - low_y)

    made.text(6, size + 2, title, size=size, more=' font-weight="600"')
    _legend(made, [(of.name, of.colour, of.hollow) for of in series], y=2.6 * size, size=size - 2)
    for number in range(round((high_y - low_y) / step) + 1):
        value = low_y + number * step
        made.line(left, y(value), right, y(value), more=' stroke-opacity=".18"')
        made.text(left - 5, y(value) + size / 3, f"{value:g}", size=size - 1, anchor="end")
    for value in ticks:
        made.line(x(value), bottom, x(value), bottom + 4, more=' stroke-opacity=".5"')
        made.text(x(value), bottom + size + 5, f"{value:g}", size=size - 1, anchor="middle")
    made.line(left, bottom, right, bottom, more=' stroke-opacity=".5"')
    made.text(right, height - 4, f"{x_label}; {y_label} upwards", size=size - 1, anchor="end")
    for of in series:
        ordered = sorted(of.points)
        path = " ".join(f"{x(point[0]):.1f},{y(point[1]):.1f}" for point in ordered)
        dash = ' stroke-dasharray="5 4"' if of.hollow else ""
        if len(ordered) > 1:
            made.elements.append(f'<polyline points="{path}" fill="none" stroke="{of.colour}" stroke-width="2"{dash}/>')
        for at, value, low, high in ordered:
            if low is not None and high is not None:
                _whisker_upwards(made, x(at), y(low), y(high), of.colour)
            if of.dots or len(ordered) == 1:
                inside = "none" if of.hollow else of.colour
                made.elements.append(
                    f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="{5 if of.hollow else 4}" fill="{inside}" '
                    f'stroke="{of.colour}" stroke-width="2"><title>{escape(of.name)}, {at:g}: {value:.2f}</title>'
                    "</circle>"
                )
    return made


def _legend(made: Drawing, names: Sequence[tuple[str, str, bool]], y: float = 18, size: float = 13) -> None:
    x = 8.0
    for name, colour, hollow in names:
        inside = "none" if hollow else colour
        made.elements.append(
            f'<rect x="{x:.1f}" y="{y - size * 0.75:.1f}" width="{size:.1f}" height="{size * 0.75:.1f}" '
            f'fill="{inside}" stroke="{colour}" stroke-width="1.5"/>'
        )
        made.text(x + size + 5, y, name, size=size)
        x += size + 24 + 0.56 * size * len(name)


def _whisker_across(made: Drawing, low: float, high: float, y: float, *ends: bool) -> None:
    """From `low` to `high`; `ends` says at which of them it ends, and does not only leave the picture."""
    made.line(low, y, high, y, more=' stroke-width="1.5"')
    for x, end in zip((low, high), ends, strict=True):
        if end:
            made.line(x, y - 4, x, y + 4, more=' stroke-width="1.5"')


def _whisker_upwards(made: Drawing, x: float, low: float, high: float, colour: str) -> None:
    made.line(x, low, x, high, colour, ' stroke-width="1.5"')
    for y in (low, high):
        made.line(x - 5, y, x + 5, y, colour, ' stroke-width="1.5"')


def _axis(values: Sequence[float], bounds: tuple[float, float] | None) -> tuple[float, float, float]:
    """Bounds and step of an axis in percent, on round numbers, that holds all values."""
    if bounds is not None:
        return (*bounds, (bounds[1] - bounds[0]) / 4)
    if not values:
        return 0, 100, 25
    low, high = min(values), max(values)
    step = _nice(max(high - low, 2) / 5)
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    return max(0, bottom - (step if bottom == low else 0)), top if top > bottom else top + step, step


def _nice(value: float) -> float:
    """The next of 1, 2, 5, 10, 20 ... that is no smaller."""
    size = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(size * step for step in (1, 2, 5, 10) if size * step >= value * 0.9999)
