"""Fine-tunes a base model, or an earlier adapter of it, on a dataset's rows, with cross-entropy on the answers.

python -m tasks.teacher.run config.json --base DIR[+ADAPTER] --dataset DIR --out DIR
python -m tasks.core.launch 2 tasks.teacher.run config.json ...         (on two GPUs)
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.data.collator import Batch
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.distributed import ranks
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training.acceleration import fp8_problem
from tasks.engine.training.inputs import fingerprint, read_splits
from tasks.engine.training.objective import Objective
from tasks.engine.training.resolve import LOSSY_FIELDS, resolve
from tasks.engine.training.results import save_results
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.train import train
from tasks.teacher import FineTuneConfig


def fine_tune(config: FineTuneConfig, base: ModelDir, dataset: Path, out: Path, job: Job) -> Report:
    """Writes an adapter of `base` (lora, qlora) or a whole model (full) into `out`, and reports its losses."""
    ranks.init_processes()
    report = Report()
    tokenizer = load_tokenizer(base, config.chat_template)
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    settings = resolve(config, config.method, base, rows, out, job, report).config
    if settings.fp8:
        _check_fp8(settings)
    if settings.max_length != config.max_length:
        rows, validation = read_splits(tokenizer, dataset, settings.max_length, report, job)
    same_model = config.model_copy(update={name: getattr(settings, name) for name in LOSSY_FIELDS})
    spec = TrainingSpec(
        build=lambda: trainable_model(settings, settings.method, base, pick_device()),
        examples=rows,
        validation=validation,
        objective=objective(settings.loss_chunk_mib << 20),
        config=settings,
        job=job,
        fingerprint=fingerprint(same_model, dataset, base),
        strategy=settings.strategy,
        fp8=settings.fp8,
    )
    model, history = train(spec)
    if ranks.rank() == 0:
        report = save_results(spec, model, history, settings.method, base, out, report, "Fine-tuning the teacher")
    ranks.end_processes()
    return report


def objective(chunk_bytes: int) -> Objective:
    """Mean cross-entropy of the label tokens, logits in chunks of at most `chunk_bytes`."""

    def loss_sums(model: PreTrainedModel, batch: Batch) -> LossSums:
        hidden, head = hidden_states(model, batch), head_of(model)
        head = head._replace(weight=batch.get("head_weight", head.weight))
        return LossSums(cross_entropy(hidden, head, batch["labels"], chunk_bytes, batch.get("head_grad")))

    return Objective(loss_sums)


def _check_fp8(config: FineTuneConfig) -> None:
    """Raises BadConfig where the MLPs' weights cannot be multiplied in 8 bits."""
    if config.method != "lora" or config.use_dora or config.dropout or config.precision != "bfloat16":
        raise BadConfig("fp8=true is for method=lora in bfloat16, without use_dora and dropout; set fp8=false")
    problem = fp8_problem(torch.device(pick_device()))
    if problem:
        raise BadConfig(f"fp8=true: {problem}; set fp8=false")


if __name__ == "__main__":
    command(fine_tune)
