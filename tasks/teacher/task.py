"""The teacher stage's task; it also fine-tunes the student directly, for comparison."""

from prefect import task

from tasks.core.refs import AdapterRef, AnyModel, DatasetRef, ModelRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import Input, run_stage
from tasks.teacher import FineTuneConfig


@task(name="fine-tune", task_run_name="fine-tune {label}", **TASK_OPTIONS)
def fine_tune(config: FineTuneConfig, base: AnyModel, dataset: DatasetRef, label: str = "teacher") -> AnyModel:
    """`base` fine-tuned on the dataset: an adapter, or a whole model with `method: full`.

    An adapter as `base` is trained on, and what comes out adapts the same model.
    """
    inputs: dict[str, Input] = {"base": base, "dataset": dataset}
    if config.method == "full":
        return run_stage("teacher", config, inputs, ModelRef, label)
    adapted = base.base if isinstance(base, AdapterRef) else base
    return run_stage("teacher", config, inputs, AdapterRef, label, base=adapted)
