"""The GGUF stage's task."""

from prefect import task

from tasks.core.refs import DatasetRef, GgufRef, ModelRef, ReportRef
from tasks.core.retry import TASK
from tasks.core.shell import run_stage
from tasks.gguf import GgufConfig


@task(name="convert", task_run_name="convert {config.kind}", **TASK)
def convert(
    config: GgufConfig,
    model: ModelRef,
    dataset: DatasetRef | None,
    outliers: ReportRef | None = None,
) -> GgufRef:
    """One GGUF file of `model`, proven in llama.cpp; `outliers` is the audit whose importance matrix weighs the
    rounding, and whose verdict names sensitive tensors."""
    floats = config.kind in ("F32", "F16", "BF16")
    inputs = {"model": model, "dataset": dataset, "outliers": None if floats else outliers}
    return run_stage("gguf", config, inputs, GgufRef, f"gguf {config.kind}")
