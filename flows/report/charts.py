"""The page's charts as inline SVG. Colours are the page's variables, so that they follow light and dark."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 42
COLOURS = 6


class Point(NamedTuple):
    """A labelled point with an interval; `group` picks its colour."""

    label: str
    x: float
    y: float
    low: float
    high: float
    group: int


class Axis(NamedTuple):
    """Values from `first` to `last` over pixels from `start` to `end`; ticks at `ticks`."""

    first: float
    last: float
    start: float
    end: float
    ticks: list[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        first, last, value = (math.log10(v) if self.log else v for v in (self.first, self.last, value))
        return self.start + (self.end - self.start) * (value - first) / ((last - first) or 1)


def size_against_quality(points: Sequence[Point], quality: str) -> str:
    """Megabytes (logarithmic) against a rate in percent with its interval; labels are moved apart."""
    x = log_axis([point.x for point in points], LEFT, WIDTH - RIGHT - 70)
    y = linear_axis([100 * value for point in points for value in (point.low, point.high)], HEIGHT - BOTTOM, TOP)
    marks, placed = [], list[tuple[float, float]]()
    for point in sorted(points, key=lambda point: -point.y):
        at, top, bottom, high = x(point.x), y(100 * point.y), y(100 * point.low), y(100 * point.high)
        beside = _free(at, top + 4, placed)
        placed.append((at, beside))
        colour = f"var(--c{point.group % COLOURS})"
        ends, style = (
            f'x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{high:.1f}"',
            'stroke-width="1.5" opacity=".6"',
        )
        marks.append(f'<line {ends} stroke="{colour}" {style}/>')
        marks.append(f'<circle cx="{at:.1f}" cy="{top:.1f}" r="4.5" fill="{colour}"/>')
        marks.append(f'<text x="{at + 9:.1f}" y="{beside:.1f}">{escape(point.label)}</text>')
    return _svg(x, y, "MB (logarithmic)", f"{quality}, %", marks, f"{quality} against size")


def _free(at: float, wanted: float, placed: Sequence[tuple[float, float]]) -> float:
    """The height nearest to `wanted`, inside the chart, at which a label beside `at` covers no other."""
    heights = [float(height) for height in range(TOP + 8, HEIGHT - BOTTOM - 3)]
    taken = [other for place, other in placed if abs(at - place) < 90]
    free = [height for height in heights if all(abs(height - other) >= 13 for other in taken)]
    return min(free or heights, key=lambda height: abs(height - wanted))


def losses(name: str, series: dict[str, Sequence[tuple[float, float]]]) -> str:
    """Losses by step on a logarithmic scale; validation losses dashed."""
    positive = {key: [(step, value) for step, value in points if value > 0] for key, points in series.items()}
    steps = [step for points in positive.values() for step, _ in points]
    x = linear_axis([0, *steps], LEFT, WIDTH - RIGHT)
    y = log_axis([value for points in positive.values() for _, value in points], HEIGHT - BOTTOM, TOP)
    marks = []
    for place, (key, points) in enumerate(positive.items()):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in _thinned(points))
        dash = ' stroke-dasharray="5 4"' if key.startswith("validation") else ""
        marks.append(
            f'<polyline points="{path}" fill="none" stroke="var(--c{place % COLOURS})" stroke-width="1.6"{dash}/>'
        )
    legend = "".join(
        f'<span><i style="background:var(--c{place % COLOURS})"></i>{escape(key.replace("_", " "))}</span>'
        for place, key in enumerate(positive)
    )
    chart = _svg(x, y, "step", "loss (logarithmic)", marks, f"Losses of {name}")
    return f'{chart}<div class="legend">{legend}</div>'


def histogram(values: Sequence[float], last: float, unit: str, title: str) -> str:
    """How often values fall into 24 equal bins from 0 to `last`."""
    bins = [0] * 24
    for value in values:
        bins[min(23, int(24 * value / last))] += 1
    x = linear_axis([0, last], LEFT, WIDTH - RIGHT)
    y = linear_axis([0, max(bins)], HEIGHT - BOTTOM, TOP)
    y = y._replace(ticks=[tick for tick in y.ticks if tick == int(tick)])
    marks = []
    for place, count in enumerate(bins):
        left, right, top = x(last * place / 24), x(last * (place + 1) / 24), y(count)
        if count:
            marks.append(
                f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}" '
                f'height="{y(0) - top:.1f}" fill="var(--c0)"/>'
            )
    return _svg(x, y, unit, "rows", marks, title)


def linear_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """A linear axis over the values, with about five round ticks."""
    first, last = min(values), max(values)
    span = (last - first) or abs(last) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 6)
    low, high = math.floor(first / step) * step, math.ceil(last / step) * step
    high = high if high > low else low + step
    ticks = [round(low + i * step, 10) for i in range(round((high - low) / step) + 1)]
    return Axis(low, high, start, end, ticks)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """A logarithmic axis over the values (all above 0), with ticks at 1, 2 and 5 of each decade, or at decades.

    Where that gives less than three, because the values lie close together, ticks are those of a linear axis.
    """
    first, last = min(values) / 1.1, max(values) * 1.1
    decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    if len([tick for tick in ticks if first <= tick <= last]) > 7:
        ticks = [10.0**decade for decade in decades]
    inside = [tick for tick in ticks if first <= tick <= last]
    if len(inside) < 3:
        inside = [tick for tick in linear_axis([first, last], start, end).ticks if first <= tick <= last]
    return Axis(first, last, start, end, inside, log=True)


def _thinned(points: Sequence[tuple[float, float]], most: int = 300) -> Sequence[tuple[float, float]]:
    return points[:: max(1, len(points) // most)]


def _svg(x: Axis, y: Axis, x_title: str, y_title: str, marks: Sequence[str], title: str) -> str:
    bottom, center = HEIGHT - BOTTOM, (LEFT + WIDTH) / 2
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y.ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks:
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        )
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="tick" x="{center}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="tick" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
        f"{escape(y_title)}</text>"
    )
    return "".join([*parts, *marks, "</svg>"])
