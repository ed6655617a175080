"""What the outlier audit's verdict predicts for a quantization method."""

from typing import Any

from tasks.bakeoff.registry import Method
from tasks.core.audit_words import VERDICTS

DTYPE_TARGETS = {"bfloat16": "bf16", "float16": "fp16", "float32": "gguf_cpu"}
"""The audit's target that covers what a method leaves in a dtype."""


def predict(method: Method, dtype: str, verdict: dict[str, Any]) -> dict[str, str]:
    """`predicted`, the worst verdict among the method's targets, and `because`, its first reason.

    `verdict` is the audit's `verdict.json`; its `focus` is the model that the method quantizes.
    """
    if method.unsafe_reason:
        return {"predicted": "unsafe", "because": method.unsafe_reason}
    assessments = focus_targets(verdict)
    covered = (assessments[name] for name in (DTYPE_TARGETS[dtype], *method.targets))
    worst = max(covered, key=lambda assessment: VERDICTS.index(assessment["verdict"]))
    return {"predicted": worst["verdict"], "because": worst["because"][0]}


def focus_targets(verdict: dict[str, Any]) -> dict[str, Any]:
    """The audit's assessments of the model in focus, by target."""
    targets: dict[str, Any] = verdict["models"][verdict["focus"]]["targets"]
    return targets
