"""Skewed KL divergence (DistiLLM): forward KL to a mixture that holds a share of the teacher; bounded gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.engine.losses.divergence import Divergence, Parameter, log_mixture

if TYPE_CHECKING:
    from torch import Tensor


def skew_kl(logp: Tensor, logq: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """D = KL(p, m) with m = alpha p + (1 - alpha) q; q dD/dq = -(1 - alpha) p q / m."""
    p = logp.exp()
    logm = log_mixture(logp, logq, alpha)
    return (p * (logp - logm)).sum(-1), p * (logq - logm).exp_().mul_(alpha - 1)


SKEW = Parameter(
    setting="skew",
    default=0.1,
    help="Share of the divergence's first distribution in the mixture of `skew_kl` and `skew_reverse_kl` (arXiv "
    "2402.03898).",
    bounds={"ge": 0, "lt": 1},
)
DIVERGENCE = Divergence(
    name="skew_kl",
    title="skewed KL",
    formula="KL(p, α p + (1 - α) q)",
    source="arXiv 2402.03898",
    terms=skew_kl,
    parameters={"alpha": SKEW},
    kernel=3,
)
