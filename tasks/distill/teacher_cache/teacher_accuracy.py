"""Accuracy of the teacher on its training and validation rows, the report of its wrong rows, and the limit on it.

A row is right when, with the label's tokens before it, each of the label's tokens is the teacher's most likely one:
its greedy answer is then the label.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import GateFailed
from tasks.distill.teacher_cache.cache_files import TeacherCache, row_key
from tasks.engine.data.chat_template import Example

MAX_REPORTED_ROWS = 50


@dataclass(frozen=True)
class TeacherAccuracy:
    """By row: the teacher's mean loss a label, the number of labels, and the index in the answer of its first mistake
    (-1: none)."""

    losses: list[float]
    labels: list[int]
    mistakes: list[int]

    @property
    def wrong(self) -> list[int]:
        """Rows that the teacher gets wrong."""
        return [row for row, mistake in enumerate(self.mistakes) if mistake >= 0]

    @property
    def accuracy(self) -> float:
        """The share of rows that it gets right."""
        return 1 - len(self.wrong) / max(1, len(self.mistakes))

    @property
    def loss(self) -> float:
        """Mean loss a label over all rows: what the student aims at."""
        total = sum(loss * count for loss, count in zip(self.losses, self.labels, strict=True))
        return total / max(1, sum(self.labels))


Measured = tuple[TeacherAccuracy, Sequence[Example], Sequence[int]]
"""A split's accuracy, its examples, and each one's row number in the split's file, from 1."""


def measure_accuracy(cache: TeacherCache, examples: Sequence[Example]) -> TeacherAccuracy:
    """The teacher's accuracy on `examples`, all of which `cache` holds."""
    losses, labels, mistakes = [], [], []
    for example in examples:
        positions = cache.labels(row_key(example))
        wrong = cache.tensors["said.bin"][positions, 0] != torch.tensor(example.answer_ids)
        losses.append(float(cache.tensors["loss.bin"][positions].double().mean()))
        labels.append(len(wrong))
        mistakes.append(int(wrong.int().argmax()) if bool(wrong.any()) else -1)
    return TeacherAccuracy(losses, labels, mistakes)


def require_accuracy(split: str, accuracy: TeacherAccuracy, min_accuracy: float, max_loss: float | None) -> None:
    """Raises GateFailed, with the numbers, for a teacher below these limits on the rows of `split`."""
    if accuracy.accuracy < min_accuracy or (max_loss is not None and accuracy.loss > max_loss):
        limit = "" if max_loss is None else f" (max_teacher_loss={max_loss:g})"
        raise GateFailed(
            f"the teacher gets {accuracy.accuracy:.1%} of {len(accuracy.mistakes)} {split} rows right "
            f"(min_teacher_accuracy={min_accuracy:.1%}) and its loss there is {accuracy.loss:.4g} a token{limit}: "
            "nothing was distilled. Train the teacher longer or correct its rows (see report/teacher.html), or lower "
            "the limit"
        )


def write_accuracy_report(
    out: Path, splits: Mapping[str, Measured], cache: TeacherCache, tokenizer: PreTrainedTokenizerBase
) -> None:
    """`report/teacher.json` (every wrong row) and `report/teacher.html` (the worst, with the teacher's own token)."""
    report = out / "report"
    report.mkdir(parents=True, exist_ok=True)
    summary = {
        split: {
            "rows": len(accuracy.mistakes),
            "accuracy": round(accuracy.accuracy, 6),
            "loss": round(accuracy.loss, 6),
            "wrong": [{"row": numbers[row], "loss": round(accuracy.losses[row], 4)} for row in accuracy.wrong],
        }
        for split, (accuracy, _, numbers) in splits.items()
    }
    (report / "teacher.json").write_text(json.dumps(summary, indent=1))
    body = "".join(_table(split, *measured, cache, tokenizer) for split, measured in splits.items())
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:4px 10px;text-align:left;vertical-align:top}"
    page = f"<!doctype html><meta charset=utf-8><title>Accuracy of the teacher</title><style>{style}</style>{body}"
    (report / "teacher.html").write_text(page, encoding="utf-8")


def _table(
    split: str, accuracy: TeacherAccuracy, examples: Sequence[Example], numbers: Sequence[int], cache: TeacherCache,
    tokenizer: PreTrainedTokenizerBase,
) -> str:  # fmt: skip
    head = (
        f"<h2>{split}: {accuracy.accuracy:.1%} of {len(accuracy.mistakes)} rows right, loss {accuracy.loss:.4g} a token"
        "</h2><table><tr><th>row<th>loss a token<th>the label, up to the mistake<th>label<th>teacher</tr>"
    )
    lines = []
    for row in sorted(accuracy.wrong, key=lambda row: -accuracy.losses[row])[:MAX_REPORTED_ROWS]:
        answer, mistake = examples[row].answer_ids, accuracy.mistakes[row]
        teacher_token = int(cache.tensors["said.bin"][cache.labels(row_key(examples[row]))][mistake])
        texts = [tokenizer.decode(ids) for ids in (answer[:mistake], [answer[mistake]], [teacher_token])]
        cells = "".join(f"<td>{html.escape(str(text))}" for text in texts)
        lines.append(f"<tr><td>{numbers[row]}<td>{accuracy.losses[row]:.3f}{cells}</tr>")
    return head + "".join(lines) + "</table>"
