"""The targets' registry: a rule that is added by its decorator is in the verdict, the page and the report."""

import pytest

from tasks.outliers.page import target_rows
from tasks.outliers.target_rules import assess
from tasks.outliers.targets import TARGETS, Assessment, Evidence, target

TENSOR = {"tensor": "model.norm.weight", "nan": 0, "inf": 0, "max": 1.0}
TRIAL = {"mean_kl": 0.1, "top1": 0.9, "not_finite": 0, "tokens": 10}


def test_decorated_rule_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "fp4", None)  # type: ignore[arg-type]  # taken out again afterwards

    @target("fp4", "4-bit floats", remedy="use 8 bits")
    def fp4(evidence: Evidence, remedy: str) -> Assessment:
        return Assessment("safe", ["small"], [remedy]).with_trial(evidence.trials.get("fp4"))

    entries = assess(Evidence([TENSOR], None, {"fp4": TRIAL}, margin=2))
    assert entries["fp4"] == {
        "title": "4-bit floats", "verdict": "risky", "do": ["use 8 bits"], "predicted": "safe",
        "because": ["small", "tried: mean KL 0.1, top-1 90.0%, 0 of 10 tokens not finite"],
    }  # fmt: skip
    assert [row["target"] for row in target_rows(entries)] == list(TARGETS) and list(TARGETS)[-1] == "fp4"
    broken = assess(Evidence([TENSOR | {"nan": 1}], None, {}, margin=2))
    assert {entry["verdict"] for entry in broken.values()} == {"unsafe"}
    assert broken["fp4"]["do"] == ["do not use this checkpoint"]
