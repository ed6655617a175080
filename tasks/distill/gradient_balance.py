"""Weights of divergence and cross-entropy that keep the configured ratio between their gradients, not their values."""

import torch

from tasks.engine.losses.loss_mix import LossMix
from tasks.engine.training.history import WINDOW, History

LIMIT = 1000.0  # a part that has nothing left to say is not blown up beyond this


class Balance:
    """`parts` (2,) are the weights to use, a tensor that `follow` changes in place."""

    def __init__(self, mix: LossMix, device: torch.device) -> None:
        self.mix, self.parts = mix, mix.weights(device)

    def follow(self, history: History, step: int) -> None:
        """Sets the weights for the step after `step` finished ones, from the norms of the `WINDOW` before the last.

        The last step's norms may still be on the device. A function of the history alone: a resumed run goes on with
        the same weights.
        """
        known = slice(max(0, step - 1 - WINDOW), max(0, step - 1))
        kd, ce = (history.steps.get(name, [])[known] for name in ("kd_grad_norm", "ce_grad_norm"))
        for part, weight in zip(self.parts, self._weights(sum(kd), sum(ce)), strict=True):
            part.fill_(weight)

    def _weights(self, kd: float, ce: float) -> tuple[float, float]:
        kd_weight, ce_weight = self.mix.kd_weight, self.mix.ce_weight
        if kd > 0 and ce > 0 and kd_weight and ce_weight:
            ratio = min(max(ce / kd, 1 / LIMIT), LIMIT) * kd_weight / ce_weight
            total = kd_weight + ce_weight
            kd_weight, ce_weight = total * ratio / (1 + ratio), total / (1 + ratio)
        return kd_weight, ce_weight
