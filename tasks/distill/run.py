"""Distils a teacher into a student on a dataset's rows.

python -m tasks.distill.run config.json --student DIR --teacher BASE+ADAPTER --dataset DIR --out DIR
"""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.states import TeacherStates, teacher_loss, teacher_states
from tasks.engine.batches import Batch, micro_batch
from tasks.engine.chat import Example
from tasks.engine.head import check_head, head_of, hidden_states
from tasks.engine.load import load_model, load_tokenizer, pick_device, pick_dtype
from tasks.engine.losses import Mix, distillation
from tasks.engine.outcome import fingerprint, finish, read_splits
from tasks.engine.plan import Plan
from tasks.engine.tokenizers import require_same_tokens
from tasks.engine.trainable import trainable_model
from tasks.engine.trainer import train


def distil(config: DistillConfig, student: ModelDir, teacher: ModelDir, dataset: Path, out: Path, job: Job) -> Report:
    """Writes the student (full) or its adapter (lora) into `out`, and how both parts of the loss went."""
    report = Report()
    tokenizer, teachers = load_tokenizer(student, config.chat_template), load_tokenizer(teacher)
    require_same_tokens(teachers, tokenizer)
    if tokenizer.chat_template != teachers.chat_template:
        report.warnings.append("teacher and student have different chat templates; the student's is used for both")
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    made_by = fingerprint(config, dataset, student, teacher)
    states = _ask_teacher(config, teacher, [*rows, *validation], made_by, job)
    chunk = config.loss_chunk_mib << 20
    own = {"teacher_train_loss": teacher_loss(states, rows, 0, chunk)}
    if validation:
        own["teacher_validation_loss"] = teacher_loss(states, validation, len(rows), chunk)
    report.metrics |= own
    report.facts |= {name: round(value, 4) for name, value in own.items()}
    mix = Mix(config.kd_weight, config.ce_weight, config.temperature, config.divergence, config.jsd_beta)

    def objective(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        hidden = hidden_states(model, batch["input_ids"], batch["positions"])
        known = states.of(batch["rows"], hidden.device)
        return distillation(hidden, head_of(model), batch["labels"], known, states.head, mix, chunk)._asdict()

    plan = Plan(
        build=lambda: trainable_model(config, config.method, student, pick_device()),
        examples=rows,
        validation=validation,
        objective=objective,
        config=config,
        job=job,
        made_by=made_by,
    )
    model, history = train(plan)
    return finish(plan, model, history, config.method, student, out, report, title="Distilling the student")


def _ask_teacher(
    config: DistillConfig, teacher: ModelDir, examples: list[Example], made_by: str, job: Job
) -> TeacherStates:
    device = pick_device()
    model = load_model(teacher, config.precision, device)
    check_head(model)
    size = micro_batch(config.batch_size, config.batch_size, job.rung)
    return teacher_states(model, examples, size, pick_dtype(config.precision, device), made_by, job)


if __name__ == "__main__":
    command(distil)
