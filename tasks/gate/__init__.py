"""Gate: whether the student may go out. Budgets against the teacher and the student, on the same held-out rows."""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from tasks.core.config import RUN_WIDE, StageConfig
from tasks.core.metrics import METRICS, paired_metrics

if TYPE_CHECKING:
    Check = str
else:
    Check = Literal[("auto", *paired_metrics())]


def _known_scores(schema: dict[str, Any]) -> None:
    """The names that `floors` takes, for the JSON schema."""
    schema["propertyNames"] = {"enum": list(METRICS)}


class GateConfig(StageConfig):
    """How much may be lost on the way from teacher to student to GGUF. A point is a hundredth.

    A budget is kept only when the rows show it: the paired difference's one-sided lower limit has to lie within it.
    """

    check: Check = "auto"
    """What rows are compared by; `auto`: exact match where answers are JSON, token F1 where they are text."""

    student_points: float | None = Field(default=5, ge=0, le=100)
    """The student may be worse than the teacher by at most so many points; null sets no rule."""

    gguf_points: float | None = Field(default=5, ge=0, le=100)
    """A GGUF file may be worse than the student by at most so many points; null sets no rule."""

    gain_points: float | None = Field(default=0, ge=0, le=100)
    """The student has to be better than its own base by more than so many points; null sets no rule."""

    floors: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default={}, json_schema_extra=_known_scores)
    """Scores that the student and every GGUF file must reach: `{"json_valid": 0.98, "out_of_scope_recall": 0.9}`."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """How sure a rule has to be (one-sided)."""

    out_of_scope_intent: Annotated[str, RUN_WIDE] = "out_of_scope"
    """The intent of questions that the model should decline, for the tables by slice."""

    @field_validator("floors")
    @classmethod
    def _scores_exist(cls, floors: dict[str, float]) -> dict[str, float]:
        for name in floors.keys() - METRICS.keys():
            nearest = get_close_matches(name, METRICS, 1, 0.5)
            suggestion = f"; did you mean {nearest[0]!r}" if nearest else ""
            raise ValueError(f"no score is called {name!r}{suggestion}. Scores are {', '.join(METRICS)}")
        return floors
