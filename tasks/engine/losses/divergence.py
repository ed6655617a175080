"""What a divergence is made of: name, formula, source, parameters and, where there is one, its Triton kernel.

This module and those of `divergences` import no torch, so that a config can be made of them: formulas use methods of
the tensors they get.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BOUNDS = {  # as pydantic calls them
    "gt": ("above", operator.gt), "ge": ("at least", operator.ge),
    "lt": ("below", operator.lt), "le": ("at most", operator.le),
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A number in a divergence's formula: the config field `setting` sets it, `bounds` are gt, ge, lt, le of pydantic's
    Field."""

    setting: str
    default: float
    help: str
    bounds: Mapping[str, float] = field(default_factory=dict)

    def check(self, value: float) -> float:
        """The value. Raises ValueError outside the bounds."""
        for bound, limit in self.bounds.items():
            words, holds = BOUNDS[bound]
            if not holds(value, limit):
                raise ValueError(f"{self.setting}={value:g} must be {words} {limit:g}")
        return value


@dataclass(frozen=True)
class Divergence:
    """D(p, q) of a teacher's distribution p and a student's q.

    `terms(logp, logq, q, **parameters)` takes log-probabilities and probabilities (C, S) and returns D (C,) and
    q * dD/dq (C, S). From that the gradient in the student's logits is q dD/dq - q sum(q dD/dq), in which multiples of
    q cancel: terms of q dD/dq that are a multiple of q may be left out. `terms` must not change its arguments.

    `parameters` maps names of `terms`' arguments to what a user sets. `kernel` is KIND in
    `tasks.engine.losses.triton`; without one CUDA takes the plain path.
    """

    name: str
    title: str
    formula: str
    source: str
    terms: Callable[..., tuple[Tensor, Tensor]]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    kernel: int | None = None


def log_mixture(loga: Tensor, logb: Tensor, share: float) -> Tensor:
    """log(share * a + (1 - share) * b), elementwise."""
    if share == 0:
        return logb
    return (loga + math.log(share)).logaddexp(logb + math.log1p(-share))
