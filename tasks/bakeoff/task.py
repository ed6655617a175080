"""The bake-off stage's task."""

from prefect import task

from tasks.bakeoff import BakeoffConfig
from tasks.core.refs import DatasetRef, ModelRef, ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import run_stage


@task(name="bake", **TASK_OPTIONS)
def bake(config: BakeoffConfig, model: ModelRef, dataset: DatasetRef, outliers: ReportRef | None = None) -> ReportRef:
    """Measures one quantization method on a model; a method that cannot run is a row that says why."""
    inputs = {"model": model, "dataset": dataset, "outliers": outliers}
    return run_stage("bakeoff", config, inputs, ReportRef, f"bake {config.method} {config.dtype}")
