"""Runs a teacher once over a dataset's rows and keeps what it says of every answer token.

python -m tasks.distill.teacher_cache.run config.json --teacher BASE+ADAPTER --dataset DIR --out DIR [--known DIR]
"""

import shutil
from pathlib import Path

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill.teacher_cache import StatesConfig
from tasks.distill.teacher_cache.hidden_states import States, is_older, teacher_key
from tasks.distill.teacher_cache.load_teacher import load_teacher
from tasks.distill.teacher_cache.row_numbers import row_numbers
from tasks.distill.teacher_cache.teacher_accuracy import examine, write_exam
from tasks.distill.teacher_cache.teacher_pass import Ask, remember_rows, what_to_keep
from tasks.distill.teacher_cache.top_k import topk_error
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.model_config import read_config
from tasks.engine.training.results import read_splits


def remember(
    config: StatesConfig, teacher: ModelDir, dataset: Path, out: Path, job: Job, known: Path | None = None
) -> Report:
    """Writes the states of all training and validation rows into `out`, and how the teacher did in its exam.

    `known` are states that the same teacher left for other data: rows that it holds are copied, not asked again.
    """
    report = Report()
    if known and is_older(known):
        job.log(f"{known} holds states of an older format: all rows are asked anew")
        known = None
    tokenizer = load_tokenizer(teacher, config.chat_template)
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    width = read_config(teacher.base).get_text_config().hidden_size
    kept = what_to_keep(config, width, sum(len(row.answer_ids) for row in [*rows, *validation]), job)
    ask = Ask(lambda: load_teacher(teacher, config), teacher_key(teacher, config), kept, config)
    states = remember_rows(ask, [*rows, *validation], States(known) if known else None, job.work / "states", job)
    if kept.top_k:
        model = ask.load()
        report.details["top_k"] = {f"T={t:g}": topk_error(model, rows, kept.top_k, t) for t in (1.0, 2.0)}
        error = report.details["top_k"]["T=2"]
        job.log(f"top {kept.top_k}: {error['tail_mass']:.2%} of the mass is the tail's, KL {error['kl']:.3g} at T=2")
    exams = {}
    for split, examples in (("train", rows), ("validation", validation)):
        if examples:
            exam = examine(states, examples)
            exams[split] = (exam, examples, row_numbers(dataset / f"{split}.jsonl", tokenizer, examples))
            report.metrics |= {f"teacher_{split}_loss": exam.loss, f"teacher_{split}_accuracy": exam.accuracy}
    write_exam(out, exams, states, tokenizer)
    for path in (job.work / "states").iterdir():
        if path.name != "mark.json":
            shutil.copyfile(path, out / path.name)
    report.facts |= {name: round(value, 4) for name, value in report.metrics.items()}
    report.facts |= {"rows": len(states.places), "labels": states.starts[-1], "top_k": kept.top_k}
    report.facts["gib"] = round(states.starts[-1] * kept.bytes_per_label / (1 << 30), 4)
    return report


if __name__ == "__main__":
    command(remember)
