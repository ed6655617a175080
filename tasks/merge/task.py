"""The merge stage's task."""

from prefect import task

from tasks.core.refs import AnyModel, DatasetRef, ModelRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import run_stage
from tasks.merge import MergeConfig


@task(name="merge", **TASK_OPTIONS)
def merge(config: MergeConfig, model: AnyModel, dataset: DatasetRef) -> ModelRef:
    """Merges the adapter into its base and compares the merged model with the unmerged one."""
    return run_stage("merge", config, {"model": model, "dataset": dataset}, ModelRef, "merge")
