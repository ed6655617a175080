"""What a distillation loss is made of: heads, the divergence with its parameters and weight, and the sums returned."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.engine.losses.divergence_registry import DEFAULT, DIVERGENCES


class Head(NamedTuple):
    """An LM head: logits = softcap * tanh(hidden @ weight.T / softcap), without softcap hidden @ weight.T.

    `weight` is (V, H).
    """

    weight: Tensor
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (N, V) of hidden states (N, H), multiplied in the hidden states' dtype (float64 stays so)."""
        logits = hidden @ self.weight.to(hidden.dtype).T
        return self.capped(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def capped(self, products: Tensor) -> Tensor:
        """Logits of the products hidden @ weight.T."""
        return products if self.softcap is None else self.softcap * torch.tanh(products / self.softcap)


@dataclass(frozen=True)
class LossMix:
    """loss = kd_weight * T^2 * D(p, q) + ce_weight * cross-entropy, p and q the softmaxes of logits / T.

    T^2 multiplies value and gradient alike (Hinton et al., arXiv 1503.02531), so a change of temperature leaves the
    gradient's size about as it was. D is `divergence`, a name in `divergence_registry`; `parameters` are its own, by
    config field, the registry's defaults where they are left out. Raises ValueError for what is out of bounds.
    """

    kd_weight: float
    ce_weight: float
    temperature: float = 1.0
    divergence: str = DEFAULT
    parameters: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence={self.divergence} is none of {', '.join(DIVERGENCES)}")
        settings = {parameter.setting for parameter in DIVERGENCES[self.divergence].parameters.values()}
        if unknown := self.parameters.keys() - settings:
            raise ValueError(f"divergence={self.divergence} has no parameter {', '.join(sorted(unknown))}")
        self.arguments()

    def arguments(self) -> dict[str, float]:
        """The divergence's parameters by the names in its formula."""
        return {
            name: parameter.check(self.parameters.get(parameter.setting, parameter.default))
            for name, parameter in DIVERGENCES[self.divergence].parameters.items()
        }

    def describe(self) -> dict[str, Any]:
        """The divergence as a report names it: name, title, formula, source, temperature and parameters."""
        divergence = DIVERGENCES[self.divergence]
        about = {name: getattr(divergence, name) for name in ("name", "title", "formula", "source")}
        return about | {"temperature": self.temperature, "parameters": self.arguments()}

    @property
    def kernel(self) -> int | None:
        """KIND of the divergence in the Triton kernels; None where it has none."""
        return DIVERGENCES[self.divergence].kernel

    def terms(self, logp: Tensor, logq: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """D (C,) and q * dD/dq (C, S) of log-probabilities (C, S); q = exp(logq)."""
        return DIVERGENCES[self.divergence].terms(logp, logq, q, **self.arguments())

    def weights(self, device: torch.device) -> Tensor:
        """(kd_weight, ce_weight) as float64 on `device`."""
        # Two fills and no copy from the host, which a CUDA graph could not capture.
        weights = (torch.full((), w, dtype=torch.float64, device=device) for w in (self.kd_weight, self.ce_weight))
        return torch.stack(list(weights))


class Losses(NamedTuple):
    """Sums over the N positions. Only `loss` carries a gradient; loss = kd_weight * kd_loss + ce_weight * ce_loss.

    `kd_grad_norm` and `ce_grad_norm` are sums over the positions of the norm of kd_loss's and ce_loss's gradient in a
    position's logits: how much the two parts weigh before their weights.
    """

    loss: Tensor
    kd_loss: Tensor
    ce_loss: Tensor
    kd_grad_norm: Tensor
    ce_grad_norm: Tensor


class TopK(NamedTuple):
    """A teacher's k largest logits a position instead of its hidden state: `logits` and `ids` (N, K), `lse` (N,).

    `lse` is the log-sum-exp over the teacher's whole vocabulary of logits / T at the temperature of the loss. The mass
    that the k leave over is one more bucket, the tail.
    """

    logits: Tensor
    ids: Tensor
    lse: Tensor
