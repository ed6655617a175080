"""The distill stage's task; the teacher's states are a task of their own (tasks.distill.teacher_cache.task)."""

from prefect import task

from tasks.core.refs import AdapterRef, AnyModel, DatasetRef, FilesRef, ModelRef, ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import Input, run_stage
from tasks.distill import DistillConfig


@task(name="distil", **TASK_OPTIONS)
def distil(
    config: DistillConfig,
    student: AnyModel,
    teacher: AnyModel,
    dataset: DatasetRef,
    states: ReportRef | None = None,
    texts: FilesRef | None = None,
) -> AnyModel:
    """`student` taught by `teacher` on the dataset: an adapter, or a whole model with `method: full`.

    `states` are what `remember` kept of the teacher; without them it is asked by the way, for this run alone. `texts`
    decide with the rows what a smaller `vocabulary` keeps.
    """
    inputs: dict[str, Input] = {"student": student, "teacher": teacher, "dataset": dataset, "states": states}
    if config.vocabulary is not None:
        inputs["texts"] = texts
    if config.method == "full":
        return run_stage("distill", config, inputs, ModelRef, "student")
    base = student.base if isinstance(student, AdapterRef) else student
    return run_stage("distill", config, inputs, AdapterRef, "student", base=base)
