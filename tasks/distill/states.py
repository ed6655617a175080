"""The teacher run once: its final hidden states at the labelled positions, on disk, memory-mapped.

A state is G values a token where logits would be the vocabulary; the exact distribution is recomputed from it with
the teacher's frozen head at any temperature.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.job import Job
from tasks.engine.batches import collate, to_device
from tasks.engine.chat import Example
from tasks.engine.head import head_of, hidden_states
from tasks.engine.losses import Head, cross_entropy

SECONDS_BETWEEN_MARKS = 10


class TeacherStates:
    """Hidden states (labels of all rows, G), rows one behind the other, and the head that reads them."""

    def __init__(self, states: Tensor, offsets: list[int], head: Head) -> None:
        self.states, self.offsets, self.head = states, offsets, head

    def of(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """States (N, G) of a batch's rows, in the order of its labels."""
        parts = [self.states[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        return torch.cat(parts).to(device, non_blocking=True)


def teacher_states(
    teacher: PreTrainedModel, examples: Sequence[Example], micro_batch: int, dtype: torch.dtype, made_by: str, job: Job
) -> TeacherStates:
    """Runs the teacher over `examples` and keeps its states in `job.work`; goes on where an earlier try stopped."""
    offsets = [0]
    for example in examples:
        offsets.append(offsets[-1] + len(example.answer_ids))
    head = head_of(teacher)
    width = head.weight.shape[1]
    directory = job.work / "teacher"
    directory.mkdir(exist_ok=True)
    order = sorted(range(len(examples)), key=lambda row: (len(examples[row].input_ids), row))
    done = _rows_done(directory, made_by)
    path, size = directory / "states.bin", offsets[-1] * width
    states = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(offsets[-1], width)
    marked = told = time.monotonic()
    while done < len(order):
        rows = order[done : done + micro_batch]
        batch = to_device(collate([(row, examples[row]) for row in rows]), teacher.device)
        with torch.no_grad():
            hidden = hidden_states(teacher, batch["input_ids"], batch["positions"]).to("cpu", dtype)
        start = 0
        for row in rows:
            labels = offsets[row + 1] - offsets[row]
            states[offsets[row] : offsets[row + 1]] = hidden[start : start + labels]
            start += labels
        done += len(rows)
        now = time.monotonic()
        if done == len(order) or now - told > 0.5:
            job.progress(done, len(order), "rows through the teacher")
            told = now
        if done == len(order) or now - marked > SECONDS_BETWEEN_MARKS:
            _mark(directory, path, done, made_by)
            marked = now
    return TeacherStates(states, offsets, Head(head.weight.detach().clone(), head.softcap))


def teacher_loss(states: TeacherStates, examples: Sequence[Example], first: int, chunk_bytes: int) -> float:
    """The teacher's own cross-entropy a label on `examples`, the rows from `first` on: what the student aims at."""
    device = states.head.weight.device
    total, count = 0.0, 0
    for start in range(0, len(examples), 256):
        some = examples[start : start + 256]
        labels = torch.tensor([label for example in some for label in example.answer_ids], device=device)
        hidden = states.of(range(first + start, first + start + len(some)), device)
        with torch.no_grad():
            total += float(cross_entropy(hidden, states.head, labels, chunk_bytes))
        count += len(labels)
    return total / count


def _rows_done(directory: Path, made_by: str) -> int:
    """How many rows an earlier try of the same run left on disk."""
    mark = directory / "mark.json"
    if not mark.is_file():
        return 0
    values = json.loads(mark.read_text())
    return int(values["rows"]) if values["made_by"] == made_by and (directory / "states.bin").is_file() else 0


def _mark(directory: Path, path: Path, rows: int, made_by: str) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # the states are on disk before the mark says so
    temporary = directory / "mark.tmp"
    temporary.write_text(json.dumps({"rows": rows, "made_by": made_by}))
    temporary.replace(directory / "mark.json")
