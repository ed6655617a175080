"""What a distillation loss is made of: heads, the divergence and its weights, and the sums that come out."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]


class Head(NamedTuple):
    """What turns a final hidden state into logits: `softcap * tanh(hidden @ weight.T / softcap)`; weight (V, H)."""

    weight: Tensor
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V) of hidden states (N, H), multiplied in the hidden states' dtype (float64 stays so)."""
        logits = hidden @ self.weight.to(hidden.dtype).T
        return self.capped(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def capped(self, products: Tensor) -> Tensor:
        """Logits of the products of hidden states and weight."""
        return products if self.softcap is None else self.softcap * torch.tanh(products / self.softcap)


@dataclass(frozen=True)
class Mix:
    """kd_weight * T^2 * divergence(teacher p, student q; T) + ce_weight * cross-entropy.

    T^2 multiplies value and gradient alike (Hinton et al., arXiv 1503.02531), so a change of temperature leaves the
    gradient's size about as it was. `beta` is the teacher's share in the mixture of `jsd` (GKD, arXiv 2306.13649):
    beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. `skew` is alpha in DistiLLM's (arXiv
    2402.03898) skew_kl = KL(p || alpha p + (1 - alpha) q) and skew_reverse_kl = KL(q || alpha q + (1 - alpha) p).
    """

    kd_weight: float
    ce_weight: float
    temperature: float = 1.0
    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if not (0 < self.beta < 1 and 0 <= self.skew < 1):
            raise ValueError(f"beta={self.beta} must lie between 0 and 1, skew={self.skew} in [0, 1)")

    def weights(self, device: torch.device) -> Tensor:
        """(kd_weight, ce_weight) as float64 on `device`."""
        # Two fills and no copy from the host, which a CUDA graph could not capture.
        both = (torch.full((), w, dtype=torch.float64, device=device) for w in (self.kd_weight, self.ce_weight))
        return torch.stack(list(both))


class Losses(NamedTuple):
    """Sums over the N positions. Only `loss` carries a gradient; loss = kd_weight * kd_loss + ce_weight * ce_loss.

    `kd_grad_norm` and `ce_grad_norm` are sums of the norm that each part's unweighted gradient has in a position's
    logits (T^2 included): what the weights really weigh.
    """

    loss: Tensor
    kd_loss: Tensor
    ce_loss: Tensor
    kd_grad_norm: Tensor
    ce_grad_norm: Tensor


class TopK(NamedTuple):
    """A teacher's k largest logits a position instead of its hidden state: `logits` and `ids` (N, k), `lse` (N,).

    `lse` is the log-sum-exp over the teacher's whole vocabulary of logits / T at the temperature of the loss; what the
    k leave over is the tail bucket's.
    """

    logits: Tensor
    ids: Tensor
    lse: Tensor
