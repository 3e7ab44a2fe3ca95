"""Plots as SVG that follow the page: colours are its style's, widths are shares of whatever room there is.

Horizontal places are percentages and vertical ones pixels, so that text keeps its size on a phone; only the
matrix is drawn to a fixed scale. Each plot has a title and a description that says its figures in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

LEFT, WIDTH = 1.0, 96.0  # percent: the ends of an axis keep their marks within the drawing
ROW = 34  # pixels of a row with its name above it
BELOW = 13  # pixels between marks that stand under each other
TOP = 8  # pixels
SIDE = 26  # pixels of a cell of the matrix
GUTTER = 200  # pixels of the matrix's names
TALL = 260  # pixels of a plot with two axes
HEAD = 3  # characters of a name that can stand above a column
SHORTENED = 26  # characters of a name beside the matrix
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Mark:
    """One figure within a row."""

    value: float
    low: float | None = None
    high: float | None = None
    shape: str = "bar"
    """bar, dot or diamond."""
    colour: str = "ours"
    """A colour of the page's style: ours, other or wrong."""
    below: bool = False
    """It stands under the others, so that its range is seen."""


@dataclass(frozen=True)
class Row:
    """A name and its figures."""

    name: str
    marks: tuple[Mark, ...]
    note: str = ""
    """Stands behind the name."""


@dataclass(frozen=True)
class Axis:
    """A scale from left to right, or from below upwards."""

    low: float = 0.0
    high: float = 1.0
    ticks: tuple[float, ...] = TICKS
    logarithmic: bool = False
    names: Mapping[float, str] = field(default_factory=dict)
    """What stands at single ticks instead of percentages."""

    def share(self, value: float) -> float:
        """Return where a value is, from 0 at the low end to 1."""
        low, high, place = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, place = math.log(low), math.log(high), math.log(place)
        return (place - low) / (high - low) if high > low else 0.5

    def label(self, value: float) -> str:
        """Return what stands at a tick."""
        if value in self.names:
            return self.names[value]
        return f"{100 * value:.0f} %".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Point:
    """A place in a plot with two axes; ``weight`` from 0 to 1 makes its dot larger."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    weight: float = 0.2


@dataclass(frozen=True)
class Line:
    """Points of one colour, joined from left to right, and single ones that belong to them."""

    name: str
    points: tuple[Point, ...]
    colour: str = "ours"
    single: tuple[Point, ...] = ()


def around_zero(values: Iterable[float]) -> Axis:
    """Return an axis of differences, as far to the left as to the right."""
    reach = max((abs(value) for value in values), default=0.0)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5) if reach <= 2 * step or step == 0.5)
    return Axis(-2 * step, 2 * step, (-2 * step, -step, 0.0, step, 2 * step))


def rows(identifier: str, title: str, shown: Sequence[Row], axis: Axis | None = None) -> Markup:
    """Draw a row for each name with its marks on one scale."""
    axis = axis or Axis()
    step = ROW + BELOW * any(mark.below for row in shown for mark in row.marks)
    height = TOP + step * len(shown)
    parts = [_grid(axis, height)]
    for number, row in enumerate(shown):
        top = TOP + step * number
        note = _element("tspan", f" {row.note}", class_="faint") if row.note else ""
        parts.append(_element("text", escape(row.name) + note, x="1%", y=top + 12))
        parts += [_mark(mark, axis, top + 22 + BELOW * mark.below) for mark in row.marks]
    words = "; ".join(f"{row.name}: {', '.join(map(_in_words, row.marks))}" for row in shown)
    return _drawing(identifier, title, words, height + 20, parts)


def matrix(
    identifier: str, names: Sequence[str], counts: Sequence[Sequence[int]], unanswered: bool, description: str
) -> Markup:
    """Draw counts of gold (rows) by predicted (columns), shaded by their share of the row.

    ``counts`` has one column more than rows, of rows without an answer; it is drawn if ``unanswered``.
    """
    columns = len(names) + unanswered
    heads = list(names) if max(map(len, names)) <= HEAD else [f"{number}" for number in range(1, columns + 1)]
    parts = []
    for number, (name, head) in enumerate(zip(names, heads, strict=False)):
        label = _short(name) if name == head else _short(name) + _element("tspan", f" {head}", class_="faint")
        parts.append(_element("text", label, x=GUTTER - 6, y=24 + SIDE * number + 17, text_anchor="end"))
        parts.append(_text(head, GUTTER + SIDE * number + SIDE / 2, 16, "faint"))
    if unanswered:
        parts.append(_text("none", GUTTER + SIDE * len(names) + SIDE / 2, 16, "faint"))
    parts += [
        _cell(names, row, column, count, sum(line))
        for row, line in enumerate(counts)
        for column, count in enumerate(line[:columns])
    ]
    size = {"width": GUTTER + SIDE * columns + 2, "height": 26 + SIDE * len(names)}
    return _drawing(identifier, "Confusion matrix", description, size["height"], parts, size["width"])


def reliability(identifier: str, points: Sequence[Point], bins: Sequence[int]) -> Markup:
    """Draw how often answers of a probability were right, beside the line where both are the same."""
    diagonal = _element(
        "line", x1=_x(Axis(), 0), x2=_x(Axis(), 1), y1=_y(Axis(), 0), y2=_y(Axis(), 1), class_="other"
    )
    words = "; ".join(
        f"{count} rows with a mean probability of {100 * point.x:.0f} %: {100 * point.y:.0f} % right"
        for point, count in zip(points, bins, strict=True)
    )
    dots = _line(Line("right", (), single=tuple(points)), Axis(), Axis())
    parts = [_frame(Axis(), Axis()), diagonal, *dots, _heights(Axis())]
    return _drawing(identifier, "Probability and share of right answers", words, TALL + 28, parts)


def curve(identifier: str, title: str, lines: Sequence[Line], across: Axis, upwards: Axis) -> Markup:
    """Draw lines with their ranges over a scale of sizes."""
    parts = [_frame(across, upwards)]
    for line in lines:
        parts += _line(line, across, upwards)
    parts.append(_heights(upwards))
    words = "; ".join(
        f"{line.name}: " + ", ".join(f"{100 * p.y:.1f} % at {across.label(p.x)}" for p in line.points)
        for line in lines
    )
    return _drawing(identifier, title, words, TALL + 28, parts)


def _grid(axis: Axis, height: float) -> Markup:
    ends = {0.0: "start", 1.0: "end"}
    drawn = []
    for tick in axis.ticks:
        place = _x(axis, tick)
        drawn.append(_element("line", x1=place, x2=place, y1=TOP, y2=height, class_="grid"))
        anchor = ends.get(axis.share(tick), "middle")
        drawn.append(
            _element("text", axis.label(tick), x=place, y=height + 15, text_anchor=anchor, class_="faint")
        )
    return Markup("").join(drawn)


def _mark(mark: Mark, axis: Axis, middle: float) -> Markup:
    parts = []
    place, zero = axis.share(mark.value), axis.share(max(axis.low, 0.0))
    if mark.shape == "bar":
        left, width = min(place, zero), abs(place - zero)
        size = {"x": _percent(LEFT + WIDTH * left), "width": _percent(WIDTH * width)}
        parts.append(_element("rect", **size, y=middle - 5, height=10, rx=2, class_=mark.colour))
    if mark.low is not None and mark.high is not None:
        parts += _whisker(_x(axis, mark.low), _x(axis, mark.high), middle)
    if mark.shape == "dot":
        parts.append(_element("circle", cx=_x(axis, mark.value), cy=middle, r=4.5, class_=mark.colour))
    if mark.shape == "diamond":  # nested, since a transform knows no percentages
        diamond = _element("path", d="M0 -6 L6 0 L0 6 L-6 0 Z", class_=mark.colour)
        parts.append(_element("svg", diamond, x=_x(axis, mark.value), y=middle, overflow="visible"))
    return Markup("").join(parts)


def _whisker(left: str, right: str, middle: float) -> list[Markup]:
    ends = [
        (left, right, middle, middle),
        (left, left, middle - 5, middle + 5),
        (right, right, middle - 5, middle + 5),
    ]
    return [
        _element("line", x1=a, x2=b, y1=top, y2=bottom, class_=colour)
        for colour in ("halo", "whisker")  # the wider one keeps the other apart from the bar under it
        for a, b, top, bottom in ends
    ]


def _cell(names: Sequence[str], row: int, column: int, count: int, total: int) -> Markup:
    share = count / total if total else 0.0
    colour = "cell" if not count else "ours" if row == column else "wrong"
    x, y = GUTTER + SIDE * column + 0.5, 24 + SIDE * row + 0.5
    opacity = f"{0.1 + 0.55 * share:.2f}" if count else "1"
    drawn = _element("rect", x=x, y=y, width=SIDE - 1, height=SIDE - 1, fill_opacity=opacity, class_=colour)
    if not count:
        return drawn
    taken = names[column] if column < len(names) else "no answer"
    title = _element("title", f"{names[row]} → {taken}: {count} of {total}")
    small = "font-size:9px" if count > 999 else ""
    return _element("g", title + drawn + _text(f"{count}", x + SIDE / 2, y + 17, "", small))


def _frame(across: Axis, upwards: Axis) -> Markup:
    heights = (_y(upwards, tick) for tick in upwards.ticks)
    lines = (
        _element("line", x1=f"{LEFT}%", x2=f"{LEFT + WIDTH}%", y1=height, y2=height, class_="grid")
        for height in heights
    )
    return _grid(across, TOP + TALL) + Markup("").join(lines)


def _heights(upwards: Axis) -> Markup:
    """Return what stands at the ticks upwards, to be drawn last: curves may pass under it."""
    return Markup("").join(
        _element("text", upwards.label(tick), x="1.5%", y=_y(upwards, tick) + 13, class_="over")
        for tick in upwards.ticks[1:]
    )


def _line(line: Line, across: Axis, upwards: Axis) -> list[Markup]:
    def joined(pairs: Iterable[tuple[Point, float]]) -> str:
        return " ".join(f"{100 * across.share(p.x):.2f},{_y(upwards, value):.1f}" for p, value in pairs)

    parts = []
    banded = [(p, p.low, p.high) for p in line.points if p.low is not None and p.high is not None]
    inner = []
    if len(banded) > 1:
        outline = [(p, low) for p, low, _ in banded] + [(p, high) for p, _, high in reversed(banded)]
        inner.append(_element("polygon", points=joined(outline), class_=f"{line.colour} band"))
    if len(line.points) > 1:
        stroke = {"class_": f"stroke-{line.colour}", "vector_effect": "non-scaling-stroke"}
        inner.append(_element("polyline", points=joined((p, p.y) for p in line.points), **stroke))
    if inner:
        place = {"x": f"{LEFT}%", "y": 0, "width": f"{WIDTH}%", "height": TALL + TOP}
        view = {"viewBox": f"0 0 100 {TALL + TOP}", "preserveAspectRatio": "none", "overflow": "visible"}
        parts.append(_element("svg", Markup("").join(inner), **place, **view))
    alone = [p for p in line.points if len(banded) == 1] + list(line.single)
    for point in alone:
        if point.low is not None and point.high is not None:
            parts.append(_upright(_x(across, point.x), _y(upwards, point.low), _y(upwards, point.high)))
    faded = f"{line.colour} faded" if line.points else line.colour
    parts += [_dot(point, across, upwards, faded) for point in line.single]
    return parts + [_dot(point, across, upwards, line.colour) for point in line.points]


def _upright(place: str, low: float, high: float) -> Markup:
    return _element("line", x1=place, x2=place, y1=low, y2=high, class_="whisker")


def _dot(point: Point, across: Axis, upwards: Axis, colour: str) -> Markup:
    radius = 2.5 + 7 * math.sqrt(point.weight)
    return _element(
        "circle", cx=_x(across, point.x), cy=_y(upwards, point.y), r=f"{radius:.1f}", class_=colour
    )


def _x(axis: Axis, value: float) -> str:
    return _percent(LEFT + WIDTH * axis.share(value))


def _y(axis: Axis, value: float) -> float:
    return round(TOP + TALL * (1 - axis.share(value)), 1)


def _percent(value: float) -> str:
    return f"{value:.2f}%"


def _text(text: str, x: float, y: float, colour: str, style: str = "") -> Markup:
    return _element("text", text, x=x, y=y, text_anchor="middle", class_=colour, style=style)


def _in_words(mark: Mark) -> str:
    spread = (
        "" if mark.low is None or mark.high is None else f" ({100 * mark.low:.1f} to {100 * mark.high:.1f})"
    )
    return f"{100 * mark.value:.1f} %{spread}"


def _short(name: str) -> Markup:
    return escape(name if len(name) <= SHORTENED else name[: SHORTENED - 1].rstrip() + "…")


def _drawing(
    identifier: str,
    title: str,
    words: str,
    height: float,
    parts: Sequence[Markup],
    width: float | None = None,
) -> Markup:
    size = {"width": "100%" if width is None else width, "height": height}
    named = {"role": "img", "aria_labelledby": f"{identifier}-title {identifier}-words"}
    told = _element("title", title, id=f"{identifier}-title") + _element(
        "desc", words, id=f"{identifier}-words"
    )
    return _element("svg", told + Markup("").join(parts), **size, **named, class_="fixed" if width else "")


def _element(name: str, content: str = "", **attributes: Any) -> Markup:
    """Return an element; ``class_`` and underscores stand for ``class`` and hyphens."""
    written = [
        f'{key.rstrip("_") if key.endswith("_") else key.replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value != ""
    ]
    return Markup("<{}>{}</{}>").format(Markup(" ".join([name, *written])), escape(content), Markup(name))
