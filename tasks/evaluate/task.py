"""The evaluate stage's task."""

from prefect import task

from tasks.core.refs import AnyModel, DatasetRef, FilesRef, GgufRef, ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import run_stage
from tasks.evaluate import EvaluateConfig


@task(name="evaluate", task_run_name="evaluate {label}", **TASK_OPTIONS)
def evaluate(
    config: EvaluateConfig,
    model: AnyModel,
    dataset: DatasetRef,
    label: str,
    gguf: GgufRef | None = None,
    text: FilesRef | None = None,
) -> ReportRef:
    """Scores of `model`, or of its GGUF file in llama.cpp, on the held-out rows; `text` is for the perplexity."""
    inputs = {"model": model, "dataset": dataset, "gguf": gguf, "text": text}
    return run_stage("evaluate", config, inputs, ReportRef, f"evaluate {label}")
