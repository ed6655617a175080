"""Fine-tunes a base model, or an earlier adapter of it, on a dataset's rows, with cross-entropy on the answers.

python -m tasks.teacher.run config.json --base DIR[+ADAPTER] --dataset DIR --out DIR
python -m tasks.core.launch 2 tasks.teacher.run config.json ...         (on two GPUs)
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.memory_fallback import is_lossless, rungs, settings_at
from tasks.core.refs import ModelDir
from tasks.engine.data.collator import Batch
from tasks.engine.distributed import ranks
from tasks.engine.losses import cross_entropy
from tasks.engine.memory.fit import fitted
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.models.load import load_tokenizer, pick_device, training_precision
from tasks.engine.models.load_adapter import settings_of_adapter
from tasks.engine.models.trainable import trainable_model
from tasks.engine.speed.fp8.matmul import unsupported_reason
from tasks.engine.training.loop import train
from tasks.engine.training.results import fingerprint, finish, read_splits
from tasks.engine.training.spec import Objective, Plan
from tasks.teacher import FineTuneConfig

OF_ADAPTER = {"rank", "alpha", "use_dora", "target_modules"}
LOSSY = (*sorted(OF_ADAPTER), "max_length")


def fine_tune(config: FineTuneConfig, base: ModelDir, dataset: Path, out: Path, job: Job) -> Report:
    """Writes an adapter of `base` (lora, qlora) or a whole model (full) into `out`, and how the loss went."""
    ranks.join()
    report = Report()
    asked, device = config, pick_device()
    config = config.model_copy(update={"precision": training_precision(config.precision, base.base, device)})
    if config.fp8:
        _check_fp8(config, device)
    for text in settings_of_adapter(config, base) if config.method != "full" else []:
        report.warnings.append(text)
    tokenizer = load_tokenizer(base, config.chat_template)
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    config, memory = fitted(config, config.method, base, rows, out, job)
    if job.rung:
        before, config = config, settings_at(config, job.rung)
        _check_rung(before, base, job)
        _tell_rung(before, job)
        if config.max_length != before.max_length:
            rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)

    same_model = asked.model_copy(update={name: getattr(config, name) for name in LOSSY})
    plan = Plan(
        build=lambda: trainable_model(config, config.method, base, device),
        examples=rows,
        validation=validation,
        objective=objective(config.loss_chunk_mib << 20),
        config=config,
        job=job,
        made_by=fingerprint(same_model, dataset, base),
        rung=0,
        strategy=config.strategy,
        fp8=config.fp8,
    )
    model, history = train(plan)
    if ranks.rank() == 0:
        report = finish(plan, model, history, config.method, base, out, report, title="Fine-tuning the teacher")
        if memory:
            report.details["memory_plan"] = memory.told()
    ranks.leave()
    return report


def objective(chunk_bytes: int) -> Objective:
    """Cross-entropy on a batch's labels, logits in chunks of so many bytes."""

    def losses(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        hidden, head = hidden_states(model, batch), head_of(model)
        head = head._replace(weight=batch.get("head_weight", head.weight))
        return {"loss": cross_entropy(hidden, head, batch["labels"], chunk_bytes, batch.get("head_grad"))}

    return losses


def _check_fp8(config: FineTuneConfig, device: str) -> None:
    """Raises BadConfig where the MLPs' weights cannot be multiplied in 8 bits."""
    if config.method != "lora" or config.use_dora or config.dropout or config.precision != "bfloat16":
        raise BadConfig("fp8=true is for method=lora in bfloat16, without use_dora and dropout; set fp8=false")
    reason = unsupported_reason(torch.device(device))
    if reason:
        raise BadConfig(f"fp8=true: {reason}; set fp8=false")


def _check_rung(config: FineTuneConfig, base: ModelDir, job: Job) -> None:
    """Raises BadConfig for a rung that gives up what an earlier adapter decides: nothing would change."""
    before, now = (settings_at(config, rung).model_dump() for rung in (job.rung - 1, job.rung))
    changed = {name for name in now if now[name] != before[name]}
    if base.adapter is not None and config.method != "full" and changed <= OF_ADAPTER:
        raise BadConfig(
            f"out of memory, and {job.rung - 1} rungs down nothing is left to give up: an earlier adapter keeps its "
            f"rank and modules. Set a smaller max_length (now {now['max_length']}), or train a new adapter"
        )


def _tell_rung(config: FineTuneConfig, job: Job) -> None:
    """What the rungs so far gave up, in the log and as tags of the run."""
    for number, (text, _) in zip(range(1, job.rung + 1), rungs(config), strict=False):
        job.tags(**{f"rung.{number}": text})
    goes_on = "goes on from the last checkpoint" if is_lossless(config, job.rung) else "another model: begins anew"
    job.log(f"{job.rung} rungs down after out-of-memory errors: {text}; {goes_on}", "warning")


if __name__ == "__main__":
    command(fine_tune)
