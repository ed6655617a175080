"""Writes what a run ends with: `<home>/reports/<flow run>/` with the page, and the same in MLflow and Prefect."""

import html
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from flows.report.gather import Evaluation, Gathered, gather
from flows.report.page import render
from flows.report.terminal import RATES, cells
from flows.stages import Stages
from tasks.core.refs import DatasetRef, ReportRef
from tasks.core.refs import Ref

STAGE_OF = {"teacher-base": "base", "student-base": "base", "teacher": "teacher", "direct": "direct",
            "student": "student", "merged": "merged"}  # fmt: skip


def publish(
    run: Stages,
    dataset: DatasetRef,
    scores: dict[str, ReportRef],
    shown: Mapping[str, Ref],
    gate: ReportRef | None = None,
    kinds: Mapping[str, str] = STAGE_OF,
    more: Mapping[str, Any] | None = None,
    delivered: Mapping[str, Ref] | None = None,
) -> dict[str, Any]:
    """Writes the report's directory, logs it to MLflow and Prefect, and returns the summary.

    `summary.json` is a contract: `models` (rates as fractions, bytes, tokens per second), `evaluations` (all facts by
    name), `gate`, `dataset`, `stages` (name, seconds, cached), `artifacts` (digests by name of what is `delivered`,
    for `flows.fetch`), `flow_run_id`, `mlflow_run_id`. Beside it lie `index.html`, which needs no other file, and
    `predictions/<model>.jsonl`, which `flows.compare` reads. `shown` are
    the artifacts whose pictures and loss curves the page has; `kinds` says which of the page's colours a model has (a
    GGUF file's where it says nothing); `more` is put into the summary (`comparisons`: see `flows.ablation`).
    """
    rows = [_row(name, ref, kinds.get(name, "gguf")) for name, ref in scores.items()]
    summary: dict[str, Any] = {
        "models": rows,
        "evaluations": {name: {"digest": ref.digest, **ref.facts} for name, ref in scores.items()},
        "gate": dict(gate.facts) if gate is not None else None,
        "dataset": {"digest": dataset.digest, **dataset.facts},
        "warnings": run.warnings,
        "stages": run.records,
        "artifacts": {name: ref.digest for name, ref in (delivered or {}).items()},
        "flow_run_id": run.flow_run_id,
        "mlflow_run_id": run.mlflow.run_id,
        **(more or {}),
    }
    gathered = gather(run.settings, scores, shown, gate)
    directory = write_report(run.report, summary, gathered)
    run.mlflow.artifacts(directory, "report")
    rates = {f"{row['name']}/{rate}": row[rate] for row in rows for rate in RATES if row[rate] is not None}
    run.mlflow.metrics(0, rates)
    mlflow_link = run.tracker.link(run.mlflow)
    create_table_artifact(rows, key="models", description="Every model on the held-out rows")
    create_markdown_artifact(_markdown(summary, directory), key="report", description="What this run made")
    page = f"{mlflow_link}/artifacts/report/index.html" if mlflow_link else (directory / "index.html").as_uri()
    create_link_artifact(page, link_text="The report page", key="report-page")
    _point_latest(directory)
    get_run_logger().info("report: %s", directory / "index.html")  # a gate that fails now shows no table
    return summary | {"report": str(directory), "mlflow_link": mlflow_link}


def write_report(directory: Path, summary: dict[str, Any], gathered: Gathered) -> Path:
    """The report's directory, made anew: summary.json, index.html, predictions/."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "predictions").mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1))
    for evaluation in gathered.evaluations:
        _write_predictions(evaluation, directory / "predictions" / f"{evaluation.name}.jsonl")
    (directory / "index.html").write_text(render(directory.name, summary, gathered), encoding="utf-8")
    return directory


def _write_predictions(evaluation: Evaluation, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions)


def _row(name: str, ref: ReportRef, kind: str) -> dict[str, Any]:
    facts = ref.facts
    return {
        "name": name,
        "stage": kind,
        "format": facts["format"],
        "bytes": facts["bytes"],
        **{rate: facts.get(rate) for rate in RATES},
        "tokens_per_second": facts["tokens_per_second"],
    }


def _markdown(summary: dict[str, Any], directory: Path) -> str:
    head, *rows = ("| " + " | ".join(row) + " |" for row in cells(summary))
    lines = [head, "|---" * head.count(" | ") + "|---|", *rows]
    if summary["gate"]:
        verdict = "passed" if summary["gate"]["passed"] else "failed"
        lines += ["", f"Gate {verdict}: {html.escape(str(summary['gate']['said']))}"]
    return "\n".join(lines) + f"\n\nThe page: `{html.escape(str(directory))}/index.html`"


def _point_latest(directory: Path) -> None:
    latest, new = directory.parent / "latest", directory.parent / f".latest-{directory.name}"
    new.unlink(missing_ok=True)
    new.symlink_to(directory.name)
    new.replace(latest)  # at once: another run may end now too
