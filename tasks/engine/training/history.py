"""Metrics of a training run by step, with divergence detection and the loss chart."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib import pyplot
from torch import Tensor

matplotlib.use("Agg")
WINDOW = 20  # steps of a running mean
EXPLODED, IN_A_ROW = 100, 3  # times the usual gradient norm, in so many steps in a row
COLORS = {"loss": "#1f4e79", "kd_loss": "#c55a11", "ce_loss": "#548235"}


class Problem(NamedTuple):
    """A sign of divergence and the number of last steps that show it: checkpoints from within them are suspect."""

    text: str
    steps: int


class History:
    """Metrics as lists: `steps` with one value a step, `validation` with one a validation and its `step`."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}
        self.validation: dict[str, list[float]] = {}
        self.speed: dict[str, float] = {}  # of the last attempt; not in checkpoints

    def __len__(self) -> int:
        return len(self.steps.get("loss", []))

    def add(self, values: dict[str, float], vocabulary: int) -> Problem | None:
        """Records a step; returns its problem if it diverged: not finite, exploding, far worse than guessing.

        Guessing uniformly costs ln(vocabulary) a token. One step at three times that (or three times the first
        step's loss), 20 steps above both by 1 nat on average, or 3 steps whose gradients are 100 times larger than
        those before them, do not recover by themselves.
        """
        for name, value in values.items():
            self.steps.setdefault(name, []).append(value)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            return Problem(f"loss is {values['loss']:.4g} and the gradient's norm {values['grad_norm']:.4g}", 1)
        losses = self.steps.get("ce_loss", self.steps["loss"])
        start = max(math.log(vocabulary), losses[0])
        if losses[-1] > 3 * start:
            return Problem(f"cross-entropy is {losses[-1]:.4g}, guessing costs {math.log(vocabulary):.3g}", 1)
        mean = sum(losses[-WINDOW:]) / WINDOW
        if len(losses) >= WINDOW and mean > start + 1:
            text = f"cross-entropy of the last {WINDOW} steps is {mean:.4g}, it began with {losses[0]:.4g}"
            return Problem(text, WINDOW)
        return self._exploded()

    def _exploded(self) -> Problem | None:
        norms = self.steps["grad_norm"]
        earlier, last = norms[-WINDOW - IN_A_ROW : -IN_A_ROW], norms[-IN_A_ROW:]
        usual = statistics.median(earlier) if len(earlier) == WINDOW else math.inf
        if min(last) <= EXPLODED * usual or usual == 0:
            return None
        listed = ", ".join(f"{norm:.3g}" for norm in last)
        return Problem(f"the gradient's norm was {listed} in the last steps and {usual:.3g} before", IN_A_ROW)

    def add_validation(self, step: int, values: dict[str, float]) -> None:
        """Records validation losses taken after `step` steps."""
        for name, value in {"step": float(step), **values}.items():
            self.validation.setdefault(name, []).append(value)

    def mean(self, name: str, last: int) -> float:
        """Mean of a number over the last steps."""
        values = self.steps[name][-last:]
        return sum(values) / len(values)

    def tensors(self) -> dict[str, Tensor]:
        """The history as float64 tensors, for a checkpoint."""
        named = {f"steps/{name}": values for name, values in self.steps.items()}
        named |= {f"validation/{name}": values for name, values in self.validation.items()}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Replaces the history by a checkpoint's."""
        for name, values in tensors.items():
            kind, _, key = name.partition("/")
            getattr(self, kind)[key] = values.tolist()

    def plot(self, path: Path, title: str) -> None:
        """Draws training losses (thin: each step, thick: mean of 20) and validation losses (dots) as PNG."""
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for name in (name for name in COLORS if name in self.steps):
            values, color = self.steps[name], COLORS[name]
            axes.plot(range(1, len(values) + 1), values, color=color, alpha=0.25, linewidth=0.8)
            smooth = [
                sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - WINDOW + 1) : i + 1])
            ]
            axes.plot(range(1, len(values) + 1), smooth, color=color, linewidth=1.8, label=f"training {name}")
            if name in self.validation:
                axes.plot(self.validation["step"], self.validation[name], "o", color=color, label=f"validation {name}")
        axes.set(title=title, xlabel="step", ylabel="nats per label token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
