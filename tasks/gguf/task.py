"""The Prefect task of the GGUF stage."""

from prefect import task

from tasks.core.refs import DatasetRef, GgufRef, ModelRef, ReportRef
from tasks.core.retry import TASK_OPTIONS
from tasks.core.shell import run_stage
from tasks.engine.runtimes.ggml_types import FLOATS
from tasks.gguf import GgufConfig


@task(name="convert", task_run_name="convert {config.kind}", **TASK_OPTIONS)
def convert(
    config: GgufConfig,
    model: ModelRef,
    dataset: DatasetRef | None,
    outliers: ReportRef | None = None,
) -> GgufRef:
    """Converts `model` to one GGUF and proves it; `outliers` has the importance matrix and the sensitive tensors."""
    inputs = {"model": model, "dataset": dataset, "outliers": None if config.kind in FLOATS else outliers}
    return run_stage("gguf", config, inputs, GgufRef, f"gguf {config.kind}")
