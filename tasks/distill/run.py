"""Distils a teacher into a student on a dataset's rows.

python -m tasks.distill.run config.json --student DIR[+ADAPTER] --teacher BASE+ADAPTER --dataset DIR --out DIR
    [--teacher-cache DIR] [--texts DIR]
python -m tasks.core.launch 2 tasks.distill.run config.json ...   (on two GPUs: process 0 runs the teacher, all train)
"""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.gradient_balance import GradientBalance
from tasks.distill.grid import GgufGrid, round_to_grid
from tasks.distill.on_policy import OnPolicy
from tasks.distill.teacher_targets import TeacherTargets, prepare_targets
from tasks.distill.teachers import CachedTeacher
from tasks.distill.vocabulary_trim import TrimmedVocabulary, trim
from tasks.engine.data.collator import Batch
from tasks.engine.data.tokenizers import load_tokenizer, require_same_tokens
from tasks.engine.distributed import ranks
from tasks.engine.losses.chunked import distillation
from tasks.engine.losses.loss_mix import Head, LossMix
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.memory.teacher_memory import ExtraMemory, cached_teacher, live_teacher
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training.inputs import fingerprint, read_splits
from tasks.engine.training.objective import Objective
from tasks.engine.training.resolve import resolve
from tasks.engine.training.results import save_results
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.train import train

WINDOW = 4  # steps among which rows are redistributed: all of one size, so that there is hardly any padding


def distil(
    config: DistillConfig,
    student: ModelDir,
    teacher: ModelDir,
    dataset: Path,
    out: Path,
    job: Job,
    texts: Path | None = None,
    teacher_cache: Path | None = None,
) -> Report:
    """Writes the student (full) or its adapter (lora) into `out`, with the course of both parts of its loss.

    `teacher_cache` is an output of tasks.distill.teacher_cache for this teacher; rows that it lacks go through the
    teacher now. `texts` are a user's own texts, whose most frequent pieces a smaller `vocabulary` keeps.
    """
    ranks.init_processes()
    report = Report()
    tokenizer, teacher_tokenizer = load_tokenizer(student, config.chat_template), load_tokenizer(teacher)
    require_same_tokens(teacher_tokenizer, tokenizer)
    if tokenizer.chat_template != teacher_tokenizer.chat_template:
        report.warnings.append("teacher and student have different chat templates; the student's is used for both")
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    run_fingerprint = fingerprint(config, dataset, student, teacher)
    with ranks.rank_zero_first():
        trimmed = trim(config, student, tokenizer, dataset, texts, report, job)
        targets = prepare_targets(
            config, teacher, dataset, tokenizer, rows, validation, teacher_cache, out, report, job
        )
    rows = targets.rows
    if trimmed is not None:
        restrict_teacher(targets, trimmed)
        student = trimmed.student
        rows, validation = trimmed.examples(rows), trimmed.examples(validation)
    required = {}
    if config.teacher_online and config.teacher_precision == "8bit":
        required["cuda_graphs"] = ("off", "an 8-bit teacher's products wait for the device")
    extra = teacher_memory(config, teacher, targets.teacher.head)
    config = resolve(config, config.method, student, rows, out, job, report, extra, required, lossless_only=True).config
    mix = LossMix(
        config.kd_weight, config.ce_weight, config.temperature, config.divergence, config.divergence_parameters
    )
    report.facts["divergence"], report.details["divergence"] = mix.divergence, mix.describe()
    balance = GradientBalance(mix, torch.device(pick_device())) if config.balance else None
    spec = TrainingSpec(
        build=lambda: trainable_model(config, config.method, student, pick_device()),
        examples=rows,
        validation=validation,
        objective=objective(targets, mix, balance, config.loss_chunk_mib << 20),
        config=config,
        job=job,
        fingerprint=run_fingerprint,
        weight_swap=(lambda model: GgufGrid(model, config, spec.steps)) if config.grid != "none" else None,
        prepare_batch=targets.teacher.prepare_batch,
        window=WINDOW,
        before_step=balance.update if balance else None,
    )
    model, history = train(spec)
    if config.on_policy_rounds:
        objective_of = partial(objective, balance=None, chunk_bytes=config.loss_chunk_mib << 20)
        on_policy = OnPolicy(config, spec, teacher, tokenizer, mix, objective_of)
        model, report.details["on_policy"] = on_policy.rounds(model)
    dtype = None
    if config.grid != "none":
        report.details["grid"] = round_to_grid(model, config)
        dtype = torch.float32  # d * q has up to 18 bits
    if ranks.rank() == 0:
        report = save_results(
            spec, model, history, config.method, student, out, report, "Distilling the student", dtype
        )
    ranks.end_processes()
    return report


def restrict_teacher(targets: TeacherTargets, trimmed: TrimmedVocabulary) -> None:
    """Cuts the cached teacher's head to the student's pieces. Raises BadConfig for a top k or a live teacher."""
    teacher = targets.teacher
    if not isinstance(teacher, CachedTeacher) or teacher.head is None:
        raise BadConfig(
            "a smaller vocabulary needs the teacher's hidden states: set teacher_online=false, and "
            "states_budget_gib above their size"
        )
    teacher.restrict(trimmed.head(teacher.head))


def teacher_memory(config: DistillConfig, teacher: ModelDir, head: Head | None) -> ExtraMemory:
    """Memory of the teacher, or of its cached targets, on the student's device."""
    if config.teacher_online:
        return live_teacher(teacher, config.teacher_precision)
    return cached_teacher(head.weight if head else None, head.weight.shape[1] if head else 3 * config.top_k)


def objective(targets: TeacherTargets, mix: LossMix, balance: GradientBalance | None, chunk_bytes: int) -> Objective:
    """Mean of the distillation loss over label tokens; both parts and their gradient norms are metrics."""

    def loss_sums(model: PreTrainedModel, batch: Batch) -> LossSums:
        hidden = hidden_states(model, batch)
        head = head_of(model)
        head = head._replace(weight=batch.get("head_weight", head.weight))
        teacher, teacher_head, label_weights, lse = targets.teacher.targets(batch)
        sums = distillation(
            hidden, head, batch["labels"], teacher, teacher_head, mix, chunk_bytes, label_weights,
            balance.part_weights if balance else None, batch.get("head_grad"), lse,
        )._asdict()  # fmt: skip
        return LossSums(sums.pop("loss"), sums)

    return Objective(loss_sums)


if __name__ == "__main__":
    command(distil)
