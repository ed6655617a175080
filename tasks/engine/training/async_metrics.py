"""Step metrics that leave the device without a wait: their copy starts as a step ends, they are read a step later.

sums = MetricSums()
sums.add({"loss": tensor}, normalizer)                              # each micro-batch
pending = sums.send(counters, norm, step, rows, labels, rate)       # starts the copy and returns at once
losses, totals, norm = pending.read()                               # a step later
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.engine.distributed import ranks


class PendingMetrics(NamedTuple):
    """Metrics of a step under way to the host; `arrived` is the event that ends their copy, None on the CPU."""

    step: int
    names: list[str]
    values: Tensor
    arrived: torch.cuda.Event | None
    rows: list[int]
    labels: int
    learning_rate: float

    def read(self) -> tuple[dict[str, float], list[float], float]:
        """Mean losses by name, each counter summed over all processes, and the gradient norm."""
        if self.arrived:
            self.arrived.synchronize()
        *values, norm = self.values.tolist()
        return dict(zip(self.names, values, strict=False)), values[len(self.names) :], norm


class MetricSums:
    """Losses of a step's micro-batches, added up on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor], normalizer: Tensor | int) -> None:
        """Adds a micro-batch's sums, divided by the normalizer of the whole step."""
        for name, value in sums.items():
            mean = value.detach() / normalizer
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean

    def send(
        self,
        counters: Sequence[float],
        norm: Tensor | float,
        step: int,
        rows: list[int],
        labels: int,
        learning_rate: float,
    ) -> PendingMetrics:
        """Starts the copy of losses, `counters` and gradient norm to the host, and begins a new step.

        Losses and counters are one process's and are summed over all processes first.
        """
        sums = torch.stack([*self._sums.values()])
        on_device = sums.device.type == "cuda"
        local = torch.tensor(counters, dtype=sums.dtype, pin_memory=on_device).to(sums.device, non_blocking=True)
        totals = ranks.sum_over_ranks(torch.cat([sums, local]))
        values = torch.cat([totals, torch.as_tensor(norm, device=sums.device).reshape(1)])
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_device)
        host.copy_(values, non_blocking=True)
        names, self._sums = list(self._sums), {}
        arrived = torch.cuda.Event() if on_device else None
        if arrived:
            arrived.record()
        return PendingMetrics(step, names, host, arrived, rows, labels, learning_rate)
