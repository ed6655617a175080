"""The teacher examined on the rows it will teach: which it gets wrong, how well it does in all, and who is told.

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
from tasks.distill.teacher_cache.hidden_states import States, row_key
from tasks.engine.data.chat_template import Example

SHOWN = 50


@dataclass(frozen=True)
class Exam:
    """Of each row: the teacher's loss a label, and the place in the answer of its first mistake (-1: none)."""

    losses: list[float]
    labels: list[int]
    mistakes: list[int]

    @property
    def wrong(self) -> list[int]:
        """Rows that the teacher gets wrong."""
        return [row for row, at in enumerate(self.mistakes) if at >= 0]

    @property
    def accuracy(self) -> float:
        """The share of rows that it gets right."""
        return 1 - len(self.wrong) / max(1, len(self.mistakes))

    @property
    def loss(self) -> float:
        """Mean loss a label over all rows: what the student aims at."""
        total = sum(loss * count for loss, count in zip(self.losses, self.labels, strict=True))
        return total / max(1, sum(self.labels))


def examine(states: States, examples: Sequence[Example]) -> Exam:
    """The exam of `examples`, all of which `states` holds."""
    losses, labels, mistakes = [], [], []
    for example in examples:
        place = states.labels(row_key(example))
        wrong = states.tensors["said.bin"][place, 0] != torch.tensor(example.answer_ids)
        losses.append(float(states.tensors["loss.bin"][place].double().mean()))
        labels.append(len(wrong))
        mistakes.append(int(wrong.int().argmax()) if bool(wrong.any()) else -1)
    return Exam(losses, labels, mistakes)


def gate(name: str, exam: Exam, min_accuracy: float, max_loss: float | None) -> None:
    """Raises GateFailed, with the numbers, for a teacher that is not good enough on `name` rows."""
    if exam.accuracy < min_accuracy or (max_loss is not None and exam.loss > max_loss):
        limit = "" if max_loss is None else f" (max_teacher_loss={max_loss:g})"
        raise GateFailed(
            f"the teacher gets {exam.accuracy:.1%} of {len(exam.mistakes)} {name} rows right "
            f"(min_teacher_accuracy={min_accuracy:.1%}) and its loss there is {exam.loss:.4g} a token{limit}: nothing "
            "was distilled. Train the teacher longer or mend its rows (see report/teacher.html), or lower the bar"
        )


def write_exam(
    out: Path, exams: Mapping[str, tuple[Exam, Sequence[Example], Sequence[int]]], states: States,
    tokenizer: PreTrainedTokenizerBase,
) -> None:  # fmt: skip
    """`report/teacher.json` (every wrong row) and `report/teacher.html` (the worst, with what the teacher would say).

    `exams` has, by split, the exam, its examples, and each one's row number in the split's file, from 1.
    """
    report = out / "report"
    report.mkdir(parents=True, exist_ok=True)
    told = {
        split: {
            "rows": len(exam.mistakes),
            "accuracy": round(exam.accuracy, 6),
            "loss": round(exam.loss, 6),
            "wrong": [{"row": numbers[row], "loss": round(exam.losses[row], 4)} for row in exam.wrong],
        }
        for split, (exam, _, numbers) in exams.items()
    }
    (report / "teacher.json").write_text(json.dumps(told, indent=1))
    body = "".join(_table(split, *parts, states, tokenizer) for split, parts in exams.items())
    style = "body{font:14px sans-serif;margin:2em}td,th{padding:4px 10px;text-align:left;vertical-align:top}"
    page = f"<!doctype html><meta charset=utf-8><title>The teacher's exam</title><style>{style}</style>{body}"
    (report / "teacher.html").write_text(page, encoding="utf-8")


def _table(
    split: str, exam: Exam, examples: Sequence[Example], numbers: Sequence[int], states: States,
    tokenizer: PreTrainedTokenizerBase,
) -> str:  # fmt: skip
    head = (
        f"<h2>{split}: {exam.accuracy:.1%} of {len(exam.mistakes)} rows right, loss {exam.loss:.4g} a token</h2>"
        "<table><tr><th>row<th>loss a token<th>the label, up to the mistake<th>label<th>teacher</tr>"
    )
    lines = []
    for row in sorted(exam.wrong, key=lambda row: -exam.losses[row])[:SHOWN]:
        answer, at = examples[row].answer_ids, exam.mistakes[row]
        said = int(states.tensors["said.bin"][states.labels(row_key(examples[row]))][at])
        texts = [tokenizer.decode(ids) for ids in (answer[:at], [answer[at]], [said])]
        cells = "".join(f"<td>{html.escape(str(text))}" for text in texts)
        lines.append(f"<tr><td>{numbers[row]}<td>{exam.losses[row]:.3f}{cells}</tr>")
    return head + "".join(lines) + "</table>"
