"""The two pictures of the outlier report: gains of the norms by layer, and layers by tensor as a heat map."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tasks.outliers.norms import layer, role

Tensors = dict[str, list[dict[str, Any]]]


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


def draw_tensors(models: Tensors, path: Path) -> None:
    """Largest magnitude (left) and relative error of Q4_0 (right) for every matrix in every layer, one row a model."""
    figure, axes = plt.subplots(len(models), 2, figsize=(15, 1.5 + 4.5 * len(models)), squeeze=False)
    for row, (name, tensors) in zip(axes, models.items(), strict=True):
        _heat_map(row[0], f"{name}: largest magnitude", {t["tensor"]: t["max"] for t in tensors if len(t["shape"]) > 1})
        errors = {t["tensor"]: t["error"]["q4_0"] for t in tensors if "error" in t}
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
