"""Words of the outlier audit's verdict, and the one for a changed model's measured agreement with its reference."""

from collections.abc import Iterable, Mapping
from typing import Any

VERDICTS = ("safe", "risky", "unsafe", "unknown")
"""From best to worst. `risky`: right under a condition, or close to a limit; `unknown`: not measured."""
BUDGETS = {"safe": (0.05, 0.95), "risky": (0.5, 0.8)}
"""Largest mean KL in nats a token, and smallest top-1 agreement, of a trial that is still called so."""


def worst(verdicts: Iterable[str]) -> str:
    """The worst of several verdicts."""
    return max(verdicts, key=VERDICTS.index)


def agreement_verdict(trial: Mapping[str, Any]) -> str:
    """safe, risky or unsafe by a trial's `mean_kl`, `top1` and `not_finite` (tokens with NaN or infinite logits)."""
    if trial["not_finite"]:
        return "unsafe"
    for verdict, (mean_kl, top1) in BUDGETS.items():
        if trial["mean_kl"] <= mean_kl and trial["top1"] >= top1:
            return verdict
    return "unsafe"
