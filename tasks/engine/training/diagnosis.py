"""What a step that broke is called: which rows it held, which of them are worst, and in which layers it shows.

Runs once, when the run is about to go back or give up, so it may take its time: every row's loss by itself, one
forward with a look at each layer's output, every gradient's norm.
"""

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.errors import Diverged
from tasks.engine.distributed.fsdp import own
from tasks.engine.models.lm_head import unwrap

NAMED, ROWS = 3, 64
LossOfRows = Callable[[Sequence[int]], float]


class Broke(Diverged):
    """A step that broke; checkpoints from after `since` finished steps are not to be trusted."""

    def __init__(self, message: str, since: int) -> None:
        super().__init__(message)
        self.since = since


def worst(model: PreTrainedModel, rows: Sequence[int], loss_of: LossOfRows) -> str:
    """A sentence on the worst rows and layers; `loss_of` gives the loss of some rows under the present weights."""
    gradients = worst_gradients(model)
    training = model.training
    model.train(False)
    with torch.no_grad():
        losses = [(loss_of([row]), row) for row in rows[:ROWS]]
        by_loss = sorted(losses, key=lambda pair: (math.isfinite(pair[0]), -pair[0]))[:NAMED]
        with _Watch(model) as outputs:
            loss_of([by_loss[0][1]])
    model.train(training)
    named = ", ".join(f"{row} (loss {loss:.3g})" for loss, row in by_loss)
    return f"worst rows {named}; {gradients}; {outputs.say()}"


def worst_gradients(model: nn.Module) -> str:
    """The layers whose gradients are not finite, or else the largest, with their norms."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            place = layer_of(name)
            squares[place] = squares.get(place, 0.0) + float(own(parameter.grad).float().square().sum())
    ordered = sorted(squares.items(), key=lambda item: (math.isfinite(item[1]), -item[1]))[:NAMED]
    return "largest gradients in " + ", ".join(f"{name} ({math.sqrt(value):.3g})" for name, value in ordered)


def layer_of(name: str) -> str:
    """`layers.3` for what lies in a decoder layer, else the module's own name."""
    found = re.search(r"\blayers\.\d+", name)
    return found.group() if found else name.removesuffix(".weight").removeprefix("base_model.model.")


class _Watch:
    """Largest value that leaves each decoder layer during a forward."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._largest = model, dict[str, float]()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "_Watch":
        for name, module in unwrap(self._model).named_modules():
            if re.fullmatch(r".*\blayers\.\d+", name):
                self._handles.append(module.register_forward_hook(self._look(layer_of(name))))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, args: object, output: object) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor):
                self._largest[name] = float(hidden.abs().max())

        return look

    def say(self) -> str:
        """The first layer that put out no finite number, or the largest output."""
        for name, value in self._largest.items():
            if not math.isfinite(value):
                return f"first output that is not finite: {name}"
        if not self._largest:
            return "no layer's output was seen"
        name, value = max(self._largest.items(), key=lambda item: item[1])
        return f"largest output {value:.3g}, of {name}"
