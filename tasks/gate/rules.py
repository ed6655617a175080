"""The rules of the gate: what each compares, how much it allows, and whether the rows show that it is kept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tasks.core.errors import BadConfig
from tasks.core.paired_comparison import Paired, Prediction, compare, same_rows
from tasks.gate import GateConfig

MODELS = ("teacher-base", "student-base", "teacher", "direct", "student", "merged")
"""Names of evaluations that are no GGUF file."""


class Evaluation(NamedTuple):
    """One model's evaluation: its predictions and its scores.json."""

    predictions: list[Prediction]
    scores: dict[str, Any]


class Rule(NamedTuple):
    """One rule's outcome; `said` is a sentence with the numbers, `paired` the comparison behind it."""

    name: str
    passed: bool
    said: str
    paired: Paired | None = None


def judge_rules(config: GateConfig, evaluations: Mapping[str, Evaluation]) -> list[Rule]:
    """Every rule that the config sets and these evaluations allow. Raises BadConfig for a floor under no score."""
    check = pick_check(config, evaluations)
    found: list[Rule] = []
    for name, reference, budget in _budgets(config, evaluations):
        paired = _paired(evaluations, reference, name, check, config.confidence)
        found.append(_within(name, reference, budget, paired, config.confidence))
    if config.gain_points is not None and {"student", "student-base"} <= evaluations.keys():
        paired = _paired(evaluations, "student-base", "student", check, config.confidence)
        found.append(_gained(config.gain_points, paired, config.confidence))
    return found + list(_floors(config, evaluations))


def pick_check(config: GateConfig, evaluations: Mapping[str, Evaluation]) -> str:
    """`config.check`, with `auto` decided by the answers."""
    if config.check != "auto":
        return config.check
    structured = any(row["json_valid"] is not None for one in evaluations.values() for row in one.predictions)
    return "exact_match" if structured else "token_f1"


def files_of(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Names of GGUF files among the evaluations."""
    return [name for name in evaluations if name not in MODELS]


def _budgets(config: GateConfig, evaluations: Mapping[str, Evaluation]) -> Iterator[tuple[str, str, float]]:
    """(model, reference, budget in points) for every pair that is there."""
    if config.student_points is not None and {"student", "teacher"} <= evaluations.keys():
        yield "student", "teacher", config.student_points
    if config.gguf_points is not None and "student" in evaluations:
        for name in files_of(evaluations):
            yield name, "student", config.gguf_points


def _paired(evaluations: Mapping[str, Evaluation], a: str, b: str, check: str, confidence: float) -> Paired:
    pairs = same_rows(evaluations[a].predictions, evaluations[b].predictions)
    paired = compare(pairs, check, "all", confidence)
    if paired is None:
        raise BadConfig(f"no row of {b} speaks of {check}: set check to one that these answers have")
    return paired


def _within(name: str, reference: str, budget: float, paired: Paired, confidence: float) -> Rule:
    """Non-inferiority: the difference's lower limit is not below the budget."""
    passed = 100 * paired.bound >= -budget
    said = (
        f"{name} against {reference}: {_numbers(paired)}; at {confidence:.0%} confidence no worse than "
        f"{-100 * paired.bound:.1f} points, allowed are {budget:g}"
    )
    if not passed and 100 * paired.difference >= -budget:
        said += (
            f". The rows do not show it: evaluate on more than {paired.rows}, or allow more"
            if paired.rows < 2000
            else ". The rows do not show it"
        )
    return Rule(f"{name} no worse than {reference}", passed, said, paired)


def _gained(points: float, paired: Paired, confidence: float) -> Rule:
    """Superiority over the base: the difference's lower limit is above the wanted gain."""
    passed = 100 * paired.bound > points
    said = (
        f"student against its base: {_numbers(paired)}; at {confidence:.0%} confidence better by more than "
        f"{100 * paired.bound:.1f} points, wanted are more than {points:g}"
    )
    return Rule("student better than its base", passed, said, paired)


def _floors(config: GateConfig, evaluations: Mapping[str, Evaluation]) -> Iterator[Rule]:
    names = [name for name in ("student", *files_of(evaluations)) if name in evaluations]
    for score, floor in config.floors.items():
        for name in names:
            scores = evaluations[name].scores
            known = {**scores["rates"], **scores["means"]}
            if score not in known:
                raise BadConfig(f"floors: {name} has no score {score!r}; it has {', '.join(sorted(known))}")
            value = known[score]["value"]
            said = f"{name}: {score} {value:.1%}, at least {floor:.1%} is wanted"
            yield Rule(f"{name} reaches {score}", value >= floor, said)


def _numbers(paired: Paired) -> str:
    return (
        f"{paired.check} {paired.b:.1%} instead of {paired.a:.1%} on {paired.rows} rows "
        f"({paired.better} better, {paired.worse} worse, p = {paired.p:.2g})"
    )


def said_of(rules: Sequence[Rule]) -> str:
    """The broken rules in a paragraph; the kept ones counted."""
    broken = [rule.said for rule in rules if not rule.passed]
    return "; ".join(broken) if broken else f"all {len(rules)} rules are kept"
