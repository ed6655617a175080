"""Description of a diverged step: its rows, the worst of them, and the layers where it shows.

Computed once, before the run goes back or gives up, so it may take its time: the loss of every row by itself, the norm
of every gradient, and one forward that records each layer's output.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.errors import Diverged
from tasks.engine.distributed.fsdp import local_tensor
from tasks.engine.models.lm_head import unwrap
from tasks.engine.training.async_metrics import PendingMetrics

WORST_COUNT, MAX_ROWS_LISTED, MAX_ROW_LOSSES = 3, 32, 64
MeanLoss = Callable[[Sequence[int]], float]


class DivergedStep(Diverged):
    """A diverged step; checkpoints of more than `last_good_step` finished steps are not to be trusted."""

    def __init__(self, message: str, last_good_step: int) -> None:
        super().__init__(message)
        self.last_good_step = last_good_step


def describe_divergence(
    problem: str, step: PendingMetrics, model: PreTrainedModel, mean_loss: MeanLoss, is_sharded: bool
) -> str:
    """The step's number, problem, learning rate and rows, and what is worst in it.

    `mean_loss` gives the loss of some rows under the present weights; of a sharded model the gradients alone are named.
    """
    rows = ", ".join(map(str, step.rows[:MAX_ROWS_LISTED])) + (" ..." if len(step.rows) > MAX_ROWS_LISTED else "")
    details = largest_gradients(model) if is_sharded else worst_rows_and_layers(model, step.rows, mean_loss)
    return f"step {step.step}: {problem} at learning rate {step.learning_rate:g}, training rows {rows}; {details}"


def worst_rows_and_layers(model: PreTrainedModel, rows: Sequence[int], mean_loss: MeanLoss) -> str:
    """A sentence on the rows with the largest loss, the largest gradients and the largest layer output."""
    gradients = largest_gradients(model)
    was_training = model.training
    model.train(False)
    with torch.no_grad():
        losses = [(mean_loss([row]), row) for row in rows[:MAX_ROW_LOSSES]]
        by_loss = sorted(losses, key=lambda pair: (math.isfinite(pair[0]), -pair[0]))[:WORST_COUNT]
        with _OutputMaxima(model) as maxima:
            mean_loss([by_loss[0][1]])
    model.train(was_training)
    worst = ", ".join(f"{row} (loss {loss:.3g})" for loss, row in by_loss)
    return f"worst rows {worst}; {gradients}; {maxima.summary()}"


def largest_gradients(model: nn.Module) -> str:
    """The layers whose gradients are not finite, or else the largest, with their norms."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layer = layer_of(name)
            squares[layer] = squares.get(layer, 0.0) + float(local_tensor(parameter.grad).float().square().sum())
    ordered = sorted(squares.items(), key=lambda item: (math.isfinite(item[1]), -item[1]))[:WORST_COUNT]
    return "largest gradients in " + ", ".join(f"{name} ({math.sqrt(value):.3g})" for name, value in ordered)


def layer_of(name: str) -> str:
    """`layers.3` for a parameter of a decoder layer, else its module's own name."""
    match = re.search(r"\blayers\.\d+", name)
    return match.group() if match else name.removesuffix(".weight").removeprefix("base_model.model.")


class _OutputMaxima:
    """Largest absolute output of each decoder layer during the forwards inside the block."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._maxima = model, dict[str, float]()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "_OutputMaxima":
        for name, module in unwrap(self._model).named_modules():
            if re.fullmatch(r".*\blayers\.\d+", name):
                self._handles.append(module.register_forward_hook(self._recorder(layer_of(name))))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, layer: str) -> Callable[[nn.Module, object, object], None]:
        def record(module: nn.Module, args: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor):
                self._maxima[layer] = float(hidden.abs().max())

        return record

    def summary(self) -> str:
        """The first layer whose output is not finite, or the largest output."""
        for layer, value in self._maxima.items():
            if not math.isfinite(value):
                return f"first output that is not finite: {layer}"
        if not self._maxima:
            return "no layer's output was recorded"
        layer, value = max(self._maxima.items(), key=lambda item: item[1])
        return f"largest output {value:.3g}, of {layer}"
