"""The ingest stage on real files: shapes, formats, faults and what is reported of them."""

import base64
import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.core.command import Report
from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Row, read_rows
from tasks.ingest import IngestConfig
from tasks.ingest.block_parser import PIECE_BYTES
from tasks.ingest.run import ingest
from tests.pico import pico_tokenizer

INTENTS = ("close_audit", "report_issue", "out_of_scope")


def alpaca(number: int) -> dict[str, Any]:
    answer = {"intent": INTENTS[number % 3], "entities": {"audit": str(number)}}
    return {"instruction": f"Please close audit {number}.", "input": "", "output": json.dumps(answer)}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def run(tmp_path: Path, files: Path, name: str = "out", tokenizer: ModelDir | None = None, **config: Any) -> Report:
    out = tmp_path / name
    out.mkdir()
    return ingest(IngestConfig(**config), files, out, Job(tmp_path / f"{name}.work"), tokenizer)


def rows(tmp_path: Path, split: str, name: str = "out") -> list[Row]:
    return list(read_rows(tmp_path / name / f"{split}.jsonl"))


def quarantine(tmp_path: Path, name: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / name / "quarantine.jsonl").read_text().splitlines()]


def test_ingest_writes_canonical_rows_profile_and_pictures(tmp_path: Path) -> None:
    files = write(tmp_path / "in" / "train.jsonl", [alpaca(i) for i in range(600)]).parent
    report = run(tmp_path, files, tokenizer=ModelDir(pico_tokenizer(tmp_path / "tokenizer")))
    facts = report.facts
    assert facts["train_rows"] + facts["validation_rows"] + facts["test_rows"] == 600
    assert 40 <= facts["test_rows"] <= 80 and 15 <= facts["validation_rows"] <= 50
    assert (facts["intents"], facts["quarantined_rows"]) == (3, 0)
    assert facts["out_of_scope_rows"] == sum(row.intent == "out_of_scope" for row in rows(tmp_path, "train"))
    by_question = {
        row.messages[0].content: row for split in ("train", "validation", "test") for row in rows(tmp_path, split)
    }
    assert len(by_question) == 600
    row = by_question["Please close audit 7."]
    assert (row.intent, row.answer) == ("report_issue", alpaca(7)["output"])
    profile = json.loads((tmp_path / "out/profile.json").read_text())
    assert profile["entities"]["report_issue"] == {"audit": profile["intents"]["train"]["report_issue"]}
    assert 10 < profile["tokens"]["p50"] < 200
    page = (tmp_path / "out/report/profile.md").read_text()
    assert "| out_of_scope |" in page
    html = (tmp_path / "out/report/profile.html").read_text()
    for picture in ("intents.png", "lengths.png"):
        image = (tmp_path / "out/report" / picture).read_bytes()
        assert image.startswith(b"\x89PNG") and base64.b64encode(image).decode() in html
    assert "http" not in html and "<td>out_of_scope</td>" in html


def test_every_fault_is_reported_with_its_row_and_good_rows_stay(tmp_path: Path) -> None:
    good = [alpaca(i) for i in range(100)]
    faulty: list[tuple[Any, str]] = [
        (b'{"instruction": "a", ', "not JSON"),
        (b'{"instruction": "caf\xe9", "input": "", "output": "x"}', "not UTF-8: byte 0xe9 at byte 21 of the line"),
        (b'{"instruction": "a", "output": NaN}', "not JSON"),
        ({"instruction": "no answer"}, "missing field 'output'"),
        ({"instruction": "  ", "output": "x"}, "empty field 'instruction'"),
        ({"instruction": 5, "output": "x"}, "field 'instruction' is not a string but a number"),
        ({"instruction": "q", "output": None}, "field 'output' is not a string but null"),
        (["a", "list"], "not a JSON object but a list"),
        ({"instruction": "q", "output": "plain words"}, "should be a JSON object"),
        (good[3], "duplicate of train.jsonl:4"),
        ({**good[5], "output": good[6]["output"]}, "another answer at train.jsonl:6"),
    ]
    files = write(tmp_path / "train.jsonl", [*good, *(row for row, _ in faulty)])
    report = run(tmp_path, files, max_quarantined_fraction=0.2)
    reasons = {line["line"]: line["reason"] for line in quarantine(tmp_path)}
    for line, (_, reason) in enumerate(faulty, start=101):
        assert reason in reasons.pop(line)
    assert reasons == {6: "the same question has another answer at train.jsonl:111; keep the right one"}
    assert report.facts["quarantined_rows"] == 12
    assert sum(int(report.facts[f"{split}_rows"]) for split in ("train", "validation", "test")) == 99
    assert files.read_bytes().splitlines()[101][21 - 1] == 0xE9
    assert any("12 rows are in quarantine.jsonl" in warning for warning in report.warnings)


def test_test_rows_are_removed_from_training(tmp_path: Path) -> None:
    write(tmp_path / "in/train.jsonl", [alpaca(i) for i in range(100)])
    write(tmp_path / "in/test.jsonl", [alpaca(i) for i in range(90, 130)])
    report = run(tmp_path, tmp_path / "in")
    held_out = {row.messages[0].content for row in rows(tmp_path, "test")}
    assert len(held_out) == 40
    assert not held_out & {
        row.messages[0].content for split in ("train", "validation") for row in rows(tmp_path, split)
    }
    assert len(rows(tmp_path, "train")) + len(rows(tmp_path, "validation")) == 90
    assert [line["line"] for line in quarantine(tmp_path)] == list(range(91, 101))
    assert quarantine(tmp_path)[0]["reason"].startswith("the same question is held out (test.jsonl:1), so ")
    assert any("10 rows were taken out of training" in warning for warning in report.warnings)


def test_a_row_stays_in_its_split_when_rows_are_added(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [alpaca(i) for i in range(300)])
    shuffled = [alpaca(i) for i in range(900)]
    random.Random(1).shuffle(shuffled)
    second = write(tmp_path / "b.jsonl", shuffled)
    run(tmp_path, first, "one")
    run(tmp_path, second, "two")
    run(tmp_path, first, "other", seed=1)
    before, after, reseeded = (
        {
            row.messages[0].content: split
            for split in ("train", "validation", "test")
            for row in rows(tmp_path, split, name)
        }
        for name in ("one", "two", "other")
    )
    assert before == {question: after[question] for question in before}
    assert before != reseeded


def test_outputs_are_the_same_bytes_twice(tmp_path: Path) -> None:
    files = write(tmp_path / "train.jsonl", [alpaca(i % 150) for i in range(200)])
    run(tmp_path, files, "one")
    run(tmp_path, files, "two")
    names = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert "report/intents.png" in names and "quarantine.jsonl" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_free_text_may_have_several_answers_and_a_warning(tmp_path: Path) -> None:
    texts = [{"question": f"Why {i}?", "answer": f"Because {i}."} for i in range(80)]
    files = write(tmp_path / "train.jsonl", [*texts, {"question": "Why 3?", "answer": '{"intent": "odd"}'}])
    report = run(tmp_path, files)
    assert (report.facts["answers"], report.facts["quarantined_rows"], report.facts["intents"]) == ("text", 0, 0)
    assert any(warning.startswith("2 rows share their question") for warning in report.warnings)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, ["system: Be brief.", "user: Q", "assistant: A"]),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            ["user: Q", "assistant: A"],
        ),
        ({"instruction": "Q", "input": "more", "output": "A"}, ["user: Q\n\nmore", "assistant: A"]),
        ({"prompt": "Q", "completion": "A"}, ["user: Q", "assistant: A"]),
        ({"prompt": CHAT[1:2], "completion": CHAT[2:]}, ["user: Q", "assistant: A"]),
        ({"problem": "Q", "solution": "A", "id": 1}, ["user: Q", "assistant: A"]),
        ({"prompt": "Q", "story": "A", "system": "S"}, ["system: S", "user: Q", "assistant: A"]),
        ({"command": "Q", "json": {"intent": "x", "n": "ü"}}, ["user: Q", 'assistant: {"intent": "x", "n": "ü"}']),
    ],
)
def test_shapes_are_recognised(tmp_path: Path, row: dict[str, Any], expected: list[str]) -> None:
    write(tmp_path / "in/train.jsonl", [row])
    write(tmp_path / "in/test.jsonl", [{"question": "other", "answer": "thing"}])
    run(
        tmp_path,
        tmp_path / "in",
        allow_few_rows=True,
        validation_fraction=0,
        max_quarantined_fraction=1,
        answers="text",
    )
    (row_of_train,) = rows(tmp_path, "train")
    assert [f"{message.role}: {message.content}" for message in row_of_train.messages] == expected


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["assistant", "user", "assistant"], "message 1 is assistant's, not user's"),
        (["user", "user", "assistant"], "message 2 is user's, not assistant's"),
        (["user", "assistant", "user"], "the last message is not the assistant's"),
        (["user", "tool"], "unknown role 'tool'"),
    ],
)
def test_roles_out_of_order(tmp_path: Path, roles: list[str], reason: str) -> None:
    bad = {"messages": [{"role": role, "content": str(i)} for i, role in enumerate(roles)]}
    good = [{"messages": [{**CHAT[1], "content": f"Q{i}"}, CHAT[2]]} for i in range(60)]
    run(tmp_path, write(tmp_path / "chat.jsonl", [*good, bad]), system_prompt="Answer.")
    (line,) = quarantine(tmp_path)
    assert line["line"] == 61 and reason in line["reason"]
    assert {row.messages[0].content for row in rows(tmp_path, "train")} == {"Answer."}


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    data = [alpaca(i) for i in range(100)]
    text = "[\n" + ",\n".join(json.dumps(row, indent=1) for row in data) + "\n]"
    kinds = {
        name: tmp_path / name for name in ("jsonl.jsonl", "gz.jsonl.gz", "json.json", "csv.csv", "parquet.parquet")
    }
    write(kinds["jsonl.jsonl"], data)
    kinds["gz.jsonl.gz"].write_bytes(gzip.compress(kinds["jsonl.jsonl"].read_bytes()))
    kinds["json.json"].write_text(text)
    with kinds["csv.csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(data[0]))
        writer.writeheader()
        writer.writerows(data)
    pl.DataFrame(data).write_parquet(kinds["parquet.parquet"])
    outputs = set()
    for name, path in kinds.items():
        run(tmp_path, path, f"{name}.out")
        outputs.add((tmp_path / f"{name}.out/train.jsonl").read_bytes())
    assert len(outputs) == 1 and outputs.pop().count(b"\n") > 70


def test_a_broken_json_array_gives_the_elements_before(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("[\n" + ",\n".join(json.dumps(alpaca(i)) for i in range(60)) + ",\n{broken}\n]")
    run(tmp_path, path)
    (line,) = quarantine(tmp_path)
    assert line["line"] == 62 and "not JSON" in line["reason"]


def bad(tmp_path: Path, name: str, content: bytes, **config: Any) -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as error:
        run(tmp_path, tmp_path / name, **config)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b"", "train.jsonl is empty (0 bytes); give a file with rows"),
        ("train.jsonl", b"\n\n", "holds no rows"),
        ("train.json", b"[]", "holds no rows"),
        ("train.jsonl", "".join(json.dumps(alpaca(i)) for i in range(60)).encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("train.jsonl", b"PK\x03\x04\xff\xff" * 50, "line 1 is not UTF-8: byte 0xff at byte 5 of the line"),
        ("train.jsonl.gz", gzip.compress(json.dumps(alpaca(1)).encode() * 99)[:-20], "damaged gzip"),
        ("train.parquet", b"PAR1 not really", "not Parquet"),
        ("train.csv", b"instruction,output\ncaf\xe9,x\n", "byte 0xe9 in field 'instruction'"),
        ("train.jsonl", b'{"foo": "a", "bar": "b"}\n', "no known shape (foo, bar); rename"),
        ("notes.txt", b"hello", "holds no data file"),
        ("train.jsonl", "\n".join(json.dumps(alpaca(i)) for i in range(20)).encode(), "fewer than minimum_rows=50"),
        (
            "train.jsonl",
            b"\n".join([json.dumps(alpaca(i)).encode() for i in range(60)] + [b"{"] * 40),
            "40 of 100 rows are faulty, more than max_quarantined_fraction=0.1 allows. "
            "Most frequent: 40 x not JSON: the row ends too early (first: train.jsonl:61)",
        ),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    assert message in bad(tmp_path, name, content)


def test_the_report_has_the_first_faulty_rows_even_of_a_dataset_that_fails(tmp_path: Path) -> None:
    files = write(tmp_path / "train.jsonl", [alpaca(1), *([b"{" + b"x" * 10_000] * 600)])
    with pytest.raises(BadData, match="600 of 601 rows are faulty"):
        run(tmp_path, files)
    lines = (tmp_path / "out/report/quarantine.jsonl").read_text().splitlines()
    assert 100 < len(lines) < 600 and [json.loads(line) for line in lines] == quarantine(tmp_path)[: len(lines)]


def test_a_small_dataset_gives_a_warning_when_allowed(tmp_path: Path) -> None:
    files = write(tmp_path / "train.jsonl", [alpaca(3 * i) for i in range(30)])
    report = run(tmp_path, files, allow_few_rows=True, test_fraction=0.3)
    assert any(warning.startswith("Only ") for warning in report.warnings)
    assert any("0.0% of the training rows are out_of_scope" in warning for warning in report.warnings)


def test_a_file_of_faulty_rows_is_reported_and_does_not_stop_the_stage(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    bad = [
        {"messages": [{"role": "user", "content": f"Call {i}."}, {"role": "tool", "content": "1"}]} for i in range(9)
    ]
    write(folder / "a.jsonl", bad)
    write(folder / "b.jsonl", [alpaca(i) for i in range(200)])
    facts = run(tmp_path, folder).facts
    assert facts["quarantined_rows"] == 9 and facts["train_rows"] == len(rows(tmp_path, "train")) > 100
    assert {(row["file"], row["line"]) for row in quarantine(tmp_path)} == {("a.jsonl", i) for i in range(1, 10)}
    with pytest.raises(BadData, match=r"9 of 9 rows are faulty.*unknown role 'tool'.*a\.jsonl:1"):
        run(tmp_path, folder / "a.jsonl", "alone")


def test_lines_are_counted_through_a_file_that_is_read_in_many_pieces(tmp_path: Path) -> None:
    long = [alpaca(i) | {"instruction": f"Please close audit {i}. " + "x" * 4000} for i in range(400)]
    bad = (3, 150, 398)
    files = write(tmp_path / "train.jsonl", [b"{" if i in bad else row for i, row in enumerate(long)])
    assert files.stat().st_size > 5 * PIECE_BYTES
    run(tmp_path, files)
    assert [row["line"] for row in quarantine(tmp_path)] == [i + 1 for i in bad]
