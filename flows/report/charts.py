"""The page's charts: size against quality, losses, latencies."""

from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from flows.report.inline_svg import BOTTOM, COLOURS, LEFT, RIGHT, TOP, Chart, colour, integer_ticks, logarithmic

LABEL_HEIGHT, LABEL_WIDTH = 13, 80


class Point(NamedTuple):
    """A labelled point with an interval; `group` picks its colour."""

    label: str
    x: float
    y: float
    low: float
    high: float
    group: int


def size_against_quality(points: Sequence[Point], quality: str) -> str:
    """Megabytes (logarithmic) against a rate in percent with its interval; labels are moved apart."""
    points = sorted(points, key=lambda point: -point.y)
    with Chart(f"{quality} against size", "MB (logarithmic)", f"{quality}, %") as chart:
        for point in points:
            chart.axes.vlines(point.x, 100 * point.low, 100 * point.high, colour(point.group), lw=1.5, alpha=0.6)
            dot: dict[str, Any] = {"linewidth": 9, "solid_capstyle": "round"}  # a marker would be a reference by id
            chart.axes.plot([point.x] * 2, [100 * point.y] * 2, color=colour(point.group), **dot)
        low, high = min(point.x for point in points) / 1.1, max(point.x for point in points) * 1.1
        label_room = LABEL_WIDTH / (RIGHT - LEFT - LABEL_WIDTH)
        logarithmic(chart.axes.xaxis, low, high * (high / low) ** label_room)
        chart.axes.set_ylim(chart.axes.get_ylim())  # labels do not change it
        pixels = chart.axes.transData.transform([(point.x, 100 * point.y) for point in points]).tolist()
        for point, pixel, height in zip(points, pixels, _label_heights(pixels), strict=True):
            offset = (9, height - pixel[1])
            chart.axes.annotate(point.label, (point.x, 100 * point.y), offset, textcoords="offset points", va="center")
    return chart.svg


def losses(name: str, series: dict[str, Sequence[tuple[float, float]]]) -> str:
    """Losses by step on a logarithmic scale, those above 0; validation losses dashed."""
    positive = {key: [(step, value) for step, value in points if value > 0] for key, points in series.items()}
    positive = {key: points for key, points in positive.items() if points}
    if not positive:
        return ""
    with Chart(f"Losses of {name}", "step", "loss (logarithmic)") as chart:
        for number, (key, points) in enumerate(positive.items()):
            steps, values = zip(*_thinned(points), strict=True)
            style = "--" if key.startswith("validation") else "-"
            chart.axes.plot(steps, values, style, color=colour(number), linewidth=1.6)
        every_value = [value for points in positive.values() for _, value in points]
        logarithmic(chart.axes.yaxis, min(every_value) / 1.1, max(every_value) * 1.1)
        chart.axes.set_xlim(left=0)
        integer_ticks(chart.axes.xaxis)
    legend = "".join(
        f'<span><i style="background:var(--c{number % COLOURS})"></i>{escape(key.replace("_", " "))}</span>'
        for number, key in enumerate(positive)
    )
    return f'{chart.svg}<div class="legend">{legend}</div>'


def histogram(values: Sequence[float], last: float, unit: str, title: str) -> str:
    """How often values fall into 24 equal bins from 0 to `last`."""
    with Chart(title, unit, "rows") as chart:
        chart.axes.hist(values, bins=24, range=(0, last), rwidth=0.9, color=colour(0))
        chart.axes.set_xlim(0, last)
        integer_ticks(chart.axes.yaxis)
    return chart.svg


def _label_heights(points: Sequence[tuple[float, float]]) -> list[float]:
    """Heights of the points' labels, in pixels from below: near the point, inside the chart, covering no other."""
    inside = range(BOTTOM + 8, TOP - 7)
    heights: list[float] = []
    for x, y in points:
        neighbours = [height for height, (left, _) in zip(heights, points, strict=False) if abs(x - left) < LABEL_WIDTH]
        free = [h for h in inside if all(abs(h - neighbour) >= LABEL_HEIGHT for neighbour in neighbours)]
        heights.append(min(free or inside, key=lambda height: abs(height - round(y))))
    return heights


def _thinned(points: Sequence[tuple[float, float]], limit: int = 300) -> Sequence[tuple[float, float]]:
    return points[:: max(1, len(points) // limit)]
