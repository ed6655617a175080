"""The audit's verdict: for each deployment target whether a model is safe there, why, and what to do.

A target is one decorated function in `tasks.outliers.target_rules`:

    @target("bf16", "bfloat16", remedy="keep the norms in float32")
    def _bf16(evidence: Evidence, remedy: str) -> Assessment: ...

Verdicts: safe; risky (right under the condition in `do`, or within `margin` of a limit); unsafe; unknown (it depends
on activations that were not measured). Rules are plain arithmetic on numbers that were measured elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tasks.core.audit_words import agreement_verdict, worst

Numbers = dict[str, Any]
NOT_MEASURED = "activations were not seen: give a dataset to know"
STATIC_INT8, TOKEN_INT8 = "int8 activations, scale a tensor", "int8 activations, scale a token"
AWQ_FOLD, NAIVE_AWQ_FOLD = "awq fold (1+w)/s-1", "awq fold w/s"
"""Names of trials that `tasks.outliers.simulate` runs and rules read."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of one model.

    `tensors` are `weights.json`'s numbers; `activations` the summary of activations, None without a dataset; `trials`
    outcomes on held-out rows by name, empty where none was run; `margin` how far below a limit a peak has to stay.
    """

    tensors: list[Numbers]
    activations: Numbers | None
    trials: dict[str, Numbers]
    margin: float


@dataclass(frozen=True)
class Assessment:
    """A verdict, the sentences that give its reasons, and what to do; `facts` go into `verdict.json` beside them."""

    verdict: str
    reasons: list[str]
    do: list[str] = field(default_factory=list)
    facts: Numbers = field(default_factory=dict)

    def with_trial(self, outcome: Numbers | None) -> "Assessment":
        """The assessment after a trial on held-out rows: the worse verdict holds, the earlier one is `predicted`."""
        if outcome is None:
            return self
        sentence = (
            f"tried: mean KL {outcome['mean_kl']:.2g}, top-1 {outcome['top1']:.1%}, {outcome['not_finite']:.0f} of "
            f"{outcome['tokens']:.0f} tokens not finite"
        )
        verdict = worst([self.verdict, agreement_verdict(outcome)])
        return Assessment(verdict, [*self.reasons, sentence], self.do, {**self.facts, "predicted": self.verdict})

    def as_json(self) -> Numbers:
        """The entry of `verdict.json`."""
        return {"verdict": self.verdict, "because": self.reasons, "do": self.do, **self.facts}


class Target(NamedTuple):
    """A way to deploy a model: the name in `verdict.json`, a title, its main remedy, and the rule that assesses it."""

    name: str
    title: str
    remedy: str
    rule: Callable[[Evidence, str], Assessment]

    def check(self, evidence: Evidence) -> Assessment:
        """The model's assessment; a checkpoint with NaN or infinite values is unsafe everywhere."""
        broken = [tensor for tensor in evidence.tensors if tensor["nan"] or tensor["inf"]]
        if broken:
            reasons = [f"{t['tensor']} has {t['nan']} NaN and {t['inf']} infinite values" for t in broken[:3]]
            return Assessment("unsafe", reasons, ["do not use this checkpoint"])
        return self.rule(evidence, self.remedy)


TARGETS: dict[str, Target] = {}
"""Every target by its name, in the order of the verdict's table."""


def target(
    name: str, title: str, remedy: str
) -> Callable[[Callable[[Evidence, str], Assessment]], Callable[[Evidence, str], Assessment]]:
    """Registers the decorated rule as a target."""

    def register(rule: Callable[[Evidence, str], Assessment]) -> Callable[[Evidence, str], Assessment]:
        TARGETS[name] = Target(name, title, remedy, rule)
        return rule

    return register
