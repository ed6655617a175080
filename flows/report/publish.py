"""Writes what a run ends with: `<home>/reports/<flow run>/` with the page, and the same in MLflow and Prefect."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from flows.report.page import gate_word, render
from flows.report.report_data import Evaluation, ReportData, read_report_data
from flows.report.terminal import cells
from flows.stages import Stages
from tasks.core.errors import StageError
from tasks.core.metrics import Visibility, titles
from tasks.core.plain_text import markdown
from tasks.core.refs import DatasetRef, Ref, ReportRef

STAGE_OF = {"teacher-base": "base", "student-base": "base", "teacher": "teacher", "direct": "direct",
            "student": "student", "merged": "merged"}  # fmt: skip


def publish(
    run: Stages,
    dataset: DatasetRef,
    scores: dict[str, ReportRef],
    illustrated: Mapping[str, Ref],
    gate: ReportRef | StageError | None = None,
    kinds: Mapping[str, str] = STAGE_OF,
    extra: Mapping[str, Any] | None = None,
    delivered: Mapping[str, Ref] | None = None,
) -> dict[str, Any]:
    """Writes the report's directory, logs it to MLflow and Prefect, and returns the summary.

    `summary.json` is a contract: `models` (rates as fractions, bytes, tokens per second), `evaluations` (all facts by
    name), `gate`, `dataset`, `stages` (name, seconds, cached), `artifacts` (digests by name of what is `delivered`,
    for `flows.fetch`), `flow_run_id`, `mlflow_run_id`. Beside it lie `index.html`, which needs no other file, and
    `predictions/<model>.jsonl`, which `flows.compare` reads.

    The page has pictures and loss curves of the `illustrated` artifacts. `gate` is the gate's report, or the error of
    a gate stage that failed. `kinds` gives a model's colour on the page (default: that of GGUF files); `extra` is
    added to the summary (`comparisons`: see `flows.ablation`).
    """
    rows = [_row(name, ref, kinds.get(name, "gguf")) for name, ref in scores.items()]
    summary: dict[str, Any] = {
        "models": rows,
        "evaluations": {name: {"digest": ref.digest, **ref.facts} for name, ref in scores.items()},
        "gate": gate_facts(gate),
        "dataset": {"digest": dataset.digest, **dataset.facts},
        "warnings": run.warnings,
        "stages": run.records,
        "artifacts": {name: ref.digest for name, ref in (delivered or {}).items()},
        "flow_run_id": run.flow_run_id,
        "mlflow_run_id": run.mlflow.run_id,
        **(extra or {}),
    }
    gate_report = None if isinstance(gate, StageError) else gate
    data = read_report_data(run.settings, scores, illustrated, gate_report)
    directory = write_report(run.report, summary, data)
    run.mlflow.artifacts(directory, "report")
    main_scores = titles(Visibility.SUMMARY)
    run.mlflow.metrics(
        0, {f"{row['name']}/{score}": row[score] for row in rows for score in main_scores if row[score] is not None}
    )
    mlflow_link = run.tracker.link(run.mlflow)
    create_table_artifact(rows, key="models", description="Every model on the held-out rows")
    create_markdown_artifact(_markdown(summary, directory), key="report", description="What this run made")
    page = f"{mlflow_link}/artifacts/report/index.html" if mlflow_link else (directory / "index.html").as_uri()
    create_link_artifact(page, link_text="The report page", key="report-page")
    _point_latest(directory)
    get_run_logger().info("report: %s", directory / "index.html")  # a gate that fails after this prints no table
    return summary | {"report": str(directory), "mlflow_link": mlflow_link}


def gate_facts(gate: ReportRef | StageError | None) -> dict[str, Any] | None:
    """The gate's facts for summary.json; of a gate stage that failed, its error."""
    if isinstance(gate, StageError):
        return {"passed": False, "rules": 0, "broken": 0, "said": f"could not be judged: {gate}"}
    return dict(gate.facts) if gate is not None else None


def write_report(directory: Path, summary: dict[str, Any], data: ReportData) -> Path:
    """Writes the report's directory anew: summary.json, index.html, predictions/."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "predictions").mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1))
    for evaluation in data.evaluations:
        _write_predictions(evaluation, directory / "predictions" / f"{evaluation.name}.jsonl")
    (directory / "index.html").write_text(render(directory.name, summary, data), encoding="utf-8")
    return directory


def _write_predictions(evaluation: Evaluation, path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a pair stays JSON's escape
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.predictions)


def _row(name: str, ref: ReportRef, kind: str) -> dict[str, Any]:
    facts = ref.facts
    return {
        "name": name,
        "stage": kind,
        "format": facts["format"],
        "bytes": facts["bytes"],
        **{score: facts.get(score) for score in titles(Visibility.SUMMARY)},
        "tokens_per_second": facts["tokens_per_second"],
    }


def _markdown(summary: dict[str, Any], directory: Path) -> str:
    head, *rows = ("| " + " | ".join(map(markdown, row)) + " |" for row in cells(summary))
    lines = [head, "|---" * head.count(" | ") + "|---|", *rows]
    if summary["gate"]:
        lines += ["", f"Gate {gate_word(summary['gate'])}: {markdown(summary['gate']['said'])}"]
    return "\n".join(lines) + f"\n\nThe page: {markdown(directory / 'index.html')}"


def _point_latest(directory: Path) -> None:
    latest, new = directory.parent / "latest", directory.parent / f".latest-{directory.name}"
    new.unlink(missing_ok=True)
    new.symlink_to(directory.name)
    new.replace(latest)  # atomic: another run may end at the same time
