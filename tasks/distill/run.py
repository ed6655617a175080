"""Distils a teacher into a student on a dataset's rows.

python -m tasks.distill.run config.json --student DIR[+ADAPTER] --teacher BASE+ADAPTER --dataset DIR --out DIR
    [--states DIR] [--texts DIR]
python -m tasks.core.launch 2 tasks.distill.run config.json ...   (on two GPUs: process 0 runs the teacher, all train)
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.gradient_balance import Balance
from tasks.distill.grid import Grid, settle
from tasks.distill.on_policy import OnPolicy
from tasks.distill.teacher_targets import Lessons, prepare
from tasks.distill.teachers import Remembered
from tasks.distill.vocabulary_trim import trim
from tasks.engine.data.collator import Batch
from tasks.engine.data.tokenizers import load_tokenizer, require_same_tokens
from tasks.engine.distributed import ranks
from tasks.engine.losses.chunked import distillation
from tasks.engine.losses.loss_mix import Head, LossMix
from tasks.engine.memory.fit import plan_memory
from tasks.engine.memory.teacher_memory import ExtraMemory, cached_teacher, live_teacher
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training.loop import train
from tasks.engine.training.results import fingerprint, finish, read_splits
from tasks.engine.training.spec import Objective, TrainingSpec

WINDOW = 4  # steps that deal their rows anew: all of one size, so that hardly anything is filled up


def distil(
    config: DistillConfig,
    student: ModelDir,
    teacher: ModelDir,
    dataset: Path,
    out: Path,
    job: Job,
    texts: Path | None = None,
    states: Path | None = None,
) -> Report:
    """Writes the student (full) or its adapter (lora) into `out`, and how both parts of the loss went.

    `states` are what `remember` kept of this teacher; rows that they lack are asked of the teacher now. `texts` are a
    user's own texts, whose most frequent pieces a smaller `vocabulary` keeps.
    """
    ranks.init_processes()
    report = Report()
    tokenizer, teachers = load_tokenizer(student, config.chat_template), load_tokenizer(teacher)
    require_same_tokens(teachers, tokenizer)
    if tokenizer.chat_template != teachers.chat_template:
        report.warnings.append("teacher and student have different chat templates; the student's is used for both")
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    made_by = fingerprint(config, dataset, student, teacher)
    with ranks.rank_zero_first():
        trimmed = trim(config, student, tokenizer, dataset, texts, report, job)
        lessons = prepare(config, teacher, dataset, tokenizer, rows, validation, states, out, report, job)
    rows = lessons.rows
    if trimmed is not None:
        if lessons.taught.head is None or config.teacher_online:
            raise BadConfig("a smaller vocabulary needs the teacher's states whole: set teacher_online=false, and "
                            "states_budget_gib above their size")  # fmt: skip
        student = trimmed.student
        cast(Remembered, lessons.taught).restrict(trimmed.head(lessons.taught.head))
        rows, validation = trimmed.examples(rows), trimmed.examples(validation)
    config, memory = plan_memory(
        config, config.method, student, rows, out, job, beside(config, teacher, lessons.taught.head)
    )
    chunk = config.loss_chunk_mib << 20

    def loss_of(lessons: Lessons, mix: LossMix, balance: Balance | None = None) -> Objective:
        return objective(lessons, mix, balance, chunk)

    mix = LossMix(
        config.kd_weight, config.ce_weight, config.temperature, config.divergence, config.divergence_parameters
    )
    balance = Balance(mix, torch.device(pick_device())) if config.balance else None
    if config.teacher_online and config.teacher_precision == "8bit":  # its products wait for the device
        config = config.model_copy(update={"cuda_graphs": "off"})
    plan = TrainingSpec(
        build=lambda: trainable_model(config, config.method, student, pick_device()),
        examples=rows,
        validation=validation,
        objective=loss_of(lessons, mix, balance),
        config=config,
        job=job,
        made_by=made_by,
        shown=(lambda model: Grid(model, config, plan.steps)) if config.grid != "none" else None,
        enrich=lessons.taught.enrich,
        window=WINDOW,
        before_step=balance.follow if balance else None,
    )
    model, history = train(plan)
    if config.on_policy_rounds:
        on_policy = OnPolicy(config, plan, teacher, tokenizer, mix, loss_of)
        model, report.details["on_policy"] = on_policy.rounds(model)
    dtype = None
    if config.grid != "none":
        report.details["grid"] = settle(model, config)
        dtype = torch.float32  # d * q has up to 18 bits
    if ranks.rank() == 0:
        report = finish(plan, model, history, config.method, student, out, report, "Distilling the student", dtype)
        if memory:
            report.details["memory_plan"] = memory.told()
    ranks.end_processes()
    return report


def beside(config: DistillConfig, teacher: ModelDir, head: Head | None) -> ExtraMemory:
    """What of the teacher lies on the device beside the student."""
    if config.teacher_online:
        return live_teacher(teacher, config.teacher_precision)
    return cached_teacher(head.weight if head else None, head.weight.shape[1] if head else 3 * config.top_k)


def objective(lessons: Lessons, mix: LossMix, balance: Balance | None, chunk_bytes: int) -> Objective:
    """The loss of a batch: all of `tasks.engine.losses.Losses` by name."""

    def losses(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        hidden = hidden_states(model, batch)
        known, head, weights, lse = lessons.taught.known(batch)
        parts, into, own = balance.parts if balance else None, batch.get("head_grad"), head_of(model)
        own = own._replace(weight=batch.get("head_weight", own.weight))
        return distillation(
            hidden, own, batch["labels"], known, head, mix, chunk_bytes, weights, parts, into, lse
        )._asdict()

    return losses


if __name__ == "__main__":
    command(distil)
