"""The table of metrics: a new one is one object, and everything that lists metrics follows it.

python -m tests.evaluate.test_metrics       writes the table of docs/evaluation.md
"""

import json
import subprocess
import sys
from pathlib import Path

from tasks.core.metrics import METRICS
from tasks.evaluate.aggregates import AGGREGATES

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "evaluation.md"
START, END = "<!-- metrics: python -m tests.evaluate.test_metrics -->\n", "<!-- /metrics -->"

DUMMY = """
import json, re, sys
from pathlib import Path
from tasks.core.metrics import METRICS, AnsweredRow, Metric, Visibility, observe

METRICS["short"] = Metric(
    name="short", title="short enough", description="answers of at most 40 characters", aggregate="rate",
    observe=lambda row: len(row.answer) <= 40, paired=True, visibility=Visibility.SUMMARY,
)

from prefect.utilities.callables import parameter_schema
from flows.compare import compare_runs
from flows.pipeline import pipeline
from flows.report.publish import write_report
from flows.report.report_data import Evaluation, ReportData
from flows.report.terminal import cells
from tasks.core.job import Job
from tasks.core.metrics import titles
from tasks.core.refs import ModelDir
from tasks.evaluate.outputs import report, write_outputs
from tasks.evaluate.measurements import Measurements
from tasks.evaluate.generation import Generation
from tasks.evaluate.scores import score
from tasks.gate import GateConfig
from tasks.gate.run import gate
from tests.evaluate.test_metrics import long_answers

home = Path(sys.argv[1])


def evaluation(name, long):
    out = home / name
    out.mkdir()
    predictions = long_answers(long)
    scores = score(predictions, "out_of_scope") | {"perplexity": {}, "parameters": {}}
    measurements = Measurements(Generation([], 1, 1.0), [], [], None, None, {}, {})
    stage_report = report(scores, measurements, 1000, "bfloat16").model_dump()
    write_outputs(out, predictions, scores, None, 0)
    (out / "report.json").write_text(json.dumps(stage_report))
    return Evaluation(name, json.loads((out / "scores.json").read_text()), stage_report, predictions)


evaluations = [evaluation("teacher", 1), evaluation("student", 6)]
config = GateConfig(check="short", student_points=2, floors={"short": 0.9})
(home / "gate").mkdir()
directories = {one.name: ModelDir(home / one.name) for one in evaluations}
gated = gate(config, directories, home / "gate", Job(home / "work"))
rows = [
    {"name": one.name, "stage": one.name, **{key: one.report["facts"].get(key) for key in
     ("format", "bytes", *titles(Visibility.SUMMARY), "tokens_per_second")}} for one in evaluations
]
summary = {
    "models": rows, "evaluations": {one.name: {"digest": "0", **one.report["facts"]} for one in evaluations},
    "gate": gated.facts, "dataset": {"digest": "1"}, "warnings": [], "stages": [], "flow_run_id": "f",
    "mlflow_run_id": None,
}
outcome = json.loads((home / "gate/gate.json").read_text())
page = write_report(home / "run", summary, ReportData(evaluations, [], [], outcome, None)) / "index.html"
[comparison] = [one for one in compare_runs(home / "run", home / "run") if one.model == "student"]
form = parameter_schema(pipeline.fn).definitions["GateConfig"]["properties"]
print(json.dumps({
    "choices": form["check"]["enum"],
    "floors": form["floors"]["propertyNames"]["enum"],
    "prediction": json.loads((home / "student/predictions.jsonl").read_text().splitlines()[0])["short"],
    "score": evaluations[1].scores["rates"]["short"]["value"],
    "mlflow": evaluations[1].report["metrics"]["short"],
    "terminal": cells(summary),
    "page": page.read_text(),
    "compared": [paired.check for paired in comparison.paired],
    "rules": {rule["name"]: rule["said"] for rule in outcome["rules"]},
    "slices": outcome["transfer"]["teacher -> student"][0]["check"],
}))
"""


def long_answers(count: int) -> list[dict[str, object]]:
    """Forty rows of predictions.jsonl, of which the first `count` have a long answer."""
    from tasks.core.metrics import AnsweredRow, observe

    rows = []
    for number in range(40):
        answer = json.dumps({"intent": "close", "note": "x" * (50 if number < count else 1)})
        observations = observe(AnsweredRow(f"question {number}", answer, answer))
        rows.append({"row": number, "prompt": f"question {number}", "expected": "{}", "answer": answer, **observations})
    return rows


def test_one_object_is_a_metric_everywhere(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DUMMY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "short" in seen["choices"] and "auto" in seen["choices"] and "short" in seen["floors"]
    assert seen["prediction"] is False and seen["score"] == seen["mlflow"] == 34 / 40
    assert [row[seen["terminal"][0].index("short enough")] for row in seen["terminal"][1:]] == ["97.5 %", "85.0 %"]
    assert "<th>short enough</th>" in seen["page"] and "short 85.0% instead of 97.5%" in seen["page"]
    assert "short" in seen["compared"] and seen["slices"] == "short"
    assert "short 85.0%, at least 90.0% is wanted" in seen["rules"]["student reaches short"]
    assert "0 better, 5 worse" in seen["rules"]["student no worse than teacher"]


def test_metrics_that_share_a_field_share_what_they_observe() -> None:
    observers: dict[str, object] = {}
    for metric in METRICS.values():
        assert observers.setdefault(metric.field, metric.observe) is metric.observe, metric.name
        assert metric.aggregate in AGGREGATES


def test_the_table_is_light_for_flows_and_configs() -> None:
    heavy = ["numpy", "torch", "json_repair", "rapidfuzz", "jsonschema", "matplotlib"]
    code = f"import tasks.core.metrics, tasks.gate, sys; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def table() -> str:
    """The metrics as the documentation's table."""
    lines = ["| score | is the share or mean of | interval | compared row by row |", "|---|---|---|---|"]
    for metric in METRICS.values():
        interval = "Wilson" if "rate" in metric.aggregate else "bootstrap"
        lines.append(f"| `{metric.name}` | {metric.description} | {interval} | {'yes' if metric.paired else ''} |")
    return "\n".join(lines) + "\n"


def test_the_documentation_has_every_metric() -> None:
    text = DOCUMENT.read_text()
    documented = text[text.index(START) + len(START) : text.index(END)]
    assert documented == table(), "run python -m tests.evaluate.test_metrics"


if __name__ == "__main__":
    document = DOCUMENT.read_text()
    before, after = document[: document.index(START) + len(START)], document[document.index(END) :]
    DOCUMENT.write_text(before + table() + after)
