"""Files and shapes beyond the plain ones, and what rows become."""

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from tasks.core.data_files import DATA_SUFFIXES
from tasks.core.errors import BadData
from tasks.ingest import IngestConfig, first_pass
from tasks.ingest.canonical import canonical, canonical_pair
from tasks.ingest.read import READERS
from tasks.ingest.row_shapes import SHAPES, PairShape
from tasks.ingest.turns import to_turns
from tests.ingest.conftest import Run, intent_row, text_rows

Go = Callable[..., Run]


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def test_more_kinds_of_files_give_the_same_rows(go: Go, tmp_path: Path) -> None:
    rows = text_rows(80)
    table = "".join(f"{row['question']}\t{row['answer']}\n" for row in rows)
    semicolons = "".join(f'"{row["question"]}";"{row["answer"]}"\r\n' for row in rows)
    kinds = {
        "a.jsonl": b"\xef\xbb\xbf" + as_lines(rows).replace(b"\n", b"\r\n\n"),
        "a.jsonl.zst": bytes(pyarrow.compress(as_lines(rows), "zstd", asbytes=True)),
        "a.ndjson": as_lines(rows),
        "a.tsv": b"question\tanswer\n" + table.encode(),
        "a.csv": b"question;answer\r\n" + semicolons.encode(),
        "wrapped.json": json.dumps({"data": rows}, indent=1).encode(),
        "lines.json": as_lines(rows),
    }
    outputs = set()
    for name, data in kinds.items():
        (tmp_path / name).write_bytes(data)
        outputs.add((go(tmp_path / name).out / "train.jsonl").read_bytes())
    assert len(outputs) == 1


def test_a_shape_is_added_in_one_place(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of the table is in the config, its form and the errors, and files of the shape are recognised."""
    rows = [{"ask": row["question"], "reply": row["answer"]} for row in text_rows(60)]
    with pytest.raises(BadData, match="no known shape"):
        go(rows)
    monkeypatch.setitem(SHAPES, "ask_reply", PairShape("ask", "reply"))
    assert go(rows).profile()["shapes"] == {"train.jsonl": "ask_reply"}
    ran = go(rows, format="ask_reply")
    assert {row.messages[0].content for row in ran.all()} == {row["ask"] for row in rows}
    form = IngestConfig.model_json_schema()["properties"]["format"]
    assert form["enum"] == ["auto", *SHAPES] and "ask_reply" in form["enum"]
    with pytest.raises(BadData, match=r"one of: .*ask\+reply"):
        go([{"other": "a", "fields": "b"}])


def test_every_shape_is_documented_and_every_suffix_has_a_reader() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    table = page.partition("| `format` | fields |")[2].partition("\n\n")[0]
    assert [name for name in SHAPES if f"`{name}`" not in table] == []
    assert tuple(READERS) == DATA_SUFFIXES


ODD = ["", " ", "\u200b", "nan", "no", "\u00e9", " spaces around ", "line\nline", '{"intent": "a", "b": {"c": [1]}}',
       ' {"a": 1}', '{"intent": ""}', "[1]", '{"a": ', 7, None, {"intent": "a"}, ["x"],
       "a long enough question \u200b"]  # fmt: skip


def test_the_fast_path_for_pairs_gives_the_canonical_row_of_all_checks_or_none() -> None:
    shape, pairs = SHAPES["alpaca"], 0
    assert isinstance(shape, PairShape)
    for question, context, answer in product(ODD, ODD, ODD):
        value = {"instruction": question, "input": context, "output": answer}
        row = canonical_pair(value, shape, b"0\n")
        if row is not None:
            pairs += 1
            assert row == canonical(to_turns(value, "alpaca"), b"0\n", learn_all=True)
    assert pairs > 800
    assert canonical_pair({"instruction": "a", "output": "b", "system": "c"}, shape, b"") is None
    assert canonical_pair(["a"], shape, b"") is canonical_pair({"instruction": "a"}, shape, b"") is None


def test_a_long_json_array_is_read_piece_by_piece(go: Go, tmp_path: Path) -> None:
    """Elements cross the borders of pieces, in the middle of letters of several bytes too."""
    rows = [{"question": f"Größe {n} 漢字 🔧 " + "x" * 4000, "answer": f"№ {n}"} for n in range(600)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    ran = go(tmp_path / "a.json")
    assert set(ran.splits()) == {row["question"] for row in rows}
    bad = (tmp_path / "a.json").read_bytes().replace("漢".encode(), b"\xff", 1)
    (tmp_path / "b.json").write_bytes(bad)
    (line,) = go(tmp_path / "b.json").quarantine()
    assert line["line"] == 2 and line["reason"].startswith("not UTF-8: byte 0xff")


def test_workers_give_the_output_of_one_process(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [intent_row(n, ("close_audit", "report_issue")[n % 2]) for n in range(9000)]
    rows[17] = {"instruction": "no answer"}
    serial = go(rows)
    monkeypatch.setattr(first_pass, "SERIAL_BYTES", 0)
    monkeypatch.setattr(first_pass, "BLOCK_BYTES", 200_000)
    workers = go(rows)
    for name in ("train.jsonl", "test.jsonl", "calibration.jsonl", "quarantine.jsonl", "profile.json"):
        assert (workers.out / name).read_bytes() == (serial.out / name).read_bytes(), name


def conversation(number: int, **fields: Any) -> dict[str, Any]:
    turns = [("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")]
    messages: list[dict[str, Any]] = [{"role": role, "content": f"{text} {number}"} for role, text in turns]
    messages[-1] |= fields
    return {"messages": messages}


def test_labels_of_conversations(go: Go) -> None:
    rows = [conversation(number) for number in range(60)]
    rows[1] = conversation(1, weight=0)
    rows[2] = {"messages": conversation(2)["messages"][:2]}
    ran = go(rows, test_fraction=0.2, allow_few_rows=True)
    labels = {row.messages[0].content: row.labels for row in ran.all()}
    assert labels.pop("Q 1") is None and labels.pop("Q 2") is None
    assert set(map(str, labels.values())) == {"[1, 3]"}
    last_turns = go(rows, learn_turns="last")
    assert [line["reason"] for line in last_turns.quarantine()] == [
        "no message is to be learnt: the assistant's have weight 0"
    ]
    assert all(row.labels is None for row in last_turns.rows("train"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"from": "gpt", "value": "A"}]},
            "Q",
        ),
        ({"conversations": json.dumps([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])}, "Q"),
        ({"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "S"),
    ],
)
def test_variants_of_messages(go: Go, row: dict[str, Any], expected: str) -> None:
    shape = "messages" if "messages" in row else "conversations"
    plain = [{shape: [{"from": "human", "value": f"Q{n}"}, {"from": "gpt", "value": "A"}]} for n in range(60)]
    ran = go([row, *plain])
    assert any(result.messages[0].content == expected for result in ran.all())


def test_the_schema_is_inferred_and_can_be_loosened(go: Go) -> None:
    rows = [intent_row(n, ("close_audit", "report_issue")[n % 2]) for n in range(100)]
    rows[5]["output"] = json.dumps({"intent": "close_audit"})
    ran = go(rows)
    assert ran.profile()["schema"] == {
        "type": "object",
        "properties": {
            "entities": {"type": "object", "properties": {"audit": {"type": "string"}}},
            "intent": {"type": "string", "enum": ["close_audit", "report_issue"]},
        },
        "required": ["entities", "intent"],
    }
    (line,) = ran.quarantine()
    assert line["reason"] == "the answer lacks 'entities', which 99 of 100 answers have"
    assert go(rows, schema_share=1).quarantine() == []


def test_rare_uneven_and_differently_spelt_intents_give_warnings(go: Go) -> None:
    rows = [intent_row(n, "close_audit") for n in range(400)] + [intent_row(n, "Close-Audit") for n in range(6)]
    warnings = " ".join(go(rows).report.warnings)
    assert "have fewer than 10 training rows: Close-Audit" in warnings
    assert "Intents are uneven" in warnings and "differ in spelling only: 'Close-Audit', 'close_audit'" in warnings


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"\n", "has no header"),
        ("a.csv", b"question,question\na,b\n", "the header names 'question' twice"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdnonsense", "damaged zstd file"),
        ("a.json", b'{\n"question": "a",\n', "was the file cut, or the row written on several lines"),
    ],
)
def test_more_unusable_files(go: Go, tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadData, match=re.escape(message)):
        go(tmp_path / name)
