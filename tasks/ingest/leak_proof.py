"""Proof that no answer of a held-out row is learnt, from the written files alone.

The files are read again. Every label of train is hashed with its context, all messages before it, as rows are compared
(`comparable`); of the columns that decided on the splits nothing is used. `asked` counts the held-out rows whose
context has any label in train, `learnt` those whose answer is that label: both must be 0.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from tasks.ingest.comparison import comparable, comparable_json

HELD_OUT = ("validation", "test")
SERIAL_BYTES = 64 << 20  # a smaller file is read by this process alone
MAX_WORKERS = 4
PAIR_OPENING, PAIR_MIDDLE = b'{"messages":[{"role":"user","content":', b'},{"role":"assistant","content":"'
NEXT_TURN = b'"},{"role":"'

Contexts = NDArray[np.uint64]


class LeakProof(NamedTuple):
    """Numbers of train's labels, and by split of the held-out answers, those in a context of train's, and those that
    are the label there; `example` names such a row and the one of train."""

    labels: int
    answers: dict[str, int]
    asked: dict[str, int]
    learnt: dict[str, int]
    example: str = ""

    def sentence(self) -> str:
        """What was counted, in words."""
        answers, learnt, asked = (sum(counts.values()) for counts in (self.answers, self.learnt, self.asked))
        return (
            f"Of the {answers} answers held out for validation and test, {learnt} are labels of training in the same "
            f"context, and {asked} have a context in which training has any label ({self.labels} labels were compared, "
            f"read from the written files).{self.example}"
        )


def prove_splits(out: Path) -> LeakProof:
    """Counts over train, validation and test.jsonl in `out`."""
    labels = _train_contexts(out / "train.jsonl")
    answers, asked, shared = dict[str, int](), dict[str, int](), set[int]()
    for split in HELD_OUT:
        held_out = _contexts_of_range(out / f"{split}.jsonl", last_only=True)
        hits = held_out[np.isin(held_out, labels)] if len(held_out) else held_out
        answers[split], asked[split] = len(held_out), len(hits)
        shared.update(hits.tolist())
    learnt, example = _learnt(out, shared) if shared else (dict.fromkeys(HELD_OUT, 0), "")
    return LeakProof(len(labels), answers, asked, learnt, example)


def _train_contexts(path: Path) -> Contexts:
    """The context of every label, read by several processes where the file is large."""
    size, workers = path.stat().st_size, min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    if size < SERIAL_BYTES or workers < 2:
        return _contexts_of_range(path)
    borders = np.linspace(0, size, workers + 1, dtype=np.int64).tolist()
    starts, stops = zip(*pairwise(borders), strict=True)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return np.concatenate([*pool.map(_contexts_of_range, [path] * workers, starts, stops)])


def _contexts_of_range(path: Path, start: int = 0, stop: int | None = None, last_only: bool = False) -> Contexts:
    """Hashes of the contexts of the labels in the lines that begin in a range of bytes."""
    hashes: list[int] = []
    for line in _lines(path, start, stop):
        end = line.find(PAIR_MIDDLE) if line.startswith(PAIR_OPENING) else -1
        if end > 0 and line.find(NEXT_TURN, end + len(PAIR_MIDDLE)) < 0:  # the answer need not be parsed
            hashes.append(xxh3_64_intdigest(b"user\0%b\0" % comparable_json(line[len(PAIR_OPENING) : end])))
        else:
            hashes += [context for context, _ in _labels(line, last_only)]
    return np.array(hashes, dtype=np.uint64)


def _lines(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    with path.open("rb", buffering=1 << 20) as file:
        if start:
            file.seek(start - 1)
            start += len(file.readline()) - 1
        for line in file:
            if stop is not None and start >= stop:
                return
            start += len(line)
            yield line


def _labels(line: bytes, last_only: bool) -> list[tuple[int, str]]:
    """The context's hash and the text, as compared, of each label; of a held-out row the last label's alone."""
    row: dict[str, Any] = orjson.loads(line)
    messages = row["messages"]
    indices = row.get("labels") or [len(messages) - 1]
    texts = [f"{message['role']}\0{comparable(message['content'])}\0" for message in messages]
    return [
        (xxh3_64_intdigest("".join(texts[:index]).encode()), texts[index])
        for index in (indices[-1:] if last_only else indices)
    ]


def _learnt(out: Path, shared: set[int]) -> tuple[dict[str, int], str]:
    """Held-out answers that are the label in their context, by split; and the first shared context's rows, in words."""
    labels: dict[tuple[int, str], int] = {}
    rows: dict[int, int] = {}
    for number, line in enumerate(_lines(out / "train.jsonl", 0, None), start=1):
        for context, text in _labels(line, last_only=False):
            if context in shared:
                labels[context, text] = rows.setdefault(context, number)
    learnt, example = dict.fromkeys(HELD_OUT, 0), ""
    for split in HELD_OUT:
        for number, line in enumerate(_lines(out / f"{split}.jsonl", 0, None), start=1):
            for context, text in _labels(line, last_only=True):
                learnt[split] += (context, text) in labels
                if context in shared and not example:
                    example = f" First: {split}.jsonl:{number} and train.jsonl:{rows[context]}."
    return learnt, example
