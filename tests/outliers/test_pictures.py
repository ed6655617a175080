"""The audit's pictures count layers in whole numbers."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tasks.outliers import pictures

NORM = "model.layers.{}.input_layernorm.weight"
LAYERS = [{"layer": i, "middle": {"value": 9.0}, "output": {"value": 99.0}} for i in range(2)]


def test_layers_are_whole_numbers_on_their_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    norms = [{"tensor": NORM.format(i), "gain": {"max": 2.0 + i}} for i in range(2)]
    pictures.draw_norms({"model": norms}, Path())
    pictures.draw_stream({"model": {"embedding": {"value": 1.0}, "layers": LAYERS}}, Path())
    for figure in figures:
        axis = figure.axes[0]
        ticks = axis.xaxis.get_major_locator().tick_values(*axis.get_xlim())
        assert len(ticks) > 1 and all(float(tick).is_integer() for tick in ticks)
