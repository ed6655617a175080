"""The page: tables and charts of one run, rendered from plain values into a single file."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from flows.report.charts import Point, histogram, losses, size_against_quality
from flows.report.report_data import Evaluation, ReportData, differences
from tasks.core.intervals import wilson
from tasks.core.metrics import METRICS, Visibility, primary_metric, titles
from tasks.core.metrics.measurements import PERPLEXITIES, SPEEDS
from tasks.core.plain_text import visible

GROUPS = ["base", "teacher", "direct", "student", "merged", "gguf"]
"""Stages of models, in the order of the charts' colours."""
CONSTRAINED = ("json_valid", "schema_valid", "exact_match")
"""Scores that are shown with and without decoding constrained to a schema."""


def render(name: str, summary: Mapping[str, Any], data: ReportData) -> str:
    """The page of the run `name` as HTML with nothing outside it."""
    template = (Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_visible)
    environment.filters |= {"percent": percent, "points": points, "p_value": p_value}
    by_name = {evaluation.name: evaluation for evaluation in data.evaluations}
    facts = summary["evaluations"].values()
    pairs = _compared_pairs(summary)
    return environment.from_string(template).render(
        name=name, when=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        summary=summary, data=data, by_name=by_name, gate_word=gate_word(summary["gate"]),
        scores=_columns(titles(Visibility.PAGE), [evaluation.estimates for evaluation in data.evaluations]),
        speeds=_columns({fact.name: fact.title for fact in SPEEDS}, facts),
        perplexities=_columns({fact.name: fact.title for fact in PERPLEXITIES}, facts),
        sizes=_sizes(summary, by_name),
        curves={curve.name: losses(curve.name, dict(curve.losses)) for curve in data.curves},
        latencies=_latencies(summary, by_name), intents=_intents(by_name), confusion=_confusion(by_name.get("student")),
        constrained=[evaluation for evaluation in data.evaluations if evaluation.scores.get("constrained")],
        constrained_scores={score: METRICS[score].title for score in CONSTRAINED},
        differences=[pair for a, b in pairs if (pair := differences(data.evaluations, a, b))],
        provenance=_provenance(summary, data),
    )  # fmt: skip


def _visible(value: Any) -> Any:
    """Text without control characters; what is markup already stays."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """A difference of fractions in points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def p_value(value: float) -> str:
    """A p value to two digits."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def gate_word(gate: Mapping[str, Any] | None) -> str:
    """The gate's result in a word or two, from its facts; empty without a gate."""
    if gate is None:
        return ""
    if not gate["passed"]:
        return "failed"
    return "passed" if gate["rules"] else "checked nothing"


def _columns(column_titles: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The titles of those values that any row has."""
    names = {name for row in rows for name in row}
    return {name: title for name, title in column_titles.items() if name in names}


def _compared_pairs(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of models whose disagreements are shown: those of the run's comparisons, or along the pipeline."""
    pairs = [(comparison["from"], comparison["to"]) for comparison in summary.get("comparisons", [])]
    files = [row["name"] for row in summary["models"] if row["stage"] == "gguf"]
    return list(dict.fromkeys(pairs)) or [("teacher", "student"), *(("student", name) for name in files)]


def _sizes(summary: Mapping[str, Any], by_name: Mapping[str, Evaluation]) -> str:
    """Every model but the bases, whose scores would hide the others' differences."""
    quality = primary_metric({name for evaluation in by_name.values() for name in evaluation.estimates})
    marks = []
    for row in summary["models"]:
        estimate = by_name[row["name"]].estimates.get(quality)
        if estimate is not None and row["stage"] != "base":
            interval = estimate["value"], estimate["low"], estimate["high"]
            marks.append(Point(row["name"], row["bytes"] / 1e6, *interval, GROUPS.index(row["stage"])))
    return size_against_quality(marks, METRICS[quality].title) if marks else ""


def _latencies(summary: Mapping[str, Any], by_name: Mapping[str, Evaluation]) -> dict[str, str]:
    """A histogram for each model that people will use, all from 0 to the slowest of its kind."""
    charts: dict[str, str] = {}
    for kinds in (("teacher", "student"), ("gguf",)):
        names = [row["name"] for row in summary["models"] if row["stage"] in kinds]
        latencies = {name: by_name[name].report["details"].get("latencies_ms") or [] for name in names}
        slowest = max((value for values in latencies.values() for value in values), default=0)
        charts |= {
            name: histogram(values, 1.05 * slowest, "ms for a whole answer, one row at a time", f"Latency of {name}")
            for name, values in latencies.items()
            if values
        }
    return charts


def _intents(by_name: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Each intent with the teacher's and the student's F1 and share of wholly right rows, the student's with limits."""
    student, teacher = by_name.get("student"), by_name.get("teacher")
    if student is None or not student.scores["intents"]:
        return []
    table = []
    for name, row in student.scores["intents"].items():
        exact = wilson(round(row["exact_match"] * row["rows"]), row["rows"])
        teacher_row = teacher.scores["intents"].get(name) if teacher else None
        table.append({"name": name, **row, "low": exact.low, "high": exact.high, "teacher": teacher_row})
    return table


def _confusion(student: Evaluation | None) -> dict[str, Any] | None:
    if student is None or not student.scores["confusion"]:
        return None
    rows = student.scores["confusion"]
    unexpected = sorted({predicted for counts in rows.values() for predicted in counts} - set(rows))
    columns = [*rows, *unexpected[:12]]
    top = max(max(counts.values()) for counts in rows.values())
    cells = [(name, [(counts.get(column, 0), name == column) for column in columns]) for name, counts in rows.items()]
    return {"columns": columns, "rows": cells, "top": top, "left_out": len(unexpected[12:])}


def _provenance(summary: Mapping[str, Any], data: ReportData) -> list[tuple[str, str]]:
    student = data.provenance or {}
    pairs: Sequence[tuple[str, Any]] = [
        ("flow run", summary["flow_run_id"]),
        ("MLflow run", summary["mlflow_run_id"]),
        ("dataset", summary["dataset"]["digest"]),
        ("commit", student.get("commit")),
        *((f"library {name}", version) for name, version in student.get("libraries", {}).items()),
        *((f"evaluation of {name}", facts["digest"]) for name, facts in summary["evaluations"].items()),
    ]
    return [(name, str(value)) for name, value in pairs if value]
