"""The pictures of the outlier report: gains by layer and as a histogram, layers by tensor, headroom of the stream."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tasks.engine.norms import layer, role
from tasks.outliers.targets import FLOAT8_MAX, FLOAT16_MAX

Tensors = dict[str, list[dict[str, Any]]]
Observed = dict[str, dict[str, Any]]


def draw_all(models: Tensors, observed: Observed, directory: Path) -> None:
    """Every picture that the numbers allow, into `directory`."""
    draw_norms(models, directory / "norms.png")
    draw_gains(models, directory / "gains.png")
    draw_tensors(models, directory / "tensors.png")
    if observed:
        draw_stream(observed, directory / "stream.png")


def draw_norms(models: Tensors, path: Path) -> None:
    """Largest gain of every norm over the layers, one panel a model, logarithmic."""
    figure, axes = plt.subplots(1, len(models), figsize=(1 + 6 * len(models), 5), squeeze=False, sharey=True)
    for axis, (name, tensors) in zip(axes[0], models.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for tensor in tensors:
            number = layer(tensor["tensor"])
            if "gain" in tensor and number is not None:
                lines.setdefault(role(tensor["tensor"]), []).append((number, tensor["gain"]["max"]))
        for label, points in sorted(lines.items()):
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        axis.set(title=f"{name}: largest norm gain by layer", xlabel="layer", ylabel="largest |gain|", yscale="log")
        axis.grid(alpha=0.3)
        if lines:
            axis.legend(fontsize=7)
    _save(figure, path)


def draw_gains(models: Tensors, path: Path) -> None:
    """How many gains of all norms lie where, one line a model, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(9, 4.5))
    edges = np.logspace(-8, 16, 49, base=2)
    for name, tensors in models.items():
        counts = np.sum(
            [tensor["gain"]["histogram"] for tensor in tensors if "gain" in tensor] or [np.zeros(48)], axis=0
        )
        axis.stairs(counts, edges, label=name)
    axis.set(title="Gains of all norms", xlabel="|gain|, the value that multiplies", ylabel="channels")
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def draw_stream(observed: Observed, path: Path) -> None:
    """The largest magnitude in the residual stream by layer, one line a model, against what 16 and 8 bits can hold."""
    figure, axis = plt.subplots(figsize=(9, 5))
    for name, seen in observed.items():
        peaks = [max(one["middle"]["value"], one["output"]["value"]) for one in seen["layers"]]
        layers = [one["layer"] for one in seen["layers"]]
        axis.plot([-1, *layers], [seen["embedding"]["value"], *peaks], marker="o", markersize=3, label=name)
    axis.axhline(FLOAT16_MAX, color="crimson", linestyle="--", label="float16 ends: 65504")
    axis.axhline(FLOAT8_MAX, color="darkorange", linestyle=":", label="float8 e4m3 ends: 448")
    axis.set(title="Residual stream: largest magnitude on calibration rows", yscale="log")
    axis.set(xlabel="layer (-1: embedding)", ylabel="largest |activation|")
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def draw_tensors(models: Tensors, path: Path) -> None:
    """Largest magnitude (left) and relative error of Q4_0 (right) for every matrix in every layer, one row a model."""
    figure, axes = plt.subplots(len(models), 2, figsize=(15, 1.5 + 4.5 * len(models)), squeeze=False)
    for row, (name, tensors) in zip(axes, models.items(), strict=True):
        _heat_map(row[0], f"{name}: largest magnitude", {t["tensor"]: t["max"] for t in tensors if len(t["shape"]) > 1})
        errors = {t["tensor"]: t["error"]["q4_0"] for t in tensors if "q4_0" in t.get("error", {})}
        _heat_map(row[1], f"{name}: error of Q4_0 / root mean square", errors)
    _save(figure, path)


def _heat_map(axis: Any, title: str, values: dict[str, float]) -> None:
    inside = {(layer(name), role(name)): value for name, value in values.items() if layer(name) is not None}
    layers = sorted({number for number, _ in inside if number is not None})
    roles = sorted({label for _, label in inside})
    grid = np.array([[inside.get((number, label), np.nan) for label in roles] for number in layers])
    axis.set(title=title, xlabel="matrix", ylabel="layer")
    if not grid.size:
        return
    image = axis.imshow(grid, aspect="auto", cmap="magma")
    axis.set_xticks(range(len(roles)), roles, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(layers)), layers, fontsize=7)
    axis.figure.colorbar(image, ax=axis)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})  # the same picture from the same numbers, byte for byte
    plt.close(figure)
