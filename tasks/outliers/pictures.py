"""Draws the audit's pictures: gains by layer and as a histogram, layers by matrix, the stream's headroom.

Margins are set by hand and pyplot is not used: automatic layout costs seconds a report.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from tasks.core.plain_text import literal_text
from tasks.engine.models.tensor_names import layer_index, name_in_layer
from tasks.outliers.peaks import FLOAT8_MAX, FLOAT16_MAX

Tensors = dict[str, list[dict[str, Any]]]
Activations = dict[str, dict[str, Any]]


def draw_all(models: Tensors, activations: Activations, directory: Path) -> None:
    """Every picture that the numbers allow, into `directory`."""
    with literal_text():
        draw_norms(models, directory / "norms.png")
        draw_gains(models, directory / "gains.png")
        draw_tensors(models, directory / "tensors.png")
        if activations:
            draw_stream(activations, directory / "stream.png")


def draw_norms(models: Tensors, path: Path) -> None:
    """Largest gain of every norm over the layers, one panel a model, logarithmic."""
    figure = Figure(figsize=(1 + 6 * len(models), 5))
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)
    for axis, (name, tensors) in zip(axes[0], models.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for tensor in tensors:
            number = layer_index(tensor["tensor"])
            if "gain" in tensor and number is not None:
                lines.setdefault(name_in_layer(tensor["tensor"]), []).append((number, tensor["gain"]["max"]))
        for label, points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        axis.set(title=f"{name}: largest norm gain by layer", xlabel="layer")
        _integer_ticks(axis.xaxis)
        _logarithmic(axis.yaxis)
        axis.grid(alpha=0.3)
        if lines:
            axis.legend(fontsize=7, loc="upper left")
    axes[0][0].set_ylabel("largest |gain|")
    figure.subplots_adjust(left=0.7 / (1 + 6 * len(models)), right=0.98, bottom=0.12, top=0.92, wspace=0.06)
    _save(figure, path)


def draw_gains(models: Tensors, path: Path) -> None:
    """Histogram of the gains of all norms, one line a model, both axes logarithmic."""
    figure = Figure(figsize=(9, 4.5))
    axis = figure.subplots()
    edges = np.logspace(-8, 16, 49, base=2)
    for name, tensors in models.items():
        counts = np.sum(
            [tensor["gain"]["histogram"] for tensor in tensors if "gain" in tensor] or [np.zeros(48)], axis=0
        )
        axis.stairs(counts, edges, label=name)
    axis.set(title="Gains of all norms", xlabel="|gain|, the value that multiplies", ylabel="channels")
    _logarithmic(axis.xaxis)
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.12, top=0.92)
    _save(figure, path)


def draw_stream(activations: Activations, path: Path) -> None:
    """The largest magnitude in the residual stream by layer, one line a model, against what 16 and 8 bits can hold."""
    figure = Figure(figsize=(9, 5))
    axis = figure.subplots()
    for name, summary in activations.items():
        peaks = [max(layer["middle"]["value"], layer["output"]["value"]) for layer in summary["layers"]]
        layers = [layer["layer"] for layer in summary["layers"]]
        axis.plot([-1, *layers], [summary["embedding"]["value"], *peaks], marker="o", markersize=3, label=name)
    axis.axhline(FLOAT16_MAX, color="crimson", linestyle="--", label="float16 ends: 65504")
    axis.axhline(FLOAT8_MAX, color="darkorange", linestyle=":", label="float8 e4m3 ends: 448")
    axis.set(title="Residual stream: largest magnitude on calibration rows")
    axis.set(xlabel="layer (-1: embedding)", ylabel="largest |activation|")
    _integer_ticks(axis.xaxis)
    _logarithmic(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.legend(loc="best")
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.11, top=0.93)
    _save(figure, path)


def draw_tensors(models: Tensors, path: Path) -> None:
    """Largest magnitude (left) and relative error of Q4_0 (right) for every matrix in every layer, one row a model."""
    height = 1.5 + 4.5 * len(models)
    figure = Figure(figsize=(15, height))
    axes = figure.subplots(len(models), 2, squeeze=False)
    for row, (name, tensors) in zip(axes, models.items(), strict=True):
        _heat_map(row[0], f"{name}: largest magnitude", {t["tensor"]: t["max"] for t in tensors if len(t["shape"]) > 1})
        errors = {t["tensor"]: t["error"]["q4_0"] for t in tensors if "q4_0" in t.get("error", {})}
        _heat_map(row[1], f"{name}: error of Q4_0 / root mean square", errors)
    figure.subplots_adjust(
        left=0.05, right=0.99, bottom=1.1 / height, top=1 - 0.5 / height, wspace=0.08, hspace=1.6 / 4.5
    )
    _save(figure, path)


def _heat_map(axis: Any, title: str, values: dict[str, float]) -> None:
    inside = {
        (layer_index(name), name_in_layer(name)): value
        for name, value in values.items()
        if layer_index(name) is not None
    }
    layers = sorted({number for number, _ in inside if number is not None})
    roles = sorted({label for _, label in inside})
    grid = np.array([[inside.get((number, label), np.nan) for label in roles] for number in layers])
    axis.set(title=title, xlabel="matrix", ylabel="layer")
    if not grid.size:
        return
    image = axis.imshow(grid, aspect="auto", cmap="magma", extent=(-0.5, len(roles) - 0.5, layers[-1] + 0.5, -0.5))
    axis.set_xticks(range(len(roles)), roles, rotation=30, ha="right", fontsize=8)
    _integer_ticks(axis.yaxis)
    axis.figure.colorbar(image, ax=axis, pad=0.02)


def _integer_ticks(axis: Any) -> None:
    """Ticks at whole layer numbers."""
    axis.set_major_locator(MaxNLocator(12, integer=True))


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis without minor ticks, whose labels are most of the work of drawing it."""
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log")
    axis.set_major_locator(LogLocator(numticks=12))
    axis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100, metadata={"Software": None})  # the same picture from the same numbers, byte for byte
