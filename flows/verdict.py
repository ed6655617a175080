"""Publishes the outliers audit's verdict: a Prefect table and page, and its report's files in the run's directory."""

import json
import shutil
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.stages import Stages
from tasks.core.inputs import fetch_input
from tasks.core.refs import ReportRef


def verdict_table(run: Stages, outliers: ReportRef) -> dict[str, Any]:
    """Makes the Prefect table `verdict`; returns the stage's `details` (`targets`, `verdict`, `table`)."""
    directory = fetch_input(run.settings, outliers.digest)
    details: dict[str, Any] = json.loads((directory / "report.json").read_text())["details"]
    create_table_artifact(details["targets"], key="verdict", description="Safe to deploy? Because of what, what to do")
    return details


def publish_verdict(run: Stages, outliers: ReportRef) -> dict[str, Any]:
    """Makes the table and the page as Prefect artifacts, and copies the files to `<home>/reports/<flow run>/`."""
    details = verdict_table(run, outliers)
    source = fetch_input(run.settings, outliers.digest) / "report"
    directory = shutil.copytree(source, run.report, dirs_exist_ok=True)
    create_markdown_artifact((source / "outliers.md").read_text(), key="outliers", description="The audit of outliers")
    run.mlflow.artifacts(directory, "report")
    return {
        "targets": details["targets"],
        "sentences": details["verdict"],
        "report": str(directory),
        "stages": run.records,
        "flow_run_id": run.flow_run_id,
        "mlflow_run_id": run.mlflow.run_id,
    }
