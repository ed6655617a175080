"""A step's numbers on their way from the device: sent when the step ends, read while the next one runs.

sums = Sums()
sums.add({"loss": tensor}, labels)                            # each micro-batch
coming = sums.send(own, norm, step, rows, labels, rate)       # starts the copy, waits for nothing
losses, together, norm = coming.read()                        # a step later
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.engine.distributed import ranks


class Coming(NamedTuple):
    """What was sent, and what it belongs to; `sent` tells when it is there."""

    step: int
    names: list[str]
    values: Tensor
    sent: torch.cuda.Event | None
    rows: list[int]
    labels: int
    rate: float

    def read(self) -> tuple[dict[str, float], list[float], float]:
        """The step's mean losses by name, the sums over all processes of what each of them gave, the gradient norm."""
        if self.sent:
            self.sent.synchronize()
        *values, norm = self.values.tolist()
        return dict(zip(self.names, values, strict=False)), values[len(self.names) :], norm


class Sums:
    """The losses of a step's micro-batches, added up on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor], labels: Tensor | int) -> None:
        """A micro-batch's sums, divided by the labels of the whole step."""
        for name, value in sums.items():
            mean = value.detach() / labels
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean

    def send(
        self, own: Sequence[float], norm: Tensor | float, step: int, rows: list[int], labels: int, rate: float
    ) -> Coming:
        """Starts the copy of the step's losses, of `own` and of the gradient norm, and begins a new step.

        Losses and `own`, one process's part, are summed over all processes first.
        """
        sums = torch.stack([*self._sums.values()])
        on_device = sums.device.type == "cuda"
        mine = torch.tensor(own, dtype=sums.dtype, pin_memory=on_device).to(sums.device, non_blocking=True)
        together = torch.cat([sums, mine])
        if ranks.count() > 1:
            together = ranks.total(together)
        values = torch.cat([together, torch.as_tensor(norm, device=sums.device).reshape(1)])
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_device)
        host.copy_(values, non_blocking=True)
        names, self._sums = list(self._sums), {}
        sent = torch.cuda.Event() if on_device else None
        if sent:
            sent.record()
        return Coming(step, names, host, sent, rows, labels, rate)
