"""What the student is taught: the teacher asked (or put beside it) and examined, its wrong rows left out or weighed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.core.command import Report
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.teacher_cache.hidden_states import States
from tasks.distill.teacher_cache.load_teacher import load_teacher
from tasks.distill.teacher_cache.row_numbers import row_numbers
from tasks.distill.teacher_cache.teacher_accuracy import Exam, examine, gate, write_exam
from tasks.distill.teachers import Online, Remembered, remembered
from tasks.engine.data.chat_template import Example

MOST_EXAMINED_ONLINE = 1000


class Lessons(NamedTuple):
    """The training rows that are taught, and where the loss gets the teacher from (rows and validation numbered on)."""

    rows: list[Example]
    taught: Remembered | Online


def prepare(
    config: DistillConfig,
    teacher: ModelDir,
    dataset: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Example],
    validation: list[Example],
    given: Path | None,
    out: Path,
    report: Report,
    job: Job,
) -> Lessons:
    """Asks and examines the teacher; raises GateFailed below the config's bar.

    With `teacher_online` the exam is of the validation rows, or of some training rows where there are none.
    """
    splits = {"train": rows, "validation": validation}
    if config.teacher_online:
        job.log("the teacher stays in memory: no states are kept, and its training rows are not examined")
        few = rows[:: -(-len(rows) // MOST_EXAMINED_ONLINE)]
        splits = {"validation": validation} if validation else {"train": few}
    asked = [example for examples in splits.values() for example in examples]
    states = remembered(config.states, teacher, asked, given, job.work / "states", job)
    exams = {split: examine(states, examples) for split, examples in splits.items() if examples}
    _tell(exams, splits, dataset, tokenizer, states, out, report, job)
    gate(*("validation", exams["validation"]) if "validation" in exams else ("training", exams["train"]),
         config.min_teacher_accuracy, config.max_teacher_loss)  # fmt: skip
    if config.teacher_online:
        if config.wrong_row_weight != 1:
            report.warnings.append("wrong_row_weight is not used: teacher_online examines no training rows")
        return Lessons(rows, Online(load_teacher(teacher, config.states)))
    wrong, weight = set(exams["train"].wrong), config.wrong_row_weight
    if weight == 0 and wrong:
        rows = [example for row, example in enumerate(rows) if row not in wrong]
        report.warnings.append(f"{len(wrong)} training rows that the teacher gets wrong are left out")
        if not rows:
            raise BadData("the teacher gets every training row wrong: set wrong_row_weight above 0, or train it longer")
    taught = Remembered(states, [*rows, *validation], config.temperature)
    if 0 < weight < 1:
        taught.weights = [weight if row in wrong else 1.0 for row in range(len(rows))] + [1.0] * len(validation)
    return Lessons(rows, taught)


def _tell(
    exams: dict[str, Exam], splits: dict[str, list[Example]], dataset: Path, tokenizer: PreTrainedTokenizerBase,
    states: States, out: Path, report: Report, job: Job,
) -> None:  # fmt: skip
    """The exams' numbers and pages; a warning for validation rows that the teacher gets wrong."""
    told: dict[str, tuple[Exam, Sequence[Example], Sequence[int]]] = {}
    for split, exam in exams.items():
        numbers = row_numbers(dataset / f"{split}.jsonl", tokenizer, splits[split])
        told[split] = (exam, splits[split], numbers)
        own = {f"teacher_{split}_loss": exam.loss, f"teacher_{split}_accuracy": exam.accuracy}
        report.metrics |= own
        report.facts |= {name: round(value, 4) for name, value in own.items()}
        job.log(
            f"the teacher gets {len(exam.wrong)} of {len(exam.mistakes)} {split} rows wrong"
            + (f", rows {', '.join(str(numbers[row]) for row in exam.wrong[:8])} first" if exam.wrong else "")
        )
    write_exam(out, told, states, tokenizer)
