"""Forward Kullback-Leibler divergence: the student has to cover all that the teacher finds likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.engine.losses.divergence import Divergence

if TYPE_CHECKING:
    from torch import Tensor


def forward_kl(logp: Tensor, logq: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """D = sum p log(p / q), q dD/dq = -p."""
    p = logp.exp()
    return (p * (logp - logq)).sum(-1), p.neg_()


DIVERGENCE = Divergence(
    name="forward_kl",
    title="forward KL",
    formula="KL(p, q) = Σ p log(p / q)",
    source="arXiv 1503.02531",
    terms=forward_kl,
    kernel=0,
)
