"""No answer of a held-out row is learnt: normalised questions, whole conversations, groups, and the proof."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unicodedata import normalize

import numpy as np
import orjson
import pytest

from tasks.ingest import leak_proof
from tasks.ingest.comparison import comparable, comparable_json
from tasks.ingest.leak_proof import prove_splits
from tests.ingest.conftest import Run, text_rows

Go = Callable[..., Run]


def write(directory: Path, **files: list[dict[str, Any]]) -> Path:
    """A new directory of JSONL files."""
    directory.mkdir()
    for name, rows in files.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


def turns(number: int, length: int, random: Random) -> list[str]:
    return [f"turn {number} {turn} {random.random()}" for turn in range(2 * length)]


@pytest.mark.parametrize(
    "variant",
    [
        lambda text: normalize("NFD", text),
        str.upper,
        lambda text: text.replace(" ", "  "),
        lambda text: f"\n {text}\t",
        lambda text: text.replace(" ", " \u200b"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(" ", "\u00a0"),
        lambda text: "\ufeff" + text.replace("ü", "u\u0308\ufe0f"),
    ],
)
def test_a_question_that_is_written_otherwise_is_the_same(
    variant: Callable[[str], str], go: Go, tmp_path: Path
) -> None:
    questions = [f"Straße prüfen für Café № {number}\nzweite Zeile?" for number in range(5)]
    test = [{"question": text, "answer": f"Ja, {text}"} for text in questions]
    train = [*text_rows(60), *({"question": variant(text), "answer": "Nein"} for text in questions)]
    ran = go(write(tmp_path / "files", train=train, test=test))
    leaks = ran.quarantine()
    assert [line["line"] for line in leaks] == [61, 62, 63, 64, 65]
    assert all("the same question" in line["reason"] and "test.jsonl" in line["reason"] for line in leaks)
    written = {row.messages[0].content for row in ran.rows("test")}
    assert written == set(questions), "what is written stays as it was"
    assert ran.profile()["leak_proof"]["asked"] == {"validation": 0, "test": 0}


def test_texts_that_differ_in_more_are_not_the_same() -> None:
    assert len({comparable(text) for text in ("a b", "ab", "a-b", "a b?", "ä b", "ａ b", "a ｂ", "a 2", "a ²")}) == 9
    assert comparable("  Große\u00ad\r\n MASSE ") == comparable("grosse masse")
    random = Random(0)
    for _ in range(2000):  # the short way for ASCII is the long one
        text = "".join(random.choices("aB \t\r\n\x0b\x1f\x7f~", k=8))
        assert comparable(text + "é")[:-1].strip() == comparable(text)
    for _ in range(20_000):  # nor does the short way for encoded text differ
        text = "".join(random.choices(["a", "B", " ", "\n", "\n\n", "\\", "n", "\\n", '"', "é", "\t"], k=6))
        assert comparable_json(orjson.dumps(text)).decode() == comparable(text), repr(text)


def test_case_alone_makes_no_conflict_of_two_answers(go: Go) -> None:
    rows = [{"question": f"Call Anna {n}", "answer": json.dumps({"intent": "call", "who": "Anna"})} for n in range(60)]
    lower = [{"question": f"call anna {n}", "answer": json.dumps({"intent": "call", "who": "anna"})} for n in range(60)]
    ran = go([*rows, *lower])
    assert ran.quarantine() == [] and len(ran.all()) == 120
    (line,) = go([*rows, rows[0] | {"question": "CALL  ANNA 0"}]).quarantine()
    assert line["reason"].startswith("duplicate of train.jsonl:1, but for case")


def test_a_conversation_lies_on_one_side_with_what_was_unrolled_from_it(go: Go) -> None:
    """Whole conversations, each prefix as a row, in any order; and rows stay when others are added."""
    random = Random(1)
    conversations = [turns(number, random.randint(2, 4), random) for number in range(150)]
    rows = [chat(*texts[:end]) for texts in conversations for end in range(2, len(texts) + 1, 2)]
    rows += [chat(*texts[:-1], "another answer") for texts in conversations[:20]]
    random.shuffle(rows)
    ran = go(rows, drop_duplicates=False)
    sides: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for row in ran.rows(split):
            sides.setdefault(row.messages[0].content, set()).add(split)
    assert len(sides) == 150 and all(len(splits) == 1 for splits in sides.values()) and ran.quarantine() == []
    shares = {split: sum(splits == {split} for splits in sides.values()) for split in ("train", "test")}
    assert shares["test"] >= 5 and shares["train"] >= 100
    fewer = go(rows[::3], drop_duplicates=False).splits()
    before = ran.splits()
    assert fewer == {question: before[question] for question in fewer}


def test_training_rows_that_begin_or_go_on_from_a_held_out_conversation_are_taken_out(go: Go, tmp_path: Path) -> None:
    random = Random(2)
    conversations = [turns(number, 3, random) for number in range(10)]
    begun = [chat(*texts[:2]) for texts in conversations[:5]]
    whole = [chat(*texts) for texts in conversations[5:]]
    longer = [chat(*texts) for texts in conversations[:5]]  # goes on from a test row
    beginnings = [chat(*texts[:4]) for texts in conversations[5:]]  # begins a test row
    others = [chat(*turns(100 + number, 2, random)) for number in range(60)]
    ran = go(write(tmp_path / "files", train=[*others, *longer, *beginnings], test=[*begun, *whole]))
    assert len(ran.rows("test")) == 10 and [line["line"] for line in ran.quarantine()] == [*range(61, 71)]
    assert all(line["reason"].startswith("a conversation that this one begins") for line in ran.quarantine())
    assert any("10 rows were taken out of training: they begin" in warning for warning in ran.report.warnings)
    assert ran.profile()["leak_proof"]["learnt"] == {"validation": 0, "test": 0}


def test_a_greeting_does_not_send_all_conversations_to_one_split(go: Go) -> None:
    random = Random(3)
    rows = [chat("Hi", "Hello!", *turns(number, 1 + number % 3, random)) for number in range(400)]
    rows += [chat("Hi", "Hello!", *turns(number, 1, random)) for number in range(400, 500)] + [chat("hi", "Hello!")]
    ran = go(rows)
    assert 20 <= len(ran.rows("test")) <= 90 and any("first questions" in text for text in ran.report.warnings)
    assert ran.profile()["leak_proof"]["asked"] == {"validation": 0, "test": 0}
    assert [line["line"] for line in ran.quarantine()] in ([], [501])


def test_rows_that_differ_in_the_system_message_alone_are_told(go: Go, tmp_path: Path) -> None:
    train = [chat(f"Question {n}", f"Answer {n}", system="Today is Monday.") for n in range(60)]
    test = [chat(f"Question {n}", f"Answer {n}", system="Today is Tuesday.") for n in range(7)]
    test.append(chat("Question 8", "B"))
    ran = go(write(tmp_path / "files", train=train, test=test), validation_fraction=0)
    warning = next(text for text in ran.report.warnings if "system message alone" in text)
    assert warning.startswith("8 held-out rows") and "test.jsonl:1 and train.jsonl:1" in warning
    assert ran.profile()["split_notes"]["system_twins"] == 8 and ran.quarantine() == []


def test_rows_of_a_group_go_to_one_split(go: Go, tmp_path: Path) -> None:
    rows = [row | {"meta": {"customer": n % 60}} for n, row in enumerate(text_rows(600))]
    ran = go(rows, group_by="meta.customer")
    customer = {row["question"]: row["meta"]["customer"] for row in rows}
    sides: dict[int, set[str]] = {}
    for question, split in ran.splits().items():
        sides.setdefault(customer[question], set()).add(split)
    assert len(sides) == 60 and all(len(splits) == 1 for splits in sides.values())
    assert {"test", "train"} <= {split for splits in sides.values() for split in splits}
    flat = [row | {"customer": "a" if n < 2 else f"c{n}"} for n, row in enumerate(text_rows(80))]
    files = write(tmp_path / "files", train=[*flat[1:], text_rows(1, seed=9)[0]], test=flat[:1])
    given = go(files, group_by="customer")
    first, missing = sorted(given.quarantine(), key=lambda line: line["line"])
    assert first["line"] == 1 and first["reason"].startswith("its group (group_by) is held out (test.jsonl:1)")
    assert missing["line"] == 80 and missing["reason"].startswith("field 'customer' is missing or empty")
    assert not any("not read" in warning and "customer" in warning for warning in given.report.warnings)


def test_the_proof_counts_what_is_written(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of a conversation's middle count, in their context alone; several processes count as one does."""
    ran = go(text_rows(300))
    assert prove_splits(ran.out).labels == len(ran.rows("train"))
    test = ran.rows("test")
    lines = (ran.out / "test.jsonl").read_text().splitlines()
    proof = ran.profile()["leak_proof"]
    assert proof["learnt"] == proof["asked"] == {"validation": 0, "test": 0}
    assert proof["answers"]["test"] == len(test) and ran.report.facts["held_out_answers_learnt"] == 0
    assert "are labels of training in the same context" in (ran.out / "report/profile.md").read_text()
    going_on = json.loads(lines[0])
    going_on["messages"] += chat("And then?", "Then this.")["messages"]
    other = json.loads(lines[1])
    other["messages"][0]["content"] = other["messages"][0]["content"].upper()
    other["messages"][1]["content"] = "another answer"
    unlearnt = json.loads(lines[2])
    unlearnt["messages"] += chat("And then?", "Then that.")["messages"]
    in_another_context = {"messages": chat("Before", "this")["messages"] + json.loads(lines[3])["messages"]}
    with (ran.out / "train.jsonl").open("a") as file:
        for row in (going_on | {"labels": [1, 3]}, other, unlearnt, in_another_context):
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
    leaky = prove_splits(ran.out)
    assert leaky.learnt["test"] == 1 and leaky.asked["test"] == 2 and "First: test.jsonl:1 and" in leaky.sentence()
    monkeypatch.setattr(leak_proof, "SERIAL_BYTES", 0)
    assert prove_splits(ran.out) == leaky
    path = ran.out / "train.jsonl"
    whole, size = leak_proof._contexts_of_range(path), path.stat().st_size
    for border in (1, 77, size // 2, size - 1):
        parts = [leak_proof._contexts_of_range(path, 0, border), leak_proof._contexts_of_range(path, border, size)]
        assert (np.concatenate(parts) == whole).all()
