"""Skewed reverse KL divergence (DistiLLM): reverse KL to a mixture that holds a share of the student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.engine.losses.divergence import Divergence, log_mixture
from tasks.engine.losses.divergences.skew_kl import SKEW

if TYPE_CHECKING:
    from torch import Tensor


def skew_reverse_kl(logp: Tensor, logq: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """D = KL(q, m) with m = alpha q + (1 - alpha) p; q dD/dq = q (log(q / m) - alpha q / m) + q, whose end cancels."""
    ratio = logq - log_mixture(logq, logp, alpha)
    return (q * ratio).sum(-1), q * (ratio - alpha * ratio.exp())


DIVERGENCE = Divergence(
    name="skew_reverse_kl",
    title="skewed reverse KL",
    formula="KL(q, α q + (1 - α) p)",
    source="arXiv 2402.03898",
    terms=skew_reverse_kl,
    parameters={"alpha": SKEW},
    kernel=4,
)
