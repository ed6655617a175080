"""Audits any number of models for what quantization would break in them, side by side.

python -m flows.audit deployments/presets/audit.yaml

models ── take (each) ──┐
rows ──── ingest ───────┴── find outliers ── verdict per target, pictures, importance matrix
"""

from typing import Any, Self

from prefect import flow
from pydantic import ConfigDict, Field, model_validator
from rich.console import Console
from rich.table import Table

from flows.checks import require_revisions_of_models, require_separate_rows
from flows.config import files_by_split
from flows.flow_config import FlowConfig
from flows.stages import Stages
from flows.start import start
from flows.verdict import publish_verdict
from tasks.core.import_inputs import import_files, import_model
from tasks.core.refs import AnyModel, DatasetRef
from tasks.ingest import IngestConfig
from tasks.ingest.task import ingest
from tasks.outliers import OutlierConfig
from tasks.outliers.task import find_outliers


class AuditConfig(FlowConfig):
    """What quantization would break in any number of models. Without rows only their weights are audited."""

    model_config = ConfigDict(title="Audit")

    models: dict[str, str] = Field(min_length=1)
    """Models by a name of your choice: hub names or local directories. `focus` in `outliers` names the main one."""
    revision: dict[str, str] = {}
    """Hub revisions to pin, by hub name."""
    train: str | None = None
    """Rows like those the model will meet: activations are measured on a sample of them."""
    test: str | None = None
    """Held-out rows for the trials in float16, 8-bit activations and so on; else a part of `train` is held back."""
    ingest: IngestConfig = IngestConfig(allow_few_rows=True)
    outliers: OutlierConfig = OutlierConfig()

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        require_revisions_of_models(self.revision, self.models.values())
        require_separate_rows(self.train, test=self.test)
        return self

    def unused_groups(self) -> dict[str, str]:
        """The rows' settings without rows."""
        rows = self.train or self.test
        return {} if rows else {"ingest": "no rows are given; set train to rows like those the models will meet"}


@flow(name="stillhouse-audit", validate_parameters=True, persist_result=False)
def audit(config: AuditConfig) -> dict[str, Any]:
    """Audits every model: for every deployment target whether it is safe, the reasons, and what to do.

    Returns `targets` (rows of the verdict's table), `sentences`, and the directory of the report.
    """
    with Stages(config) as run:
        models: dict[str, AnyModel] = {
            name: run(f"import {name}", import_model, source, config.revision.get(source))
            for name, source in config.models.items()
        }
        dataset: DatasetRef | None = None
        files = files_by_split(train=config.train, test=config.test)
        if files:
            dataset = run("ingest", ingest, config.ingest, run("import data", import_files, files))
        return publish_verdict(run, run("outliers", find_outliers, config.outliers, models, dataset))


def show(summary: dict[str, Any]) -> None:
    """The verdict in the terminal."""
    table = Table(title="Safe to deploy?")
    for column in ("model", "target", "verdict", "because", "do"):
        table.add_column(column)
    for row in summary["targets"]:
        table.add_row(*(str(row[column]) for column in ("model", "target", "verdict", "because", "do")))
    Console(width=max(Console().width, 120)).print(table)
    print("\n".join(summary["sentences"]))
    print(f"Report:   {summary['report']}")


if __name__ == "__main__":
    start(audit, AuditConfig, show)
