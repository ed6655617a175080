"""Loss weights that keep the configured ratio between the gradients of divergence and cross-entropy."""

import torch

from tasks.engine.losses.loss_mix import LossMix
from tasks.engine.training.history import WINDOW, History

LIMIT = 1000.0  # largest correction, so that a part whose gradient vanishes is not scaled without bound


class GradientBalance:
    """`part_weights` (2,), of divergence and cross-entropy: a tensor that `update` changes in place.

    weight_i ~ mix_i / norm_i, their sum kept, with the mean gradient norms of the last `WINDOW` steps.
    """

    def __init__(self, mix: LossMix, device: torch.device) -> None:
        self.mix, self.part_weights = mix, mix.weights(device)

    def update(self, history: History, step: int) -> None:
        """Sets the weights for the step after `step` finished ones, from the norms of the `WINDOW` before the last.

        The last step's norms may still be on the device. A function of the history alone: a resumed run has the
        same weights.
        """
        window = slice(max(0, step - 1 - WINDOW), max(0, step - 1))
        kd, ce = (history.steps.get(name, [])[window] for name in ("kd_grad_norm", "ce_grad_norm"))
        for part, weight in zip(self.part_weights, self._weights(sum(kd), sum(ce)), strict=True):
            part.fill_(weight)

    def _weights(self, kd: float, ce: float) -> tuple[float, float]:
        kd_weight, ce_weight = self.mix.kd_weight, self.mix.ce_weight
        if kd > 0 and ce > 0 and kd_weight and ce_weight:
            ratio = min(max(ce / kd, 1 / LIMIT), LIMIT) * kd_weight / ce_weight
            total = kd_weight + ce_weight
            kd_weight, ce_weight = total * ratio / (1 + ratio), total / (1 + ratio)
        return kd_weight, ce_weight
