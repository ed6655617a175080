"""Fine-tunes a base model, or an earlier adapter of it, on a dataset's rows, with cross-entropy on the answers.

python -m tasks.teacher.run config.json --base DIR[+ADAPTER] --dataset DIR --out DIR
torchrun --standalone --nproc-per-node 2 -m tasks.teacher.run config.json --base DIR --dataset DIR --out DIR
"""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.ladder import is_lossless, rungs, settings_at
from tasks.core.refs import ModelDir
from tasks.engine import processes
from tasks.engine.batches import Batch
from tasks.engine.chat import Example
from tasks.engine.head import head_of, hidden_states
from tasks.engine.load import load_tokenizer, pick_device, training_precision
from tasks.engine.losses import cross_entropy
from tasks.engine.memory.fit import MemoryPlan, card_gib, fit
from tasks.engine.outcome import fingerprint, finish, read_splits
from tasks.engine.plan import Plan
from tasks.engine.trainable import settings_of_adapter, trainable_model
from tasks.engine.trainer import train
from tasks.teacher import FineTuneConfig

LOSSY = ("rank", "alpha", "use_dora", "target_modules", "max_length")


def fine_tune(config: FineTuneConfig, base: ModelDir, dataset: Path, out: Path, job: Job) -> Report:
    """Writes an adapter of `base` (lora, qlora) or a whole model (full) into `out`, and how the loss went."""
    processes.join()
    report = Report()
    asked, device = config, pick_device()
    config = config.model_copy(update={"precision": training_precision(config.precision, base.base, device)})
    for text in settings_of_adapter(config, base) if config.method != "full" else []:
        report.warnings.append(text)
    tokenizer = load_tokenizer(base, config.chat_template)
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    config, memory = _fitted(config, base, rows, out, job)
    if job.rung:
        fitted, config = config, settings_at(config, job.rung)
        _tell_rung(fitted, job)
        if config.max_length != fitted.max_length:
            rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)

    def objective(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        hidden = hidden_states(model, batch)
        return {"loss": cross_entropy(hidden, head_of(model), batch["labels"], config.loss_chunk_mib << 20)}

    same_model = asked.model_copy(update={name: getattr(config, name) for name in LOSSY})
    plan = Plan(
        build=lambda: trainable_model(config, config.method, base, device),
        examples=rows,
        validation=validation,
        objective=objective,
        config=config,
        job=job,
        made_by=fingerprint(same_model, dataset, base),
        rung=0,
        strategy=config.strategy,
    )
    model, history = train(plan)
    if processes.rank() == 0:
        report = finish(plan, model, history, config.method, base, out, report, title="Fine-tuning the teacher")
        if memory:
            report.details["memory_plan"] = {"predicted_gib": round(memory.chosen.parts.peak, 2), "file": "memory_plan"}
    processes.leave()
    return report


def _fitted(
    config: FineTuneConfig, base: ModelDir, rows: list[Example], out: Path, job: Job
) -> tuple[FineTuneConfig, MemoryPlan | None]:
    """The settings that fit the device's memory, told and written; the config's own without a plan."""
    gib = card_gib() if config.memory_gib == "auto" else None if config.memory_gib == "off" else config.memory_gib
    gib = processes.agree(gib)  # the cards may differ by a few MiB, the settings may not
    if gib is None:
        return config, None
    lengths = [len(row.input_ids) for row in rows]
    labels = sum(len(row.answer_ids) for row in rows) / sum(lengths)
    config, plan = fit(config, config.method, base, lengths, labels, gib, processes.count())
    job.log(f"memory plan: {plan.chosen.say()}, of {gib:.1f}")
    plan.write(out)
    return config, plan


def _tell_rung(config: FineTuneConfig, job: Job) -> None:
    """What the rungs so far gave up, in the log and as tags of the run."""
    for number, (text, _) in zip(range(1, job.rung + 1), rungs(config), strict=False):
        job.tags(**{f"rung.{number}": text})
    goes_on = "goes on from the last checkpoint" if is_lossless(config, job.rung) else "another model: begins anew"
    job.log(f"{job.rung} rungs down after out-of-memory errors: {text}; {goes_on}", "warning")


if __name__ == "__main__":
    command(fine_tune)
