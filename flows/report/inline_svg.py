"""matplotlib charts as inline SVG elements whose colours are the page's CSS variables, so that they follow dark mode.

matplotlib is imported when the first chart is drawn, for importing a flow has to stay light.
"""

import re
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis, XAxis, YAxis
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 560, 300
"""Of a chart, in the units of its own coordinates."""
LEFT, RIGHT, BOTTOM, TOP = 56, WIDTH - 16, 42, HEIGHT - 14
"""Edges of the axes, from the lower left corner."""
COLOURS = 6
MUTED, LINE, INK = "#0000f0", "#0000f1", "#0000f2"
VARIABLES = {MUTED: "muted", LINE: "line", INK: "ink"} | {f"#0000e{i}": f"c{i}" for i in range(COLOURS)}
"""Colours that matplotlib draws with, by the variables of the page that replace them."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 12, "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK, "grid.color": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
}  # fmt: skip


class Chart:
    """A context manager that gives empty `axes` to draw on; `svg` is the element once the block has ended."""

    axes: "Axes"
    svg: str

    def __init__(self, title: str, x_title: str, y_title: str) -> None:
        self._title, self._labels = title, {"xlabel": x_title, "ylabel": y_title}

    def __enter__(self) -> "Chart":
        from matplotlib import rc_context  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        self._style = rc_context({**STYLE, "svg.hashsalt": self._title})
        self._style.__enter__()
        self._figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72)
        self._figure.subplots_adjust(LEFT / WIDTH, BOTTOM / HEIGHT, RIGHT / WIDTH, TOP / HEIGHT)
        self.axes = self._figure.subplots()
        self.axes.set(**self._labels)
        self.axes.grid(axis="y")
        self.axes.tick_params(length=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:
            self.svg = _element(self._figure, self._title)
        self._style.__exit__(kind, *error)


def colour(number: int) -> str:
    """The page's colour of a group or a series."""
    return f"#0000e{number % COLOURS}"


def logarithmic(axis: "XAxis | YAxis", low: float, high: float) -> None:
    """Makes the axis logarithmic from `low` to `high`, with at least three plain numbers as ticks.

    They are 1, 2 and 5 of each decade; decades alone where those are many, and linear where the range is narrow.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: PLC0415

    steps, decades, linear = (
        [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        for locator in (LogLocator(subs=(1, 2, 5)), LogLocator(subs=(1,)), MaxNLocator(5))
    )
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(FixedLocator(linear if len(steps) < 3 else steps if len(steps) <= 10 else decades))
    axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axis.set_minor_locator(NullLocator())


def integer_ticks(axis: "Axis") -> None:
    """Gives the axis about five ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axis.set_major_locator(MaxNLocator(5, integer=True))


def _element(figure: "Figure", title: str) -> str:
    """The figure's SVG with colours as variables, and without what the page decides: size, fonts, style sheet, ids."""
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index(">", text.index("<svg")) + 1 :]
    removed = r'<defs>.*?</defs>| font-family: [^;]*;| (?:id|clip-path)="[^"]*"'
    text = re.sub(removed, "", text, flags=re.DOTALL)
    for drawn, variable in VARIABLES.items():
        text = text.replace(drawn, f"var(--{variable})")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{text.strip()}'
