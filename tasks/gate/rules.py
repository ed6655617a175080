"""The rules of the gate: what each compares, how much it allows, and whether the rows show that it is kept."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from tasks.core.errors import BadData
from tasks.core.metrics import primary_metric
from tasks.core.paired_comparison import Paired, Prediction, compare, same_rows
from tasks.gate import GateConfig

MODELS = ("teacher-base", "student-base", "teacher", "direct", "student", "merged")
"""Names of evaluations that are no GGUF file."""


class Evaluation(NamedTuple):
    """One model's evaluation: its predictions and its scores.json."""

    predictions: list[Prediction]
    scores: dict[str, Any]

    @property
    def estimates(self) -> dict[str, Any]:
        """Every score with its interval, by name."""
        return {**self.scores["rates"], **self.scores["means"]}


Evaluations = Mapping[str, Evaluation]


class Rule(NamedTuple):
    """One rule's outcome: a sentence with the numbers, and the comparison behind it.

    A rule that could not be judged (`judged` is false) has not passed, and its sentence says why.
    """

    name: str
    passed: bool
    sentence: str
    paired: Paired | None = None
    judged: bool = True


class NotJudged(Exception):
    """A rule that the config sets and these evaluations cannot decide."""


def judge_rules(config: GateConfig, evaluations: Evaluations) -> list[Rule]:
    """Every rule that the config sets and that these evaluations are subject to."""
    check = pick_check(config, evaluations)
    judges: dict[str, Callable[[], Rule]] = {}
    for model, reference, points in _budgets(config, evaluations):
        judges[f"{model} no worse than {reference}"] = partial(
            _within_budget, evaluations, model, reference, check, points, config.confidence
        )
    if config.gain_points is not None and {"student", "student-base"} <= evaluations.keys():
        judges["student better than its base"] = partial(
            _gain, evaluations, check, config.gain_points, config.confidence
        )
    for score, floor in config.floors.items():
        for model in _deliverables(evaluations):
            judges[f"{model} reaches {score}"] = partial(_floor, evaluations, model, score, floor)
    return [_outcome(name, judge) for name, judge in judges.items()]


def rules_without_models(config: GateConfig, evaluations: Evaluations) -> list[str]:
    """Rules that the config sets and no evaluation is subject to, each with what it needs."""
    names, files = evaluations.keys(), gguf_names(evaluations)
    sentences = []
    if config.student_points is not None and not {"student", "teacher"} <= names:
        sentences.append("student_points needs evaluations of student and teacher")
    if config.gguf_points is not None and not ("student" in names and files):
        sentences.append("gguf_points needs evaluations of student and of a GGUF file")
    if config.gain_points is not None and not {"student", "student-base"} <= names:
        sentences.append("gain_points needs evaluations of student and student-base")
    if config.floors and not _deliverables(evaluations):
        sentences.append("floors need an evaluation of student or of a GGUF file")
    return sentences


def pick_check(config: GateConfig, evaluations: Evaluations) -> str:
    """`config.check`, with `auto` decided by the answers."""
    if config.check != "auto":
        return config.check
    return primary_metric({name for evaluation in evaluations.values() for name in evaluation.estimates})


def gguf_names(evaluations: Evaluations) -> list[str]:
    """Names of GGUF files among the evaluations."""
    return [name for name in evaluations if name not in MODELS]


def summary(rules: Sequence[Rule]) -> str:
    """The sentences of the rules that did not pass; where all did, their number."""
    if not rules:
        return "nothing was checked: the gate had no rule to judge"
    failures = [rule.sentence for rule in rules if not rule.passed]
    return "; ".join(failures) if failures else f"all {len(rules)} rules are kept"


def _outcome(name: str, judge: Callable[[], Rule]) -> Rule:
    try:
        return judge()
    except (NotJudged, BadData) as error:
        return Rule(name, False, f"{name}: cannot be judged: {error}", judged=False)


def _deliverables(evaluations: Evaluations) -> list[str]:
    return [name for name in ("student", *gguf_names(evaluations)) if name in evaluations]


def _budgets(config: GateConfig, evaluations: Evaluations) -> Iterator[tuple[str, str, float]]:
    """(model, reference, budget in points) for every pair that was evaluated."""
    if config.student_points is not None and {"student", "teacher"} <= evaluations.keys():
        yield "student", "teacher", config.student_points
    if config.gguf_points is not None and "student" in evaluations:
        for name in gguf_names(evaluations):
            yield name, "student", config.gguf_points


def _paired(evaluations: Evaluations, a: str, b: str, check: str, confidence: float) -> Paired:
    pairs = same_rows(evaluations[a].predictions, evaluations[b].predictions)
    paired = compare(pairs, check, "all", confidence)
    if paired is None:
        scores = ", ".join(sorted(evaluations[b].estimates))
        raise NotJudged(f"no row of {b} has {check}: set gate.check to auto or a score of these answers ({scores})")
    return paired


def _within_budget(
    evaluations: Evaluations, model: str, reference: str, check: str, points: float, confidence: float
) -> Rule:
    """Non-inferiority: the difference's lower limit is not below the budget."""
    paired = _paired(evaluations, reference, model, check, confidence)
    passed = 100 * paired.bound >= -points
    sentence = (
        f"{model} against {reference}: {_numbers(paired)}; at {confidence:.0%} confidence no worse than "
        f"{-100 * paired.bound:.1f} points, allowed are {points:g}"
    )
    if not passed and 100 * paired.difference >= -points:
        remedy = f": evaluate on more than {paired.rows}, or allow more" if paired.rows < 2000 else ""
        sentence += f". The rows do not show it{remedy}"
    return Rule(f"{model} no worse than {reference}", passed, sentence, paired)


def _gain(evaluations: Evaluations, check: str, points: float, confidence: float) -> Rule:
    """Superiority over the base: the difference's lower limit is above the gain that is asked for."""
    paired = _paired(evaluations, "student-base", "student", check, confidence)
    sentence = (
        f"student against its base: {_numbers(paired)}; at {confidence:.0%} confidence better by more than "
        f"{100 * paired.bound:.1f} points, wanted are more than {points:g}"
    )
    return Rule("student better than its base", 100 * paired.bound > points, sentence, paired)


def _floor(evaluations: Evaluations, model: str, score: str, floor: float) -> Rule:
    estimates = evaluations[model].estimates
    if score not in estimates:
        raise NotJudged(f"no row of {model} has {score}; its scores are {', '.join(sorted(estimates))}")
    value = estimates[score]["value"]
    sentence = f"{model}: {score} {value:.1%}, at least {floor:.1%} is wanted"
    return Rule(f"{model} reaches {score}", value >= floor, sentence)


def _numbers(paired: Paired) -> str:
    return (
        f"{paired.check} {paired.b:.1%} instead of {paired.a:.1%} on {paired.rows} rows "
        f"({paired.better} better, {paired.worse} worse, p = {paired.p:.2g})"
    )
