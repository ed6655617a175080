"""Total variation distance: symmetric, at most 1; its gradient does not shrink as the student comes near."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks.engine.losses.divergence import Divergence

if TYPE_CHECKING:
    from torch import Tensor


def total_variation(logp: Tensor, logq: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """D = sum |p - q| / 2, q dD/dq = q sign(q - p) / 2 (0 where p = q)."""
    difference = q - logp.exp()
    return difference.abs().sum(-1) / 2, difference.sign_().mul_(q).div_(2)


DIVERGENCE = Divergence(
    name="total_variation",
    title="total variation distance",
    formula="½ Σ \\|p - q\\|",
    source="arXiv 2307.15190",
    terms=total_variation,
)
