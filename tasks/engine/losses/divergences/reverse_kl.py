"""Reverse Kullback-Leibler divergence: the student must not find likely what the teacher does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.engine.losses.divergence import Divergence

if TYPE_CHECKING:
    from torch import Tensor


def reverse_kl(logp: Tensor, logq: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """D = sum q log(q / p), q dD/dq = q log(q / p) + q, of which the last term cancels."""
    weighted = q * (logq - logp)
    return weighted.sum(-1), weighted


DIVERGENCE = Divergence(
    name="reverse_kl",
    title="reverse KL",
    formula="KL(q, p) = Σ q log(q / p)",
    source="arXiv 2306.08543",
    terms=reverse_kl,
    kernel=1,
)
