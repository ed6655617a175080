"""The bake-off stage's task."""

from prefect import task

from tasks.bakeoff import BakeoffConfig
from tasks.core.refs import DatasetRef, ModelRef, ReportRef
from tasks.core.retry import TASK
from tasks.core.shell import run_stage


@task(name="bake", **TASK)
def bake(config: BakeoffConfig, model: ModelRef, dataset: DatasetRef, outliers: ReportRef | None = None) -> ReportRef:
    """What one quantization method makes of a model; a missing library is a row that says so."""
    inputs = {"model": model, "dataset": dataset, "outliers": outliers}
    return run_stage("bakeoff", config, inputs, ReportRef, f"bake {config.method} {config.dtype}")
