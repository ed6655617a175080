"""Judges a run's evaluations against its budgets: gate.json says which rules are kept, with the numbers.

python -m tasks.gate.run config.json --evaluations teacher=DIR --evaluations student=DIR ... --out DIR

A broken rule does not fail the command: `passed` in report.json is false, and the flow fails after its report.
"""

import json
from pathlib import Path

from tasks.core.command import Report, command
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.paired_comparison import Paired, read_predictions, transfer
from tasks.core.refs import ModelDir
from tasks.gate import GateConfig
from tasks.gate.rules import Evaluation, Rule, files_of, judge_rules, pick_check, said_of


def gate(config: GateConfig, evaluations: dict[str, ModelDir], out: Path, job: Job) -> Report:
    """`evaluations` are output directories of the evaluate stage by name: `teacher`, `student`, `student-base`, and
    GGUF files under any other name. Raises BadData when they are of different datasets.
    """
    read = {name: _read(directory.base) for name, directory in evaluations.items()}
    rules = judge_rules(config, read)
    check = pick_check(config, read)
    tables = {}
    for a, b in _pairs(read):
        found = transfer(read[a].predictions, read[b].predictions, check, config.out_of_scope_intent)
        tables[f"{a} -> {b}"] = [one._asdict() for one in found]
    verdict = {
        "passed": all(rule.passed for rule in rules),
        "check": check,
        "confidence": config.confidence,
        "rules": [rule._asdict() | {"paired": rule.paired and rule.paired._asdict()} for rule in rules],
        "transfer": tables,
    }
    (out / "gate.json").write_text(json.dumps(verdict, indent=1), encoding="utf-8")
    (out / "report").mkdir()
    (out / "report" / "gate.md").write_text(_page(rules, tables), encoding="utf-8")
    for rule in rules:
        job.log(f"{'kept' if rule.passed else 'BROKEN'}: {rule.said}", "info" if rule.passed else "warning")
    warnings = [] if rules else ["the gate had no rule to judge: give it the teacher's and the student's evaluations"]
    broken = sum(not rule.passed for rule in rules)
    return Report(
        facts={"passed": not broken, "rules": len(rules), "broken": broken, "said": said_of(rules)},
        metrics={"rules": float(len(rules)), "broken": float(broken)},
        warnings=warnings,
    )


def _read(directory: Path) -> Evaluation:
    scores = directory / "scores.json"
    if not scores.is_file():
        raise BadData(f"{scores} is not there: give the output directory of the evaluate stage")
    return Evaluation(read_predictions(directory / "predictions.jsonl"), json.loads(scores.read_text()))


def _pairs(evaluations: dict[str, Evaluation]) -> list[tuple[str, str]]:
    """What is compared slice by slice: what distilling kept, what it bought, what quantizing cost."""
    wanted = [("teacher", "student"), ("direct", "student"), *(("student", name) for name in files_of(evaluations))]
    return [(a, b) for a, b in wanted if a in evaluations and b in evaluations]


def _page(rules: list[Rule], tables: dict[str, list[dict[str, object]]]) -> str:
    lines = ["# Gate", ""]
    lines += [f"- **{'kept' if rule.passed else 'broken'}**: {rule.said}" for rule in rules]
    for name, rows in tables.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| slice | rows | before | after | difference | 95 % interval | p |",
            "|---" * 7 + "|",
        ]
        lines += [_row(Paired(**row)) for row in rows]  # type: ignore[arg-type]
    return "\n".join([*lines, ""])


def _row(one: Paired) -> str:
    interval = f"{100 * one.low:+.1f} to {100 * one.high:+.1f}"
    difference = f"{100 * one.difference:+.1f}"
    return f"| {one.slice} | {one.rows} | {one.a:.1%} | {one.b:.1%} | {difference} | {interval} | {one.p:.2g} |"


if __name__ == "__main__":
    command(gate)
