"""The distill stage's task; the teacher cache is a task of its own (tasks.distill.teacher_cache.task)."""

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
    teacher_cache: ReportRef | None = None,
    texts: FilesRef | None = None,
) -> AnyModel:
    """`student` distilled from `teacher` on the dataset: an adapter, or a whole model with `method: full`.

    Without a `teacher_cache` the stage runs the teacher itself, for this run alone. `texts` rank the pieces of a
    smaller `vocabulary`.
    """
    inputs: dict[str, Input] = {"student": student, "teacher": teacher, "dataset": dataset}
    inputs["teacher_cache"] = teacher_cache
    if config.vocabulary is not None:
        inputs["texts"] = texts
    if config.method == "full":
        return run_stage("distill", config, inputs, ModelRef, "student")
    base = student.base if isinstance(student, AdapterRef) else student
    return run_stage("distill", config, inputs, AdapterRef, "student", base=base)
