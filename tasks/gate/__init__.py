"""Gate: whether the student may go out. Budgets against the teacher and the student, on the same held-out rows."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from tasks.core.config import RUN_WIDE, StageConfig
from tasks.core.metrics import METRICS, paired_metrics
from tasks.core.named_choice import NameIn

SCORES = NameIn(METRICS)
CHECKS = NameIn({name: METRICS[name] for name in paired_metrics()}, "auto")


def _score_names(schema: dict[str, Any]) -> None:
    """Adds the names that `floors` takes to its JSON schema."""
    schema["propertyNames"] = {"enum": SCORES.names}


class GateConfig(StageConfig):
    """How much may be lost on the way from teacher to student to GGUF. A point is a hundredth.

    A budget is kept only when the rows show it: the paired difference's one-sided lower limit has to lie within it.
    """

    check: Annotated[str, CHECKS] = "auto"
    """What rows are compared by; `auto`: exact match where answers are JSON, token F1 where they are text."""

    student_points: float | None = Field(default=5, ge=0, le=100)
    """The student may be worse than the teacher by at most so many points; null sets no rule."""

    gguf_points: float | None = Field(default=5, ge=0, le=100)
    """A GGUF file may be worse than the student by at most so many points; null sets no rule."""

    gain_points: float | None = Field(default=0, ge=0, le=100)
    """The student has to be better than its own base by more than so many points; null sets no rule."""

    floors: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default={}, json_schema_extra=_score_names)
    """Scores that the student and every GGUF file must reach: `{"json_valid": 0.98, "out_of_scope_recall": 0.9}`."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """How sure a rule has to be (one-sided)."""

    out_of_scope_intent: Annotated[str, RUN_WIDE] = "out_of_scope"
    """The intent of questions that the model should decline, for the tables by slice."""

    @field_validator("floors")
    @classmethod
    def _scores_exist(cls, floors: dict[str, float]) -> dict[str, float]:
        for name in floors:
            SCORES.check(name)
        return floors
