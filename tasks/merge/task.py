"""The merge stage's task."""

from prefect import task

from tasks.core.refs import AnyModel, DatasetRef, ModelRef
from tasks.core.retry import TASK
from tasks.core.shell import run_stage
from tasks.merge import MergeConfig


@task(name="merge", **TASK)
def merge(config: MergeConfig, model: AnyModel, dataset: DatasetRef) -> ModelRef:
    """The adapter merged into its base, shown to answer as the adapter does."""
    return run_stage("merge", config, {"model": model, "dataset": dataset}, ModelRef, "merge")
