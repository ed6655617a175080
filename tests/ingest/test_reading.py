"""What is read is what was written: layouts of JSON, CSV of spreadsheets, nested Parquet, saved datasets, damage."""

import datetime
import gzip
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tasks.core.errors import BadData
from tasks.core.sources import collect_source
from tasks.ingest.read import is_settings_file, read_file
from tasks.ingest.source_files import ReadLimits, UnreadableRow, data_files, file_format, is_exact_split_name
from tests.benchmarks.fuzz_ingest import faults_of, made, read
from tests.ingest.conftest import Run, text_rows

Go = Callable[..., Run]
ROWS = [{"question": f"Why {number}?", "answer": f"For {number}."} for number in range(4)]
LINES = [json.dumps(row) for row in ROWS]
CSV_LINES = [f"{row['question']};{row['answer']}" for row in ROWS]


def values(path: Path, data: bytes | str, **limits: int) -> list[Any]:
    """The rows of a file with this content: parsed, or the reason why they cannot be."""
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    rows = [row for _, row in read_file(path, path.name, ReadLimits(**limits))]
    return [row.reason if isinstance(row, UnreadableRow) else _parsed(row) for row in rows]


def _parsed(row: Any) -> Any:
    return json.loads(row.strip().rstrip(b",")) if isinstance(row, bytes) else row


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        f"[{', '.join(LINES[:2])}]\n[{', '.join(LINES[2:])}]",
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        json.dumps({"data": ROWS}),
        json.dumps({"anything": ROWS}, indent=2),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        ",\n".join(LINES) + ",\n",
        "[\n" + ",\n".join(LINES) + ",\n]",
        "\r".join(LINES),
        "\ufeff" + "\n".join(LINES),
    ],
)
def test_layouts_of_json(tmp_path: Path, suffix: str, text: str) -> None:
    assert values(tmp_path / f"a{suffix}", text) == ROWS


def test_chats_are_lines_and_no_wrapper(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    assert values(tmp_path / "a.jsonl", json.dumps(row)) == [row]
    assert values(tmp_path / "b.json", json.dumps([row, row], indent=2)) == [row, row]


@pytest.mark.parametrize("broken", ['{"question": "open, "answer": 1}', '{"question": "q"', "[1, 2, {", "nothing", '"'])
@pytest.mark.parametrize("separator", [",\n", ", "])
def test_a_broken_element_takes_no_other_with_it(tmp_path: Path, broken: str, separator: str) -> None:
    rows = values(tmp_path / "a.json", b"[]")
    path = tmp_path / "b.json"
    path.write_text(f"[{separator.join([*LINES[:2], broken, *LINES[2:]])}]")
    rows = [row for _, row in read_file(path, path.name)]
    assert [json.loads(row) for row in (*rows[:2], *rows[-2:]) if isinstance(row, bytes)] == ROWS
    assert 5 <= len(rows) <= 6


def test_what_follows_a_wrapped_list_is_told(tmp_path: Path) -> None:
    text = '{"data": [' + ", ".join(LINES) + '], "version": {"a": 1}}'
    *rows, reason = values(tmp_path / "a.json", text)
    assert rows == ROWS
    assert "is no row" in reason


@pytest.mark.parametrize(
    "head",
    ["sep=;\nquestion;answer", '"question";"answer"', " question ; Answer ", "question;answer;;", "QUESTION;ANSWER"],
)
def test_headers_of_spreadsheets(tmp_path: Path, head: str) -> None:
    tail = ";;" if head.endswith(";;") else ""
    assert values(tmp_path / "a.csv", "\r\n".join([head, *(line + tail for line in CSV_LINES)])) == ROWS


def test_a_comma_in_a_quoted_header_is_no_delimiter(tmp_path: Path) -> None:
    text = 'question;answer;"note, if any, or not"\nWhy 0?;For 0.;n'
    assert values(tmp_path / "a.csv", text) == [{**ROWS[0], "note, if any, or not": "n"}]


def test_an_open_quote_takes_no_other_row(tmp_path: Path) -> None:
    lines = ["question;answer", CSV_LINES[0], '"open;x', *CSV_LINES[1:]]
    first, reason, *others = values(tmp_path / "a.csv", "\n".join(lines))
    assert [first, *others] == ROWS
    assert "is a quote left open" in reason


def test_rows_over_the_limit_are_quarantined_alone(tmp_path: Path) -> None:
    long = json.dumps({"question": "x" * 5000, "answer": "y"})
    lines = [LINES[0], long, *LINES[1:]]
    rows = [row for _, row in _rows(tmp_path / "a.jsonl", "\n".join(lines), 2000)]
    assert len(rows) == 5
    assert [json.loads(row) for row in (rows[0], *rows[2:])] == ROWS
    array = values(tmp_path / "a.json", f"[{', '.join(lines)}]", row_bytes=2000)
    assert [row for row in array if isinstance(row, dict)] == ROWS
    assert "raise max_row_bytes" in array[1]
    cells = ["question;answer", CSV_LINES[0], "x" * 5000 + ";y", '"' + "x\n" * 3000 + '";y', *CSV_LINES[1:]]
    table = values(tmp_path / "a.csv", "\n".join(cells), row_bytes=2000)
    assert [row for row in table if isinstance(row, dict)] == ROWS
    assert "raise max_row_bytes" in table[1]


def _rows(path: Path, text: str, row_bytes: int) -> list[Any]:
    path.write_text(text)
    return list(read_file(path, path.name, ReadLimits(row_bytes)))


def test_a_long_line_in_a_run(go: Go, tmp_path: Path) -> None:
    rows = text_rows(80)
    lines = [json.dumps(row) for row in rows]
    lines.insert(40, json.dumps({"question": "x" * 9_000_000, "answer": "y"}))
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    run = go(path, max_row_bytes=1 << 20)
    assert len(run.all()) == 80
    ((reason, line),) = [(entry["reason"], entry["line"]) for entry in run.quarantine()]
    assert line == 41
    assert "max_row_bytes=1048576" in reason


def test_a_bomb_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", 1) as file:
        for _ in range(300):
            file.write(b" " * (1 << 20))
    with pytest.raises(BadData, match="more than 200 times its size; if that is right, raise max_expansion"):
        list(read_file(path, path.name))
    assert list(read_file(path, path.name, ReadLimits(expansion=2000))) == []


def test_nested_parquet(tmp_path: Path) -> None:
    day = datetime.datetime(2025, 1, 2, 3, 4, 5)  # noqa: DTZ001
    answers = [{"intent": "a", "when": day, "price": Decimal("1.10")}, {"intent": "b", "entities": {"x": "1"}}]
    table = pyarrow.table({"question": ["Why?", "How?"], "answer": answers})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = (row for _, row in read_file(tmp_path / "a.parquet", "a.parquet"))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert {**first["answer"], "price": first["answer"]["price"].text} == {
        "intent": "a",
        "when": "2025-01-02T03:04:05",
        "price": "1.10",
    }
    assert second["answer"] == {"intent": "b", "entities": {"x": "1"}}


def test_maps_and_json_columns(tmp_path: Path) -> None:
    maps = pyarrow.array([[("a", "1"), ("b", None)]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    texts = pyarrow.array(['{"n": 1.10}'], pyarrow.json_())
    pyarrow.parquet.write_table(pyarrow.table({"m": maps, "j": texts}), tmp_path / "a.parquet")
    ((_, row),) = read_file(tmp_path / "a.parquet", "a.parquet")
    assert isinstance(row, dict)
    assert row["m"] == {"a": "1"}
    assert row["j"]["n"].text == "1.10"


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
    ).save_to_disk(str(saved))
    (saved / "train" / "cache-0123.arrow").write_bytes(b"left over")
    found = {split: [row for _, row in read_file(path, path.name)] for path, split in data_files(saved)[0]}
    assert found == {"train": ROWS, "test": ROWS[:1]}


def test_a_hub_dataset_is_read_as_its_files_are(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    rows = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": {"n": 1}, "weight": 1}]}
    ]
    (copy / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    target = tmp_path / "target"
    target.mkdir()
    collect_source("train", f"hub:{copy}", target, lambda _: None)
    assert (target / "files/train/train.jsonl").read_bytes() == (copy / "train.jsonl").read_bytes()


def test_settings_beside_the_data_are_passed_over_and_told(go: Go, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows(60)))
    (files / "config.json").write_text('{"name": "x", "labels": ["a"]}')
    run = go(files)
    assert len(run.all()) == 60
    assert "config.json was skipped: it is no data file" in run.report.warnings
    (tmp_path / "one.json").write_text(LINES[0])
    assert not is_settings_file(tmp_path / "one.json")


def test_a_split_by_the_beginning_of_a_name_is_told(go: Go, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number, name in enumerate(("office.jsonl", "dev-ops.jsonl", "test.jsonl")):
        (files / name).write_text("".join(json.dumps(row) + "\n" for row in text_rows(60, number)))
    told = [warning for warning in go(files).report.warnings if "is read as" in warning]
    assert len(told) == 1
    assert told[0].startswith("dev-ops.jsonl is read as validation (60 rows)")


@pytest.mark.parametrize(
    ("name", "is_exact"),
    [
        ("test.jsonl", True),
        ("data/test-00000-of-00001.parquet", True),
        ("dev/a.jsonl", True),
        ("test-rig.jsonl", False),
    ],
)
def test_exact_names_of_splits(name: str, is_exact: bool) -> None:
    assert is_exact_split_name(Path(name)) == is_exact
    assert file_format(Path("cache-12.arrow")) == ""


def test_numbers_and_keys_in_a_run(go: Go, tmp_path: Path) -> None:
    answers = [f'{{"id": 1234567890123456789012{number}, "price": 1.10}}' for number in range(10)]
    lines = [f'{{"command": "Number {number}?", "json": {answer}}}' for number, answer in enumerate(answers)]
    lines += [f'{{"command": "More of {number}?", "json": {{"id": {number}, "price": 2.5}}}}' for number in range(60)]
    bad = ['{"id": 1e400, "price": 1}', '{"id": 1, "id": 2, "price": 1}', '{"id": ' + "9" * 5000 + ', "price": 1}']
    lines += [f'{{"command": "Bad {number}?", "json": {answer}}}' for number, answer in enumerate(bad)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    run = go(path)
    written = {row.messages[0].content: row.answer for row in run.all()}
    assert [written[f"Number {number}?"] for number in range(10)] == answers
    assert len(written) == 70
    reasons = [entry["reason"] for entry in run.quarantine()]
    assert ["out of range" in reasons[0], "stands twice" in reasons[1], "5000 digits" in reasons[2]] == [True] * 3


@pytest.mark.parametrize("seed", range(150))
def test_damaged_files_lose_no_row(tmp_path: Path, seed: int) -> None:
    from random import Random

    file = made(Random(seed))
    path = tmp_path / f"rows{file.suffix}"
    path.write_bytes(file.data)
    assert faults_of(file, read(path, tmp_path / "lines")) == []
