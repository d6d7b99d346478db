"""Small inline SVG charts: drawn by hand so that one picture follows the page's light and dark colours, stays sharp
and readable on a phone, and has the same bytes for the same numbers.

Colours, widths and fonts are the page's (classes `grid`, `axis`, `c0` ... `c7`); nothing here is interactive.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from pipeline.report import units

WIDTH, HEIGHT = 400, 264  # user units; about the pixels of a phone, so that text keeps its size there
LEFT, TOP, BOTTOM = 46, 12, 40
LABEL_HEIGHT = 14
LABEL_LETTERS = 12
LETTER_WIDTH = 7  # of a bold label, on the wide side: the page chooses the font
COLOURS = 8
DOTS = 40  # a line with more points is drawn without them

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Series:
    """One line: points in x order; `emphasis` draws it thick, with a dot at every point unless they are many."""

    label: str
    points: Sequence[Point]
    colour: int
    emphasis: bool = False


@dataclass(frozen=True)
class Dot:
    """One labelled point."""

    label: str
    x: float
    y: float
    colour: int


@dataclass(frozen=True)
class Axis:
    """A span of values on [0, 1]; `log` needs positive values."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, at_most: int = 6) -> list[float]:
        """Round values inside the span: 1-2-5 steps, or 1-2-5 times powers of ten where a log axis has room."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [v for p in powers for d in digits if self.low <= (v := d * 10.0**p) <= self.high]
                if len(found) <= at_most:
                    break
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / at_most)]
        rough = (self.high - self.low) / (at_most - 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(d * power for d in (1, 2, 5, 10) if d * power >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def span(values: Sequence[float], *, padding: float = 0.06, log: bool = False) -> Axis:
    """An axis that holds all values with some air around them, also when there is only one."""
    low, high = min(values), max(values)
    if log:
        air = max((high / low) ** padding, 1.25)
        return Axis(low / air, high * air, log=True)
    air = (high - low) * padding or abs(high) * 0.1 or 1.0
    return Axis(low - air, high + air)


@dataclass(frozen=True)
class _Area:
    """Where values lie in the picture; the edge on the right leaves room for labels."""

    x_axis: Axis
    y_axis: Axis
    right: float
    floor: float = HEIGHT - BOTTOM

    def __call__(self, x: float, y: float) -> Point:
        return LEFT + self.x_axis(x) * (self.right - LEFT), self.floor - self.y_axis(y) * (self.floor - TOP)

    def frame(self, x_label: str, y_label: str, x_format: Callable[[float], str]) -> Iterator[str]:
        for value in self.y_axis.ticks():
            _, y = self(self.x_axis.low, value)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{self.right}"/>'
            yield _text(LEFT - 7, y, _tick(value), "tick end")
        for value in self.x_axis.ticks(5):
            x, _ = self(value, self.y_axis.low)
            yield _text(x, self.floor + 14, x_format(value), "tick middle")
        yield f'<path class="axis" d="M{LEFT} {self.floor}H{self.right}"/>'
        yield _text((LEFT + self.right) / 2, HEIGHT - 8, x_label, "name middle")
        middle = f"translate(9 {(TOP + self.floor) / 2:.1f}) rotate(-90)"
        yield f'<text class="name middle" transform="{middle}">{escape(y_label)}</text>'


def line_chart(
    series: Sequence[Series], *, name: str, title: str, description: str, x_label: str, y_label: str
) -> Markup:
    """Lines over a common x; each is labelled at its end, so that colour alone never carries the meaning."""
    points = [point for line in series for point in line.points]
    area = _Area(Axis(0, max(1.0, max(x for x, _ in points))), span([y for _, y in points]), right=WIDTH - 92)
    parts = list(area.frame(x_label, y_label, _tick))
    for line in series:
        places = [area(x, y) for x, y in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        kind = "line strong" if line.emphasis else "line"
        parts.append(f'<path class="{kind} c{line.colour % COLOURS}" d="{path}"/>')
        if line.emphasis and len(places) <= DOTS:
            parts += [_dot(x, y, line.colour, 2.6) for x, y in places]
    ends = [area(*line.points[-1]) for line in series]
    for line, (x, _), y in zip(series, ends, _spread([y for _, y in ends]), strict=True):
        parts.append(_text(x + 8, y, _short(line.label), f"label c{line.colour % COLOURS}"))
    return _svg(parts, name, title, description)


def point_chart(
    points: Sequence[Dot],
    *,
    name: str,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    x_format: Callable[[float], str],
) -> Markup:
    """Labelled points, x on a log axis, and y too where it spans more than a factor of 20."""
    ys = [point.y for point in points]
    x_axis = span([point.x for point in points], padding=0.12, log=True)
    y_axis = span(ys, padding=0.15, log=min(ys) > 0 and max(ys) / min(ys) > 20)
    area = _Area(x_axis, y_axis, right=WIDTH - 22)
    parts = list(area.frame(x_label, y_label, x_format))
    places = [area(point.x, point.y) for point in points]
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        label = _short(point.label)
        box, anchor = _free_box(x, y, LETTER_WIDTH * len(label), taken)
        taken.append(box)
        label_x, label_y = box[2] if anchor else box[0], (box[1] + box[3]) / 2
        if abs(label_y - y) > LABEL_HEIGHT / 2:
            parts.append(f'<path class="axis" d="M{x:.1f} {y:.1f}L{label_x:.1f} {label_y:.1f}"/>')
        parts.append(_dot(x, y, point.colour, 5))
        parts.append(_text(label_x, label_y, label, f"label{anchor} c{point.colour % COLOURS}"))
    return _svg(parts, name, title, description)


def _free_box(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[Box, str]:
    """The place nearest to a dot, beside it, where a label covers no dot and no other label; and its anchor class."""
    half = LABEL_HEIGHT / 2
    shifts = sorted((n * half for n in range(-40, 41)), key=abs)
    boxes = [
        ((left, y + shift - half, left + width, y + shift + half), anchor)
        for shift in shifts
        for left, anchor in ((x + 10, ""), (x - 10 - width, " end"))
        if left > LEFT and left + width < WIDTH and half < y + shift < HEIGHT - BOTTOM
    ]
    free = (
        (box, anchor)
        for box, anchor in boxes
        if all(box[0] >= t[2] or box[2] <= t[0] or box[1] >= t[3] or box[3] <= t[1] for t in taken)
    )
    return next(free, boxes[0])


def _spread(heights: Sequence[float]) -> list[float]:
    """Label positions as near to `heights` as they can be without covering one another."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda i: (placed[i], i))
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + LABEL_HEIGHT)
    floor: float = HEIGHT - BOTTOM
    for i in reversed(order):  # what was pushed out of the picture pushes the others back up
        placed[i] = min(placed[i], floor)
        floor = placed[i] - LABEL_HEIGHT
    return placed


def _svg(parts: Sequence[str], name: str, title: str, description: str) -> Markup:
    head = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
    )
    return Markup(head + "".join(parts) + "</svg>")


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" dy="0.35em">{escape(text)}</text>'


def _dot(x: float, y: float, colour: int, radius: float) -> str:
    return f'<circle class="dot c{colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'


def _short(label: str) -> str:
    return label if len(label) <= LABEL_LETTERS else label[: LABEL_LETTERS - 1] + "…"


def _tick(value: float) -> str:
    return units.si(value) if abs(value) >= 10_000 else f"{round(value, 9):g}"
