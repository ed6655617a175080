"""Teacher targets, cached or live; drops or down-weights the rows that the teacher gets wrong."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.core.command import Report
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.teacher_cache.cache_files import TeacherCache
from tasks.distill.teacher_cache.load_teacher import load_teacher
from tasks.distill.teacher_cache.row_numbers import row_numbers
from tasks.distill.teacher_cache.teacher_accuracy import (
    Measured,
    TeacherAccuracy,
    measure_accuracy,
    require_accuracy,
    write_accuracy_report,
)
from tasks.distill.teachers import CachedTeacher, LiveTeacher, fill_cache
from tasks.engine.data.chat_template import Example

MAX_ACCURACY_ROWS = 1000


class TeacherTargets(NamedTuple):
    """The training rows, and the teacher that gives the loss its targets for them and for the validation rows."""

    rows: list[Example]
    teacher: CachedTeacher | LiveTeacher


def prepare_targets(
    config: DistillConfig,
    teacher: ModelDir,
    dataset: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Example],
    validation: list[Example],
    cache_path: Path | None,
    out: Path,
    report: Report,
    job: Job,
) -> TeacherTargets:
    """Completes the teacher's cache and measures its accuracy; raises GateFailed below the config's limits.

    With `teacher_online` accuracy is measured on the validation rows, or on a sample of training rows without any.
    """
    splits = {"train": rows, "validation": validation}
    if config.teacher_online:
        job.log("the teacher stays in memory: nothing is cached, and its accuracy on the training rows is not measured")
        sample = rows[:: -(-len(rows) // MAX_ACCURACY_ROWS)]
        splits = {"validation": validation} if validation else {"train": sample}
    measured = [example for examples in splits.values() for example in examples]
    cache = fill_cache(config.teacher_cache, teacher, measured, cache_path, job.work / "teacher-cache", job)
    accuracies = {split: measure_accuracy(cache, examples) for split, examples in splits.items() if examples}
    _report(accuracies, splits, dataset, tokenizer, cache, out, report, job)
    split, name = ("validation", "validation") if validation else ("train", "training")
    require_accuracy(name, accuracies[split], config.min_teacher_accuracy, config.max_teacher_loss)
    if config.teacher_online:
        if config.wrong_row_weight != 1:
            report.warnings.append("wrong_row_weight is not used: teacher_online measures no accuracy on training rows")
        return TeacherTargets(rows, LiveTeacher(load_teacher(teacher, config.teacher_cache)))
    wrong, weight = set(accuracies["train"].wrong), config.wrong_row_weight
    if weight == 0 and wrong:
        rows = [example for row, example in enumerate(rows) if row not in wrong]
        report.warnings.append(f"{len(wrong)} training rows that the teacher gets wrong are left out")
        if not rows:
            raise BadData("the teacher gets every training row wrong: set wrong_row_weight above 0, or train it longer")
    cached_teacher = CachedTeacher(cache, [*rows, *validation], config.temperature)
    if 0 < weight < 1:
        row_weights = [weight if row in wrong else 1.0 for row in range(len(rows))]
        cached_teacher.row_weights = row_weights + [1.0] * len(validation)
    return TeacherTargets(rows, cached_teacher)


def _report(
    accuracies: dict[str, TeacherAccuracy], splits: dict[str, list[Example]], dataset: Path,
    tokenizer: PreTrainedTokenizerBase, cache: TeacherCache, out: Path, report: Report, job: Job,
) -> None:  # fmt: skip
    """Puts the teacher's accuracy into the report, its pages and the log."""
    measured: dict[str, Measured] = {}
    for split, accuracy in accuracies.items():
        numbers = row_numbers(dataset / f"{split}.jsonl", tokenizer, splits[split])
        measured[split] = (accuracy, splits[split], numbers)
        metrics = {f"teacher_{split}_loss": accuracy.loss, f"teacher_{split}_accuracy": accuracy.accuracy}
        report.metrics |= metrics
        report.facts |= {name: round(value, 4) for name, value in metrics.items()}
        wrong = ", ".join(str(numbers[row]) for row in accuracy.wrong[:8])
        job.log(
            f"the teacher gets {len(accuracy.wrong)} of {len(accuracy.mistakes)} {split} rows wrong"
            + (f", rows {wrong} first" if wrong else "")
        )
    write_accuracy_report(out, measured, cache, tokenizer)
