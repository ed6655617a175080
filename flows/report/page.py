"""The page: tables and charts of one run, rendered from plain values into a single file."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment

from flows.report.charts import Point, histogram, losses, size_against_quality
from flows.report.gather import Evaluation, Gathered, differences
from tasks.core.intervals import wilson

TITLES = {
    "json_valid": "JSON valid", "schema_valid": "schema valid", "intent_accuracy": "intent",
    "intent_macro_f1": "intent macro-F1", "entity_f1": "entity F1", "exact_match": "exact match",
    "out_of_scope_recall": "out-of-scope recall", "out_of_scope_precision": "out-of-scope precision",
    "token_f1": "token F1", "rouge_l": "ROUGE-L", "metric": "own metric",
}  # fmt: skip
SPEEDS = {
    "first_token_ms": "first token, ms", "latency_p50_ms": "answer p50, ms", "latency_p90_ms": "p90, ms",
    "latency_p99_ms": "p99, ms", "alone_tokens_per_second": "tokens/s alone", "tokens_per_second": "tokens/s batched",
}  # fmt: skip
PERPLEXITIES = {"held_out_perplexity": "on expected answers", "general_perplexity": "on general text"}
GROUPS = ["base", "teacher", "direct", "student", "merged", "gguf"]


def render(name: str, summary: Mapping[str, Any], gathered: Gathered) -> str:
    """The page of the run `name` as HTML with nothing outside it."""
    template = (Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "points": points, "p_value": p_value}
    by_name = {one.name: one for one in gathered.evaluations}
    evaluations, facts = gathered.evaluations, summary["evaluations"]
    files = [row["name"] for row in summary["models"] if row["stage"] == "gguf"]
    pairs = [("teacher", "student"), *(("student", name) for name in files)]
    pairs = list(dict.fromkeys((one["from"], one["to"]) for one in summary.get("comparisons", []))) or pairs
    return environment.from_string(template).render(
        name=name, when=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
        summary=summary, gathered=gathered, by_name=by_name,
        scores=_columns(TITLES, [{**one.scores["rates"], **one.scores["means"]} for one in evaluations]),
        speeds=_columns(SPEEDS, facts.values()), perplexities=_columns(PERPLEXITIES, facts.values()),
        sizes=_sizes(summary, by_name),
        curves={one.name: losses(one.name, dict(one.losses)) for one in gathered.curves},
        latencies=_latencies(summary, by_name), intents=_intents(by_name), confusion=_confusion(by_name.get("student")),
        constrained=[one for one in evaluations if one.scores.get("constrained")],
        differences=[found for a, b in pairs if (found := differences(evaluations, a, b))],
        provenance=_provenance(summary, gathered),
    )  # fmt: skip


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for nothing."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def points(value: float) -> str:
    """A difference of fractions in points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def p_value(value: float) -> str:
    """A p value to two digits."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def _columns(titles: Mapping[str, str], rows: Any) -> dict[str, str]:
    """The titles of those values that any row has."""
    known = [set(row) for row in rows]
    return {name: title for name, title in titles.items() if any(name in row for row in known)}


def _quality(by_name: Mapping[str, Evaluation]) -> str:
    structured = any("json_valid" in one.scores["rates"] for one in by_name.values())
    return "exact_match" if structured else "token_f1"


def _sizes(summary: Mapping[str, Any], by_name: Mapping[str, Evaluation]) -> str:
    """Every model but the bases, whose scores would hide the others' differences."""
    quality, found = _quality(by_name), []
    for row in summary["models"]:
        one = by_name[row["name"]]
        value = {**one.scores["rates"], **one.scores["means"]}.get(quality)
        if value is not None and row["stage"] != "base":
            group = GROUPS.index(row["stage"])
            found.append(Point(row["name"], row["bytes"] / 1e6, value["value"], value["low"], value["high"], group))
    return size_against_quality(found, TITLES[quality]) if found else ""


def _latencies(summary: Mapping[str, Any], by_name: Mapping[str, Evaluation]) -> dict[str, str]:
    """A histogram for each model that people will use, all from 0 to the slowest of its kind."""
    found: dict[str, str] = {}
    for kinds in (("teacher", "student"), ("gguf",)):
        rows = [row for row in summary["models"] if row["stage"] in kinds]
        values = {row["name"]: by_name[row["name"]].report["details"].get("latencies_ms") or [] for row in rows}
        slowest = max((value for many in values.values() for value in many), default=0)
        found |= {
            name: histogram(many, 1.05 * slowest, "ms for a whole answer, one row at a time", f"Latency of {name}")
            for name, many in values.items()
            if many
        }
    return found


def _intents(by_name: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Each intent with the teacher's and the student's F1 and share of wholly right rows, the student's with limits."""
    student, teacher = by_name.get("student"), by_name.get("teacher")
    if student is None or not student.scores["intents"]:
        return []
    table = []
    for name, row in student.scores["intents"].items():
        exact = wilson(round(row["exact_match"] * row["rows"]), row["rows"])
        other = teacher.scores["intents"].get(name) if teacher else None
        table.append({"name": name, **row, "low": exact.low, "high": exact.high, "teacher": other})
    return table


def _confusion(student: Evaluation | None) -> dict[str, Any] | None:
    if student is None or not student.scores["confusion"]:
        return None
    rows = student.scores["confusion"]
    others = sorted({given for counts in rows.values() for given in counts} - set(rows))
    columns = [*rows, *others[:12]]
    top = max(max(counts.values()) for counts in rows.values())
    cells = [(name, [(counts.get(column, 0), name == column) for column in columns]) for name, counts in rows.items()]
    return {"columns": columns, "rows": cells, "top": top, "left_out": len(others[12:])}


def _provenance(summary: Mapping[str, Any], gathered: Gathered) -> list[tuple[str, str]]:
    made = gathered.provenance or {}
    pairs: Sequence[tuple[str, Any]] = [
        ("flow run", summary["flow_run_id"]),
        ("MLflow run", summary["mlflow_run_id"]),
        ("dataset", summary["dataset"]["digest"]),
        ("commit", made.get("commit")),
        *((f"library {name}", version) for name, version in made.get("libraries", {}).items()),
        *((f"evaluation of {name}", facts["digest"]) for name, facts in summary["evaluations"].items()),
    ]
    return [(name, str(value)) for name, value in pairs if value]
