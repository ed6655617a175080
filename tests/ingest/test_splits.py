"""Splits: rows that keep theirs, questions that share one, and the calibration sample."""

from collections import Counter
from collections.abc import Callable
from random import Random

import numpy as np
import orjson
import pytest

from tasks.core.errors import BadData
from tasks.ingest.near_duplicates import near_groups, question_text
from tests.ingest.conftest import Run, intent_row, text_rows

Go = Callable[..., Run]


def test_every_intent_is_held_out_and_rows_keep_their_split_when_others_are_added(go: Go) -> None:
    """Shares are those asked for give or take chance; of a rare intent one row is forced, and may be replaced."""
    frequent = [intent_row(number, "close_audit") for number in range(600)]
    less_frequent = [intent_row(number, "report_issue") for number in range(300)]
    rare = [intent_row(number, "out_of_scope") for number in range(10)]
    first = go([*frequent, *less_frequent, *rare])
    counts = first.profile()["intents"]
    assert 35 <= counts["test"]["close_audit"] <= 85 and 15 <= counts["test"]["report_issue"] <= 45
    assert counts["test"]["out_of_scope"] >= 1
    added = [intent_row(number, "close_audit") for number in range(600, 1200)]
    extended = [*added, *frequent, *less_frequent, *rare]
    Random(0).shuffle(extended)
    before, after = first.splits(), go(extended).splits()
    assert {question: after[question] for question in before} == before


def test_a_forced_row_gives_way_to_a_lower_draw_and_no_other_row_moves(go: Go) -> None:
    base = [intent_row(number, "close_audit") for number in range(200)]
    moved = Counter[tuple[str, str]]()
    before = go([*base, *(intent_row(number, "rare") for number in range(10))], test_fraction=0.02).splits()
    after = go([*base, *(intent_row(number, "rare") for number in range(40))], test_fraction=0.02).splits()
    for question, split in before.items():
        if split != after[question]:
            moved[split, after[question]] += 1
            assert "rare" in question
    assert set(moved) <= {("test", "train"), ("test", "validation")} and moved.total() <= 1


def test_calibration_is_a_sample_of_train_with_every_intents_share(go: Go) -> None:
    rows = [intent_row(n, "close_audit") for n in range(800)] + [intent_row(n, "out_of_scope") for n in range(200)]
    ran = go(rows, calibration_rows=50)
    lines = (ran.out / "calibration.jsonl").read_text().splitlines()
    assert len(set(lines)) == 50 and set(lines) <= set((ran.out / "train.jsonl").read_text().splitlines())
    intents = Counter(row.intent for row in ran.rows("calibration"))
    assert 38 <= intents["close_audit"] <= 42 and intents.total() == 50
    # In a seeded order: the first half is a sample too.
    assert 2 <= Counter(row.intent for row in ran.rows("calibration")[:25])["out_of_scope"] <= 9
    small = go(rows[:100], calibration_rows=512)
    assert len(small.rows("calibration")) == len(small.rows("train")) == small.report.facts["calibration_rows"]
    assert go(rows, calibration_rows=0).rows("calibration") == []


def reworded(rows: list[dict[str, str]], random: Random) -> list[dict[str, str]]:
    """The same questions with one letter changed and other capitals and spaces."""
    variants = []
    for row in rows:
        text = row["question"].replace(" ", "  ", 2).capitalize()
        index = random.randrange(10, len(text) - 10)
        variants.append({**row, "question": text[:index] + "z" + text[index + 1 :]})
    return variants


def test_almost_equal_questions_share_a_split(go: Go) -> None:
    rows = text_rows(300)
    twins = reworded(rows, Random(1))
    both = [*rows, *twins]
    independent, grouped = go(both), go(both, near_duplicates="together")
    pairs = [(first["question"], second["question"]) for first, second in zip(rows, twins, strict=True)]
    splits, grouped_splits = independent.splits(), grouped.splits()
    assert sum(splits[first] != splits[second] for first, second in pairs) > 40
    assert sum(grouped_splits[first] != grouped_splits[second] for first, second in pairs) <= 5
    counts = grouped.profile()["near_duplicates"]
    assert counts["groups"] >= 295 and counts["questions"] >= 590 and grouped.quarantine() == []
    dropped = go(both, near_duplicates="drop")
    assert 295 <= len(dropped.quarantine()) <= 300
    assert dropped.quarantine()[0]["reason"].startswith("almost a duplicate of train.jsonl:")
    assert grouped.report.facts["train_rows"] == sum(split == "train" for split in grouped_splits.values())


def test_minhash_agrees_with_the_exact_similarity(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against the Jaccard similarity of all pairs, counted: near 1 all are found, below 0.6 none."""
    random, rows = Random(0), text_rows(60)
    texts = [row["question"] for row in rows]
    for changed in range(60):
        words = texts[changed].split()
        for _ in range(changed % 6):
            words[random.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
    lines = [
        orjson.dumps({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}, {}]})
        for text in texts
    ]
    first = near_groups(lines, len(lines), 0.8, tmp_path_factory.mktemp("near"))

    def shingles(line: bytes) -> set[bytes]:
        text = question_text(line)
        return {text[start : start + 5] for start in range(len(text) - 4)}

    sets = [shingles(line) for line in lines]
    similarity = np.array([len(sets[i] & sets[i + 60]) / len(sets[i] | sets[i + 60]) for i in range(60)])
    joined = first[60:] == np.arange(60)
    assert joined[similarity > 0.95].all() and not joined[similarity < 0.6].any()
    assert (similarity > 0.95).sum() >= 10 and (similarity < 0.6).sum() >= 10
    assert (first[:60] == np.arange(60)).all()


def test_a_row_almost_equal_to_a_held_out_one_is_removed_from_training(
    go: Go, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = text_rows(100)
    directory = tmp_path_factory.mktemp("files")
    held_out = reworded(rows[:10], Random(2))
    for name, file_rows in (("train", rows), ("test", held_out)):
        (directory / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in file_rows))
    ran = go(directory, near_duplicates="together")
    assert len(ran.rows("test")) == 10 and 9 <= len(ran.quarantine()) <= 10
    assert ran.quarantine()[0]["reason"].startswith("almost the same question is held out (test.jsonl:")
    assert any("their question is held out" in warning for warning in ran.report.warnings)


def test_no_row_for_test_is_an_error_with_the_remedy(go: Go) -> None:
    with pytest.raises(BadData, match="no row is left for test: add rows, give test.jsonl"):
        go(text_rows(60), test_fraction=0)
