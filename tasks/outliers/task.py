"""The outliers stage's task."""

from collections.abc import Mapping

from prefect import task

from tasks.core.refs import AnyModel, DatasetRef, ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import run_stage
from tasks.outliers import OutlierConfig


@task(name="find-outliers", **TASK_OPTIONS)
def find_outliers(
    config: OutlierConfig, models: Mapping[str, AnyModel], dataset: DatasetRef | None = None
) -> ReportRef:
    """Audits the weights of `models` and, with a dataset, their activations for what quantization would break."""
    return run_stage("outliers", config, {"models": models, "dataset": dataset}, ReportRef, "outliers")
