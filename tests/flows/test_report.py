"""The report's page and directory from evaluations whose answers are known, and the comparison of two runs."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flows.compare import main
from flows.report.charts import Point, histogram, losses, size_against_quality
from flows.report.inline_svg import BOTTOM, HEIGHT, TOP
from flows.report.publish import gate_facts, write_report
from flows.report.report_data import Curve, Evaluation, Picture, ReportData, read_curve
from flows.report.terminal import cells
from flows.stages import Stages, report_directory
from tasks.core.errors import StageError
from tasks.core.job import Job
from tasks.core.metrics import AnsweredRow, Visibility, observe, titles
from tasks.core.refs import ModelDir
from tasks.evaluate.scores import score
from tasks.gate import GateConfig
from tasks.gate.run import gate
from tasks.gate.task import require_passed

ROOT = Path(__file__).parents[2]
ROWS = 60
EVIL = "<script>alert('x')</script>"


def evaluation(name: str, wrong: int, text: bool = False) -> Evaluation:
    """A model that has the first `wrong` rows wrong, in words that a careless page would run."""
    judged, rows = [], []
    for row in range(ROWS):
        label = {"intent": "out_of_scope" if row % 3 == 0 else f"intent{row % 3}", "entities": {"n": str(row)}}
        expected = f"Row {row} is in order." if text else json.dumps(label)
        answer = f"{EVIL} {row}" if row < wrong else expected
        judged.append(observe(AnsweredRow("", expected, answer)))
        rows.append({"row": row, "prompt": f"question {row} {EVIL}", "expected": expected, "answer": answer})
    scores = score(judged, "out_of_scope") | {"parameters": {}, "perplexity": {}}
    predictions = [{**line, **one} for line, one in zip(rows, judged, strict=True)]
    rates = {name: value["value"] for name, value in {**scores["rates"], **scores["means"]}.items()}
    facts = {**rates, "format": "bfloat16", "bytes": 1_500_000 + len(name), "tokens_per_second": 1000.0 + wrong}
    facts |= {"latency_p50_ms": 12.5, "first_token_ms": 3.5, "held_out_perplexity": 1.01}
    report = {"facts": facts, "details": {"latencies_ms": [10.0, 12.0, 14.5]}}
    return Evaluation(name, scores, report, json.loads(json.dumps(predictions)))


def write(directory: Path, wrong: dict[str, int], text: bool = False) -> Path:
    """A run's report directory."""
    evaluations = [evaluation(name, count, text) for name, count in wrong.items()]
    verdict = None
    if {"teacher", "student"} <= wrong.keys():
        for one in evaluations:
            place = directory.parent / "evaluations" / directory.name / one.name
            place.mkdir(parents=True)
            (place / "scores.json").write_text(json.dumps(one.scores))
            (place / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one.predictions))
        out = directory.parent / f"{directory.name}-gate"
        out.mkdir(parents=True)
        models = {
            one.name: ModelDir(directory.parent / "evaluations" / directory.name / one.name) for one in evaluations
        }
        report = gate(GateConfig(student_points=10), models, out, Job(directory.parent / "work"))
        verdict = json.loads((out / "gate.json").read_text())
    stages = {"teacher-base": "base", "teacher": "teacher", "student": "student"}
    keys = ["format", "bytes", *titles(Visibility.SUMMARY), "tokens_per_second"]
    models_: list[dict[str, Any]] = [
        {"name": one.name, "stage": stages.get(one.name, "gguf"), **{key: one.report["facts"].get(key) for key in keys}}
        for one in evaluations
    ]
    facts = {one.name: {"digest": "0" * 64, **one.report["facts"]} for one in evaluations}
    summary = {
        "models": models_, "evaluations": facts,
        "gate": dict(report.facts) if verdict else None, "dataset": {"digest": "1" * 64, "test_rows": ROWS},
        "stages": [{"name": "ingest", "seconds": 1.5, "cached": False}], "flow_run_id": "f", "mlflow_run_id": None,
    }  # fmt: skip
    curve = Curve(
        "student", {"loss": [(1, 2.0), (2, 1.0)], "kd_loss": [(1, 1.0), (2, 0.5)], "ce_loss": [(1, 3.0), (2, 0.2)]}
    )
    picture = Picture("outliers: norms", "data:image/png;base64,AAAA")
    provenance = {"commit": "abc", "libraries": {"torch": "2"}}
    return write_report(directory, summary, ReportData(evaluations, [curve], [picture], verdict, provenance))


class Page(HTMLParser):
    """What a browser would load, the headings, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads, self.tags, self.text = list[str](), list[str](), ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("a") / "reports" / "brave-otter"
    return write(directory, {"teacher-base": 60, "teacher": 2, "student": 12, "Q8_0": 13})


def test_the_page_holds_everything_and_loads_nothing(run_a: Path) -> None:
    html = (run_a / "index.html").read_text()
    page = Page(html)
    assert all(one.startswith("data:image/png") for one in page.loads) and "url(" not in html and "@import" not in html
    assert "script" not in page.tags and EVIL in page.text  # answers are text, whatever they say
    for heading in ("Every model", "Size against quality", "Speed and perplexity", "Gate", "Losses", "Intents",
                    "Confusion", "Latency", "Where models disagree", "Data and outliers", "Provenance"):  # fmt: skip
        assert heading in page.text, heading
    assert "Run brave-otter, " in page.text
    assert "gate failed" in page.text and "80.0% instead of 96.7%" in page.text and "teacher → student" in page.text
    assert "kd loss" in page.text and "ce loss" in page.text
    assert "teacher and student: only one of them is right on 10 rows" in page.text
    assert page.tags.count("svg") == 1 + 1 + 3  # size, one loss curve, three models that people use
    assert "prefers-color-scheme: dark" in html and "What a JSON schema buys" not in page.text
    assert set(re.findall(r"var\((--\w+)\)", html)) <= set(re.findall(r"(--\w+): ", html)) | {"--share"}


def test_the_directory_keeps_predictions_and_the_summary(run_a: Path) -> None:
    assert sorted(path.name for path in (run_a / "predictions").iterdir()) == [
        "Q8_0.jsonl", "student.jsonl", "teacher-base.jsonl", "teacher.jsonl"]  # fmt: skip
    summary = json.loads((run_a / "summary.json").read_text())
    assert summary["gate"]["passed"] is False and summary["evaluations"]["student"]["exact_match"] == 0.8


def test_free_text_and_few_models_make_a_shorter_page(tmp_path: Path) -> None:
    page = Page((write(tmp_path / "text", {"student": 6}, text=True) / "index.html").read_text())
    assert "token F1" in page.text and "ROUGE-L" in page.text
    for heading in ("Gate", "Intents", "Confusion", "JSON valid", "Where models disagree"):
        assert heading not in page.text, heading


@pytest.mark.parametrize(
    ("gate", "word", "said"),
    [
        (StageError("student/scores.json is not there"), "gate failed", "could not be judged: student/scores.json"),
        (
            {"passed": True, "rules": 0, "broken": 0, "said": "nothing was checked: x"},
            "gate checked nothing",
            "checked: x",
        ),
    ],
)
def test_the_page_of_a_gate_that_judged_nothing(gate: Any, word: str, said: str, tmp_path: Path) -> None:
    one = evaluation("student", 3)
    facts = gate_facts(gate) if isinstance(gate, StageError) else gate
    summary = {
        "models": [{"name": "student", "stage": "student", "format": "bfloat16", "bytes": 1, "tokens_per_second": 1}],
        "evaluations": {"student": {"digest": "0" * 64, **one.report["facts"]}}, "gate": facts,
        "dataset": {"digest": "1" * 64}, "stages": [], "flow_run_id": "f", "mlflow_run_id": None,
    }  # fmt: skip
    directory = write_report(tmp_path / "run", summary, ReportData([one], [], [], None, None))
    page = Page((directory / "index.html").read_text())
    assert word in page.text and said in page.text and "Size against quality" in page.text
    assert (directory / "predictions/student.jsonl").is_file()


def test_a_failed_stage_can_be_kept_until_the_report_is_written() -> None:
    class Failed:
        name = "Failed"

        def result(self) -> None:
            raise StageError("scores.json is not there")

    run = Stages.__new__(Stages)
    run.records = []
    error = run.attempt("gate", lambda config, return_state: Failed(), "config")  # type: ignore[arg-type]
    assert isinstance(error, StageError) and run.records[0]["name"] == "gate"
    with pytest.raises(StageError, match="scores.json is not there"):
        require_passed(error)


def test_curves_are_the_losses_among_the_events(tmp_path: Path) -> None:
    events = [
        {"event": "log", "message": "x"},
        {"event": "metrics", "step": 1, "values": {"loss": 2.0, "kd_loss": 1.0, "learning_rate": 0.1}},
        {"event": "metrics", "step": 2, "values": {"loss": 9.0, "kd_loss": 0.7}},
        {"event": "metrics", "step": 2, "values": {"loss": 1.0, "train_loss": 5.0}},  # taken up again at step 2
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert read_curve("t", tmp_path / "events.jsonl").losses == {
        "loss": [(1, 2.0), (2, 1.0)],
        "kd_loss": [(1, 1.0), (2, 0.7)],
    }
    assert read_curve("t", tmp_path / "none").losses == {}


def ticks(svg: str, anchor: str) -> list[str]:
    """Labels of an axis: those of x are centred, those of y end at it."""
    labels = re.findall(rf"text-anchor: {anchor};[^>]*>([^<]+)<", svg)
    return [label for label in labels if re.fullmatch(r"[\d.e-]+", label)]


def test_axes_have_round_ticks() -> None:
    def x_ticks(*sizes: float) -> list[str]:
        return ticks(size_against_quality([Point("", size, 0.9, 0.8, 0.95, 0) for size in sizes], "q"), "middle")

    assert x_ticks(0.99, 11.3) == ["1", "2", "5", "10", "20"]
    assert x_ticks(1e-4, 10) == ["0.0001", "0.001", "0.01", "0.1", "1", "10", "100"]
    assert len(x_ticks(2.3, 2.9)) >= 3  # nothing round between them: there are ticks all the same
    curve = losses("s", {"loss": [(1, 9.0), (2, 2.0), (3, 0.3)]})
    assert ticks(curve, "middle") == ["0", "1", "2", "3"] and ticks(curve, "end") == ["0.5", "1", "2", "5"]
    assert losses("s", {"loss": [(1, 0.0), (2, 0.0)]}) == ""  # nothing that a logarithmic axis could show


def test_the_tables_have_the_scores_that_there_are(run_a: Path, tmp_path: Path) -> None:
    summary = json.loads((run_a / "summary.json").read_text())
    head, *rows = cells(summary)
    assert head == ["model", "format", "MB", "JSON valid", "intent", "exact match", "out-of-scope recall", "tokens/s"]
    assert rows[1][:2] == ["teacher", "bfloat16"] and rows[1][5] == "96.7 %"
    text = json.loads((write(tmp_path / "text", {"student": 6, "Q8_0": 60}, text=True) / "summary.json").read_text())
    head, *rows = cells(text)
    assert head[3:-1] == ["exact match", "token F1", "ROUGE-L"] and rows[0][3] == "90.0 %"


def test_labels_stay_inside_and_apart_and_counts_are_whole() -> None:
    points = [Point(f"model {i}", 2 + i / 100, 0.0, 0.0, 0.1, i) for i in range(6)]
    svg = size_against_quality(points, "exact match")
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>model', svg))
    assert len(heights) == 6 and min(b - a for a, b in pairwise(heights)) >= 12.9
    assert heights[0] > HEIGHT - TOP and heights[-1] < HEIGHT - BOTTOM
    assert ticks(histogram([1.0, 1.0, 5.0], 10, "ms", "t"), "end") == ["0", "1", "2"]


def test_charts_have_the_pages_colours_and_run_nothing() -> None:
    svg = size_against_quality([Point(f"{EVIL} $x$", 2, 0.5, 0.4, 0.6, 1)], f"{EVIL} $y$")
    assert "<script" not in svg and "$x$" in svg and "$y$" in svg  # nor is a name read as mathematics
    assert not re.search(r"#[0-9a-f]{6}|font-family|<style", svg)  # light and dark are the page's
    assert {"var(--c1)", "var(--muted)", "var(--line)", "var(--ink)"} <= set(re.findall(r"var\(--\w+\)", svg))


def compare(home: Path, *runs: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "STILLHOUSE_HOME": str(home), "COLUMNS": "160"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "flows.compare", *runs]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_two_runs_compare_by_name_by_path_and_by_mlflow_id(run_a: Path, tmp_path: Path) -> None:
    home = run_a.parents[1]
    run_b = write(home / "reports" / "calm-heron", {"teacher": 2, "student": 4, "Q4_0": 5})
    done = compare(home, "brave-otter", str(run_b))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "student" in line)
    assert [part in line for part in ("exact_match", "60", "80.0%", "93.3%", "+13.3", "8/0", "0.0078")] == [True] * 7
    assert "Q8_0" not in done.stdout and "Q4_0" not in done.stdout  # in one of them only
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.create_experiment("stillhouse", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(run_b), "report")
    again = compare(home, "brave-otter", run.info.run_id)
    assert again.returncode == 0, again.stderr
    assert "+13.3" in again.stdout and "8/0" in again.stdout


def test_what_cannot_be_compared_says_why(run_a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SystemExit, match="'no-such-run' is no directory with a summary.json"):
        main([str(run_a), "no-such-run"])
    with pytest.raises(SystemExit, match="usage"):
        main([str(run_a)])
    old = tmp_path / "old"
    old.mkdir()
    (old / "summary.json").write_text("{}")
    with pytest.raises(SystemExit, match="run the pipeline again"):
        main([str(run_a), str(old)])


@pytest.mark.parametrize("name", ["..", "../store", "/etc", "a/../..", "latest", "", "...", "x" * 300, "~", ".hidden"])
def test_whatever_a_run_is_called_its_report_lies_below_reports(name: str, tmp_path: Path) -> None:
    directory = report_directory(tmp_path, name, "0123-4567")
    assert directory.resolve().parent == tmp_path / "reports" and directory.name not in ("latest", "", "..")
    assert len(directory.name) <= 100 and not directory.name.startswith(".")
    assert report_directory(tmp_path, "brave-otter", "0").name == "brave-otter"
