"""The distill stage's task."""

from prefect import task

from tasks.core.refs import AdapterRef, AnyModel, DatasetRef, ModelRef
from tasks.core.retry import TASK
from tasks.core.shell import Input, run_stage
from tasks.distill import DistillConfig


@task(name="distil", **TASK)
def distil(config: DistillConfig, student: ModelRef, teacher: AnyModel, dataset: DatasetRef) -> AnyModel:
    """`student` taught by `teacher` on the dataset: an adapter, or a whole model with `method: full`."""
    inputs: dict[str, Input] = {"student": student, "teacher": teacher, "dataset": dataset}
    if config.method == "full":
        return run_stage("distill", config, inputs, ModelRef, "student")
    return run_stage("distill", config, inputs, AdapterRef, "student", base=student)
