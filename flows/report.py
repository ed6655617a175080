"""What a run ends with: `summary.json`, a page with pictures, a table in the terminal, Prefect's artifacts."""

import html
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.runtime import flow_run
from rich.console import Console
from rich.table import Table

from flows.stages import Stages
from tasks.core.refs import DatasetRef, ReportRef
from tasks.core.shell import AnyRef
from tasks.core.store import open_store

RATES = ["json_valid", "intent_accuracy", "exact_match", "out_of_scope_recall"]
STAGE_OF = {"teacher-base": "base", "student-base": "base", "teacher": "teacher", "direct": "direct",
            "student": "student", "merged": "merged"}  # fmt: skip


def publish(
    run: Stages, dataset: DatasetRef, scores: dict[str, ReportRef], shown: Mapping[str, AnyRef]
) -> dict[str, Any]:
    """Writes `<home>/reports/<flow run>/`, logs it to MLflow and Prefect, and returns the summary.

    `summary.json` is a contract: `models` (rates as fractions, bytes, tokens per second), `dataset`, `stages`
    (name, seconds, cached), `flow_run_id`, `mlflow_run_id`. `shown` are the artifacts whose pictures the page has.
    """
    rows = [_row(name, ref) for name, ref in scores.items()]
    summary: dict[str, Any] = {
        "models": rows,
        "dataset": {"digest": dataset.digest, **dataset.facts},
        "stages": run.records,
        "flow_run_id": run.flow_run_id,
        "mlflow_run_id": run.mlflow.run_id,
    }
    directory = run.settings.root / "reports" / str(flow_run.get_name())
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    pictures = _pictures(run, directory, shown)
    (directory / "summary.json").write_text(json.dumps(summary, indent=1))
    page = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.j2").read_text())
    (directory / "index.html").write_text(page.render(summary=summary, rates=RATES, pictures=pictures))
    run.mlflow.artifacts(directory, "report")
    rates = {f"{row['name']}/{rate}": row[rate] for row in rows for rate in RATES if row[rate] is not None}
    run.mlflow.metrics(0, rates)
    create_table_artifact(rows, key="models", description="Every model on the held-out rows")
    create_markdown_artifact(_markdown(summary, directory), key="report", description="What this run made")
    _point_latest(directory)
    return summary | {"report": str(directory), "mlflow_link": run.tracker.link(run.mlflow)}


def _row(name: str, ref: ReportRef) -> dict[str, Any]:
    facts = ref.facts
    return {
        "name": name,
        "stage": STAGE_OF.get(name, "gguf"),
        "format": facts["format"],
        "bytes": facts["bytes"],
        **{rate: facts.get(rate) for rate in RATES},
        "tokens_per_second": facts["tokens_per_second"],
    }


def _pictures(run: Stages, directory: Path, shown: Mapping[str, AnyRef]) -> list[str]:
    """Copies the stages' pictures beside the page; returns their names."""
    store, found = open_store(run.settings.store_uri), []
    for name, ref in shown.items():
        fetched = store.fetch(ref.digest, run.settings.root / "inputs" / ref.digest)
        for picture in sorted(fetched.glob("report/*.png")):
            found.append(f"{name}-{picture.name}")
            shutil.copy(picture, directory / found[-1])
    return found


def _markdown(summary: dict[str, Any], directory: Path) -> str:
    lines = ["| model | format | MB | " + " | ".join(RATES) + " | tokens/s |", "|---" * (len(RATES) + 4) + "|"]
    for row in summary["models"]:
        lines.append("| " + " | ".join([row["name"], *_cells(row)]) + " |")
    return "\n".join(lines) + f"\n\nThe page with pictures: `{html.escape(str(directory))}/index.html`"


def _cells(row: dict[str, Any]) -> list[str]:
    rates = ["-" if row[rate] is None else f"{100 * row[rate]:.1f} %" for rate in RATES]
    return [row["format"], f"{row['bytes'] / 1e6:.2f}", *rates, f"{row['tokens_per_second']:.0f}"]


def _point_latest(directory: Path) -> None:
    latest = directory.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(directory.name)


def show(summary: dict[str, Any]) -> None:
    """The table in the terminal, and the lines that open Prefect and MLflow on this run."""
    table = Table(title="Every model on the held-out rows")
    for column in ["model", "format", "MB", "JSON valid", "intent", "exact match", "out-of-scope recall", "tokens/s"]:
        table.add_column(column, justify="left" if column in ("model", "format") else "right")
    for row in summary["models"]:
        table.add_row(row["name"], *_cells(row))
    Console(width=max(Console().width, 110)).print(table)  # into a file or a narrow window it must not be cut
    made = sum(not stage["cached"] for stage in summary["stages"])
    seconds = sum(stage["seconds"] for stage in summary["stages"])
    print(f"{made} stages run, {len(summary['stages']) - made} from the cache, {seconds:.0f} s")
    print(f"Report:   {summary['report']}/index.html")
    server = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    open_prefect = f"{server or 'http://127.0.0.1:4200'}/runs/flow-run/{summary['flow_run_id']}"
    print(f"Prefect:  {'' if server else 'make prefect-ui   then open '}{open_prefect}")
    remote = os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")
    print(
        f"MLflow:   {'' if remote else 'make mlflow-ui    then open '}{summary['mlflow_link'] or 'was not reachable'}"
    )
