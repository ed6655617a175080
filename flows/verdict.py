"""The outliers stage's verdict for people: a Prefect table, and its report's files beside the run's own."""

import json
import shutil
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.stages import Stages
from tasks.core.inputs import fetched
from tasks.core.refs import ReportRef


def verdict_table(run: Stages, outliers: ReportRef) -> dict[str, Any]:
    """Makes the Prefect table `verdict`; returns the stage's `details` (`targets`, `verdict`, `table`)."""
    found = fetched(run.settings, outliers.digest)
    details: dict[str, Any] = json.loads((found / "report.json").read_text())["details"]
    create_table_artifact(details["targets"], key="verdict", description="Safe to deploy? Because of what, what to do")
    return details


def publish_verdict(run: Stages, outliers: ReportRef) -> dict[str, Any]:
    """The table, the page as a Prefect artifact, and the report's files in `<home>/reports/<flow run>/`."""
    details = verdict_table(run, outliers)
    source = fetched(run.settings, outliers.digest) / "report"
    directory = shutil.copytree(source, run.report, dirs_exist_ok=True)
    create_markdown_artifact((source / "outliers.md").read_text(), key="outliers", description="What was found")
    run.mlflow.artifacts(directory, "report")
    return {
        "targets": details["targets"],
        "sentences": details["verdict"],
        "report": str(directory),
        "stages": run.records,
        "flow_run_id": run.flow_run_id,
        "mlflow_run_id": run.mlflow.run_id,
    }
