"""Runs a teacher once over a dataset and caches its hidden states (or top-k logits) of every answer token.

python -m tasks.distill.teacher_cache.run config.json --teacher BASE+ADAPTER --dataset DIR --out DIR [--previous DIR]
"""

import shutil
from pathlib import Path

from tasks.core.command import Report, command
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill.teacher_cache import TeacherCacheConfig
from tasks.distill.teacher_cache.cache_files import TeacherCache, has_older_format, teacher_key
from tasks.distill.teacher_cache.load_teacher import load_teacher
from tasks.distill.teacher_cache.progress_marker import MARKER
from tasks.distill.teacher_cache.row_numbers import row_numbers
from tasks.distill.teacher_cache.teacher_accuracy import measure_accuracy, write_accuracy_report
from tasks.distill.teacher_cache.teacher_pass import TeacherPass, cache_rows, choose_layout
from tasks.distill.teacher_cache.top_k import topk_error
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.model_config import read_config
from tasks.engine.training.inputs import read_splits


def cache_teacher(
    config: TeacherCacheConfig, teacher: ModelDir, dataset: Path, out: Path, job: Job, previous: Path | None = None
) -> Report:
    """Writes the teacher cache of all training and validation rows into `out`, and the teacher's accuracy on them.

    `previous` is a cache of the same teacher for other data: rows that it holds are copied, not computed again.
    """
    report = Report()
    if previous and has_older_format(previous):
        job.log(f"{previous} has an older format: the teacher runs over all rows")
        previous = None
    tokenizer = load_tokenizer(teacher, config.chat_template)
    rows, validation = read_splits(tokenizer, dataset, config.max_length, report, job)
    width = read_config(teacher.base).get_text_config().hidden_size
    layout = choose_layout(config, width, sum(len(row.answer_ids) for row in [*rows, *validation]), job)
    teacher_pass = TeacherPass(lambda: load_teacher(teacher, config), teacher_key(teacher, config), layout, config)
    directory = job.work / "teacher-cache"
    cache = cache_rows(
        teacher_pass, [*rows, *validation], TeacherCache(previous) if previous else None, directory, job
    )  # fmt: skip
    if layout.top_k:
        model = teacher_pass.load()
        report.details["top_k"] = {f"T={t:g}": topk_error(model, rows, layout.top_k, t) for t in (1.0, 2.0)}
        error = report.details["top_k"]["T=2"]
        job.log(f"top {layout.top_k}: the tail has {error['tail_mass']:.2%} of the mass, KL {error['kl']:.3g} at T=2")
    accuracies = {}
    for split, examples in (("train", rows), ("validation", validation)):
        if examples:
            accuracy = measure_accuracy(cache, examples)
            accuracies[split] = (accuracy, examples, row_numbers(dataset / f"{split}.jsonl", tokenizer, examples))
            report.metrics |= {f"teacher_{split}_loss": accuracy.loss, f"teacher_{split}_accuracy": accuracy.accuracy}
    write_accuracy_report(out, accuracies, cache, tokenizer)
    for path in directory.iterdir():
        if path.name != MARKER:
            shutil.copyfile(path, out / path.name)
    report.facts |= {name: round(value, 4) for name, value in report.metrics.items()}
    report.facts |= {"rows": len(cache.row_indices), "labels": cache.starts[-1], "top_k": layout.top_k}
    report.facts["gib"] = round(cache.starts[-1] * layout.bytes_per_label / (1 << 30), 4)
    return report


if __name__ == "__main__":
    command(cache_teacher)
