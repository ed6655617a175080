"""Alpha-beta divergence (ABKD): forward KL at (1, 0), reverse KL at (0, 1), 4 times squared Hellinger at (0.5, 0.5).

A smaller alpha gives more weight to tokens where the student is far off, a larger beta to tokens that it is sure of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.engine.losses.divergence import Divergence, Parameter

if TYPE_CHECKING:
    from torch import Tensor


def alpha_beta(logp: Tensor, logq: Tensor, q: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """D = -1 / (alpha beta) sum(p^alpha q^beta - alpha/s p^s - beta/s q^s), s = alpha + beta, and its limits where
    alpha, beta or s are 0; q dD/dq = q^beta (q^alpha - p^alpha) / alpha.

    With [x, w](a, b) = w (a^x - b^x) / x, and w log(a / b) at x = 0, D is summed as ([s, 1](q, p) - [beta,
    p^alpha](q, p)) / alpha, or with p and q, alpha and beta exchanged: the same terms, which hold where they are 0.
    """
    total = alpha + beta
    if alpha == beta == 0:
        value = (logq - logp).square_().sum(-1) / 2
    elif abs(alpha) >= abs(beta):
        first, second = _power_difference(logq, logp, total), _power_difference(logq, logp, beta, alpha * logp)
        value = first.sub_(second).sum(-1) / alpha
    else:
        first, second = _power_difference(logp, logq, total), _power_difference(logp, logq, alpha, beta * logq)
        value = first.sub_(second).sum(-1) / beta
    return value, _power_difference(logq, logp, alpha, beta * logq)


def _power_difference(loga: Tensor, logb: Tensor, x: float, logw: Tensor | float = 0.0) -> Tensor:
    """w (a^x - b^x) / x without cancellation and, for x > 0, without overflow; w log(a / b) at x = 0."""
    if x == 0:
        difference = loga - logb
        return difference if isinstance(logw, float) else difference.mul_(logw.exp())
    a, b = x * loga + logw, x * logb + logw
    sign = (a - b).sign_()
    return (a - b).abs_().neg_().expm1_().neg_().mul_(a.maximum(b).exp_()).mul_(sign).div_(x)


ALPHA = Parameter(
    setting="ab_alpha",
    default=0.2,
    help="Alpha of `alpha_beta` (arXiv 2505.04560): smaller values give more weight to tokens where the "
    "student is far off. 1 with `ab_beta` 0 is forward KL, 0 with 1 reverse KL.",
    bounds={"ge": -2, "le": 2},
)
BETA = Parameter(
    setting="ab_beta",
    default=0.7,
    help="Beta of `alpha_beta`: larger values give more weight to tokens that the student is sure of.",
    bounds={"ge": -2, "le": 2},
)
DIVERGENCE = Divergence(
    name="alpha_beta",
    title="alpha-beta divergence",
    formula="-1/(αβ) Σ (p^α q^β - α/(α+β) p^(α+β) - β/(α+β) q^(α+β)), and its limits at 0",
    source="arXiv 2505.04560",
    terms=alpha_beta,
    parameters={"alpha": ALPHA, "beta": BETA},
)
