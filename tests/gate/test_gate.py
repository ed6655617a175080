"""The gate on evaluations whose rows are known: what passes, what fails, and what the numbers say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tasks.core.command import Report
from tasks.core.errors import BadData, GateFailed
from tasks.core.job import Job
from tasks.core.metrics import AnsweredRow, observe
from tasks.core.refs import ModelDir, ReportRef
from tasks.evaluate.scores import score
from tasks.gate import GateConfig
from tasks.gate.run import gate
from tasks.gate.task import require_passed

ROWS = 400


def evaluation(directory: Path, wrong: range | set[int], rows: int = ROWS, text: bool = False) -> ModelDir:
    """An output directory of the evaluate stage whose answers are right but for the rows `wrong`."""
    directory.mkdir(parents=True)
    judged, lines = [], []
    for row in range(rows):
        intent = "out_of_scope" if row % 4 == 0 else f"intent{row % 4}"
        expected = f"row {row} is fine" if text else json.dumps({"intent": intent, "entities": {"n": str(row)}})
        answer = "no" if row in wrong else expected
        judged.append(observe(AnsweredRow("", expected, answer)))
        lines.append({"row": row, "prompt": f"question {row}", "expected": expected, "answer": answer})
    written = [json.dumps(line | one) + "\n" for line, one in zip(lines, judged, strict=True)]
    (directory / "predictions.jsonl").write_text("".join(written))
    (directory / "scores.json").write_text(json.dumps(score(judged, "out_of_scope")))
    return ModelDir(directory)


def run(tmp_path: Path, config: GateConfig, **evaluations: ModelDir) -> tuple[Report, dict[str, object]]:
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    out.mkdir()
    report = gate(config, {name.replace("_", "-"): one for name, one in evaluations.items()}, out, Job(tmp_path / "w"))
    return report, json.loads((out / "gate.json").read_text())


def test_a_student_as_good_as_its_teacher_passes(tmp_path: Path) -> None:
    teacher = evaluation(tmp_path / "t", range(0, 20))
    student = evaluation(tmp_path / "s", range(2, 24))
    base, q4 = evaluation(tmp_path / "b", range(0, ROWS)), evaluation(tmp_path / "q", range(0, 26))
    report, verdict = run(tmp_path, GateConfig(), teacher=teacher, student=student, student_base=base, Q4_0=q4)
    assert report.facts["passed"] and report.facts["rules"] == 3 and "all 3 rules are kept" in str(report.facts["said"])
    assert verdict["passed"] and verdict["check"] == "exact_match"
    assert set(verdict["transfer"]) == {"teacher -> student", "student -> Q4-0"}  # type: ignore[call-overload]
    assert "out of scope" in (tmp_path / "out0/report/gate.md").read_text()


def test_what_is_worse_fails_with_the_numbers(tmp_path: Path) -> None:
    teacher, student = evaluation(tmp_path / "t", range(10)), evaluation(tmp_path / "s", range(50))
    report, _ = run(tmp_path, GateConfig(student_points=5), teacher=teacher, student=student)
    said = str(report.facts["said"])
    assert not report.facts["passed"] and "87.5% instead of 97.5% on 400 rows (0 better, 40 worse" in said
    assert "allowed are 5" in said and "The rows do not show it" not in said
    with pytest.raises(GateFailed, match="0 better, 40 worse"):
        require_passed(ReportRef(uri="file:///x", digest="0" * 64, facts=report.facts))
    report, _ = run(tmp_path, GateConfig(student_points=15), teacher=teacher, student=student)
    assert report.facts["passed"]
    require_passed(ReportRef(uri="file:///x", digest="0" * 64, facts=report.facts))


def test_few_rows_do_not_show_what_many_do(tmp_path: Path) -> None:
    """One row in twenty lost: within 7 points by the look of it, but only many rows make that sure."""
    for rows, passed in ((40, False), (800, True)):
        worse = {row for row in range(rows) if row % 20 == 0}
        teacher = evaluation(tmp_path / f"t{rows}", set(), rows)
        student = evaluation(tmp_path / f"s{rows}", worse, rows)
        report, _ = run(tmp_path, GateConfig(student_points=7), teacher=teacher, student=student)
        assert report.facts["passed"] is passed
        assert ("The rows do not show it: evaluate on more than 40" in str(report.facts["said"])) is not passed


def test_a_rule_is_as_sure_as_the_confidence_says(tmp_path: Path) -> None:
    teacher, student = evaluation(tmp_path / "t", range(10)), evaluation(tmp_path / "s", range(8, 30))
    for confidence, passed in ((0.8, True), (0.999, False)):
        config = GateConfig(student_points=6, confidence=confidence)
        assert run(tmp_path, config, teacher=teacher, student=student)[0].facts["passed"] is passed


def test_a_gain_must_be_a_gain_and_floors_hold(tmp_path: Path) -> None:
    base, student = evaluation(tmp_path / "b", range(40)), evaluation(tmp_path / "s", range(38))
    report, _ = run(tmp_path, GateConfig(), student=student, student_base=base)
    assert "student against its base" in str(report.facts["said"]) and not report.facts["passed"]
    floors = GateConfig(gain_points=None, floors={"json_valid": 0.95, "intent_macro_f1": 0.5})
    report, verdict = run(tmp_path, floors, student=student, Q8_0=evaluation(tmp_path / "q", range(4)))
    assert "student: json_valid 90.5%, at least 95.0% is wanted" in str(report.facts["said"])
    names = {rule["name"]: rule["passed"] for rule in verdict["rules"]}  # type: ignore[attr-defined]
    assert names["Q8-0 reaches json_valid"] and not names["student reaches json_valid"]


def test_free_text_is_compared_by_token_f1(tmp_path: Path) -> None:
    teacher, student = (evaluation(tmp_path / name, range(last), text=True) for name, last in (("t", 10), ("s", 60)))
    report, verdict = run(tmp_path, GateConfig(), teacher=teacher, student=student)
    assert verdict["check"] == "token_f1" and not report.facts["passed"]
    report, outcome = run(tmp_path, GateConfig(check="json_valid"), teacher=teacher, student=student)
    assert not report.facts["passed"] and "cannot be judged: no row of student has json_valid" in str(
        report.facts["said"]
    )
    assert [(rule["passed"], rule["judged"]) for rule in outcome["rules"]] == [(False, False)]  # type: ignore[attr-defined]


def test_what_cannot_be_judged_fails_with_the_reason_and_the_others_are_judged(tmp_path: Path) -> None:
    student, file = evaluation(tmp_path / "s", range(4)), evaluation(tmp_path / "q", range(4))
    other = evaluation(tmp_path / "o", range(4), text=True)
    floors = {"json_valid": 0.5, "schema_valid": 0.5}
    report, outcome = run(tmp_path, GateConfig(floors=floors), student=student, Q8_0=file, Q4_0=other)
    rules = {rule["name"]: rule for rule in outcome["rules"]}  # type: ignore[attr-defined]
    assert rules["Q8-0 no worse than student"]["passed"] and rules["student reaches json_valid"]["passed"]
    said = rules["Q4-0 no worse than student"]["said"]
    assert "cannot be judged: row 0 is another question in the other file" in said
    said = rules["student reaches schema_valid"]["said"]
    assert "no row of student has schema_valid; its scores are entity_f1, " in said and said in str(
        report.facts["said"]
    )
    assert not report.facts["passed"] and list(outcome["transfer"]) == ["student -> Q8-0"]  # type: ignore[call-overload]
    assert "**not judged**: student reaches schema_valid" in (tmp_path / "out0/report/gate.md").read_text()


@pytest.mark.parametrize(
    ("floors", "message"),
    [
        ({"jsonvalid": 0.9}, "token_f1, rouge_l, metric; did you mean json_valid?"),
        ({"bleu!": 0.9}, "there is no 'bleu!', only json_valid, "),
        ({"json_valid": 98}, "less than or equal to 1"),
    ],
)
def test_floors_that_no_model_can_reach_are_refused_before_the_run(floors: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        GateConfig(floors=floors)


def test_the_command_succeeds_with_a_broken_rule_and_fails_on_nonsense(tmp_path: Path) -> None:
    evaluation(tmp_path / "t", range(0)), evaluation(tmp_path / "s", range(100))
    (tmp_path / "c.json").write_text("{}")
    command = [sys.executable, "-m", "tasks.gate.run", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]
    pair = ["--evaluations", f"teacher={tmp_path / 't'}", "--evaluations", f"student={tmp_path / 's'}"]
    done = subprocess.run([*command, *pair], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["facts"]["passed"] is False and "100 worse" in report["facts"]["said"]
    events = (tmp_path / "out.work/events.jsonl").read_text()
    assert "BROKEN: student against teacher" in events
    with pytest.raises(BadData, match="scores.json is not there"):
        run(tmp_path, GateConfig(), student=ModelDir(tmp_path))
    report_, _ = run(tmp_path, GateConfig(), student=ModelDir(tmp_path / "s"))
    assert report_.facts["passed"] and "no rule to judge" in report_.warnings[0]
    assert str(report_.facts["said"]).startswith("nothing was checked: ") and report_.facts["rules"] == 0
    assert "student_points needs evaluations of student and teacher" in report_.warnings[0]
