"""Judges a run's evaluations against its budgets: gate.json says which rules are kept, with the numbers.

python -m tasks.gate.run config.json --evaluations teacher=DIR --evaluations student=DIR ... --out DIR

A rule that is broken or cannot be judged does not fail the command: `passed` in report.json is false, and the flow
fails after its report.
"""

import json
from pathlib import Path
from typing import Any

from tasks.core.command import Report, command
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.paired_comparison import Paired, compare_slices, read_predictions
from tasks.core.plain_text import markdown
from tasks.core.refs import ModelDir
from tasks.gate import GateConfig
from tasks.gate.rules import Evaluation, Rule, gguf_names, judge_rules, pick_check, rules_without_models, summary


def gate(config: GateConfig, evaluations: dict[str, ModelDir], out: Path, job: Job) -> Report:
    """`evaluations` are output directories of the evaluate stage by name: `teacher`, `student`, `student-base`, and
    GGUF files under any other name. Raises BadData for a directory that is none.
    """
    by_name = {name: _read(directory.base) for name, directory in evaluations.items()}
    rules = judge_rules(config, by_name)
    unchecked = rules_without_models(config, by_name)
    check = pick_check(config, by_name)
    tables = _slice_tables(by_name, check, config.out_of_scope_intent, job)
    outcome = {
        "passed": all(rule.passed for rule in rules),
        "check": check,
        "confidence": config.confidence,
        "rules": [_as_json(rule) for rule in rules],
        "unchecked": unchecked,
        "transfer": {name: [comparison._asdict() for comparison in rows] for name, rows in tables.items()},
    }
    (out / "gate.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    (out / "report").mkdir()
    (out / "report" / "gate.md").write_text(_page(rules, unchecked, tables), encoding="utf-8")
    for rule in rules:
        job.log(f"{_word(rule)}: {rule.sentence}", "info" if rule.passed else "warning")
    for sentence in unchecked:
        job.log(f"not checked: {sentence}")
    failures = sum(not rule.passed for rule in rules)
    sentence = summary(rules) + ("" if rules or not unchecked else f"; {'; '.join(unchecked)}")
    return Report(
        facts={"passed": not failures, "rules": len(rules), "broken": failures, "said": sentence},
        metrics={"rules": float(len(rules)), "broken": float(failures)},
        warnings=[] if rules else [sentence],
    )


def _read(directory: Path) -> Evaluation:
    scores = directory / "scores.json"
    if not scores.is_file():
        raise BadData(f"{scores} is not there: give the output directory of the evaluate stage")
    return Evaluation(read_predictions(directory / "predictions.jsonl"), json.loads(scores.read_text()))


def _slice_tables(
    evaluations: dict[str, Evaluation], check: str, out_of_scope: str, job: Job
) -> dict[str, list[Paired]]:
    """Comparisons slice by slice: what distilling kept, what it gained over training directly, what quantizing cost."""
    pairs = [("teacher", "student"), ("direct", "student"), *(("student", name) for name in gguf_names(evaluations))]
    tables = {}
    for a, b in pairs:
        if a in evaluations and b in evaluations:
            try:
                tables[f"{a} -> {b}"] = compare_slices(
                    evaluations[a].predictions, evaluations[b].predictions, check, out_of_scope
                )
            except BadData as error:
                job.log(f"{a} -> {b} cannot be compared: {error}", "warning")
    return tables


def _as_json(rule: Rule) -> dict[str, Any]:
    paired = rule.paired._asdict() if rule.paired is not None else None
    return {
        "name": rule.name, "passed": rule.passed, "judged": rule.judged, "said": rule.sentence, "paired": paired
    }  # fmt: skip


def _word(rule: Rule) -> str:
    return "kept" if rule.passed else "BROKEN" if rule.judged else "NOT JUDGED"


def _page(rules: list[Rule], unchecked: list[str], tables: dict[str, list[Paired]]) -> str:
    lines = ["# Gate", ""]
    lines += [f"- **{_word(rule).lower()}**: {markdown(rule.sentence)}" for rule in rules]
    lines += [f"- not checked: {markdown(sentence)}" for sentence in unchecked]
    for name, comparisons in tables.items():
        lines += [
            "",
            f"## {markdown(name)}",
            "",
            "| slice | rows | before | after | difference | 95 % interval | p |",
            "|---" * 7 + "|",
        ]
        lines += [_table_row(comparison) for comparison in comparisons]
    return "\n".join([*lines, ""])


def _table_row(comparison: Paired) -> str:
    interval = f"{100 * comparison.low:+.1f} to {100 * comparison.high:+.1f}"
    cells = [
        markdown(comparison.slice), f"{comparison.rows}", f"{comparison.a:.1%}", f"{comparison.b:.1%}",
        f"{100 * comparison.difference:+.1f}", interval, f"{comparison.p:.2g}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    command(gate)
