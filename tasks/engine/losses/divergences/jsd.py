"""Generalized Jensen-Shannon divergence: between forward KL (small beta) and reverse KL (large beta), and bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.engine.losses.divergence import Divergence, Parameter, log_mixture

if TYPE_CHECKING:
    from torch import Tensor


def jsd(logp: Tensor, logq: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D = beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q; q dD/dq = (1 - beta) q log(q / m)."""
    p = logp.exp()
    logm = log_mixture(logp, logq, beta)
    weighted = q * (logq - logm) * (1 - beta)
    return beta * (p * (logp - logm)).sum(-1) + weighted.sum(-1), weighted


BETA = Parameter(
    setting="jsd_beta",
    default=0.5,
    help="The teacher's share in the mixture of `jsd` (arXiv 2306.13649).",
    bounds={"gt": 0, "lt": 1},
)
DIVERGENCE = Divergence(
    name="jsd",
    title="generalized Jensen-Shannon divergence",
    formula="β KL(p, m) + (1 - β) KL(q, m), m = β p + (1 - β) q",
    source="arXiv 2306.13649",
    terms=jsd,
    parameters={"beta": BETA},
    kernel=2,
)
