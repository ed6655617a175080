"""Profile of a dataset: counts of rows, intents, faults and lengths, from which page, charts and advice are made."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import polars as pl

from tasks.ingest.canonical import AnswerKinds
from tasks.ingest.leak_proof import LeakProof
from tasks.ingest.row_fields import UnreadField
from tasks.ingest.tokens import TokenLengths

SPLITS = ("train", "validation", "test")
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
REASON_STARTS = (
    "not UTF-8", "not JSON but a Python dict", "not JSON: the row ends too early", "not JSON: more behind its end",
    "not JSON", "not CSV", "duplicate", "almost a duplicate", "the same question is held out",
    "the same question, but for case, white space, Unicode form or invisible characters, is held out",
    "a conversation that this one begins, or goes on from, is held out", "its group (group_by) is held out",
    "almost the same question is held out", "the same question has another answer", "the answer lacks",
)  # fmt: skip


class SplitNotes(NamedTuple):
    """What to know about the splits: `system_twins` counts held-out rows that differ from one of train in the system
    message alone (`example` names the first pair); `common_openings` are first questions of many conversations."""

    system_twins: int
    example: str
    common_openings: list[str]


class Profile(NamedTuple):
    """Counts of a dataset: `rows` and `intents` by split, `faults` by name, `reasons` by their common beginning, and
    `first_rows` by reason; `unread` has the fields of the `readable_rows` that are not read;
    `conflicts` counts rows whose question has another answer in their split."""

    answers: str
    shapes: dict[str, str]
    rows: dict[str, int]
    preference_rows: int
    unread: dict[str, UnreadField]
    readable_rows: int
    intents: dict[str, dict[str, int]]
    entities: dict[str, dict[str, int]]
    schema: dict[str, Any] | None
    faults: dict[str, int]
    reasons: dict[str, int]
    first_rows: dict[str, str]
    conflicts: int
    near_duplicates: dict[str, int] | None
    characters: dict[str, dict[str, int]]
    tokens: TokenLengths | None
    leak_proof: LeakProof
    split_notes: SplitNotes

    @property
    def quarantined(self) -> int:
        """Lines of quarantine.jsonl."""
        return sum(self.reasons.values())

    def unread_share(self, name: str) -> float:
        """The share of rows that have a field which is not read."""
        return self.unread[name].rows / max(1, self.readable_rows)

    def top_reasons(self) -> str:
        """The most frequent reasons in a sentence, each with the first row that has it; empty when there is none."""
        frequent = sorted(self.reasons.items(), key=lambda item: -item[1])[:3]
        texts = [f"{count} x {reason} (first: {self.first_rows[reason]})" for reason, count in frequent]
        return f"Most frequent: {'; '.join(texts)}." if texts else ""

    def to_json(self) -> dict[str, Any]:
        """The content of profile.json."""
        return {
            "answers": self.answers,
            "shapes": self.shapes,
            "rows": self.rows,
            "preference_rows": self.preference_rows,
            "unread_fields": {
                name: field._asdict() | {"share": round(self.unread_share(name), 4)}
                for name, field in sorted(self.unread.items(), key=lambda item: -item[1].rows)
            },
            "intents": self.intents,
            "entities": self.entities,
            "schema": self.schema,
            "quarantine": dict(sorted(self.reasons.items(), key=lambda item: -item[1])),
            "conflicts_kept": self.conflicts,
            "near_duplicates": self.near_duplicates,
            "leak_proof": self.leak_proof._asdict(),
            "split_notes": self.split_notes._asdict(),
            "prompt_characters": self.characters["prompt"],
            "answer_characters": self.characters["answer"],
            "tokens": self.tokens._asdict() if self.tokens else None,
        }


def count_intents(
    good: pl.DataFrame, kinds: AnswerKinds
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Rows of each intent by split, and of each field of `entities` in train by intent."""
    intents: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    entities: dict[str, Counter[str]] = {}
    for split, number, count in good.group_by("split", "kind").len().sort("split", "kind").iter_rows():
        kind = kinds.all[number]
        if kind.intent is None:
            continue
        intents[split][kind.intent] += count
        for name, _, inner in kind.signature or ():
            if split == "train" and name == "entities":
                entities.setdefault(kind.intent, Counter()).update({field: count for field, _, _ in inner or ()})
    return (
        {split: dict(sorted(counts.items())) for split, counts in intents.items()},
        {intent: dict(sorted(fields.items())) for intent, fields in sorted(entities.items())},
    )


def count_reasons(quarantine: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Quarantined lines by reason, without the parts that differ from row to row, and the first row of each."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    with quarantine.open("rb") as file:
        for text in file:
            line = orjson.loads(text)
            reason = next((start for start in REASON_STARTS if line["reason"].startswith(start)), line["reason"])
            counts[reason] += 1
            first.setdefault(reason, f"{line['file']}:{line['line']}")
    return dict(counts), first


def quantiles(lengths: pl.Series) -> dict[str, int]:
    """p0, p50, p90, p99 and p100, each a value that occurs."""
    return {f"p{int(q * 100)}": int(lengths.quantile(q, "nearest") or 0) for q in QUANTILES}
