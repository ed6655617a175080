"""The GGUF stage's task."""

from prefect import task

from tasks.core.refs import DatasetRef, GgufRef, ModelRef
from tasks.core.retry import TASK
from tasks.core.shell import run_stage
from tasks.gguf import GgufConfig


@task(name="convert", task_run_name="convert {config.kind}", **TASK)
def convert(config: GgufConfig, model: ModelRef, dataset: DatasetRef, source: GgufRef | None = None) -> GgufRef:
    """One GGUF file of `model`, proven in llama.cpp; `source` is its BF16 file, to quantize from."""
    quantized = config.kind not in ("F32", "F16", "BF16")
    inputs = {"model": model, "dataset": dataset, "source": source if quantized else None}
    return run_stage("gguf", config, inputs, GgufRef, f"gguf {config.kind}")
