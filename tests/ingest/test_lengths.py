"""Token lengths: rows over the limit are dropped, cut or refused, and never silently."""

import json
from collections.abc import Callable

import polars as pl
import pytest

from tasks.core.errors import BadData
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.engine.data.chat_template import count_tokens, encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.ingest.lengths import tokens_per_byte
from tasks.ingest.tokens import summarise
from tests.ingest.conftest import Run, text_rows

Go = Callable[..., Run]
LIMIT = 250


def long_rows() -> list[dict[str, str]]:
    rows = text_rows(100)
    for number in (20, 40):
        rows[number]["question"] = "turn the valve " * (10 * number)
    rows[60]["answer"] = "never ends " * 200
    return rows


def test_long_rows_go_to_quarantine_and_advice_says_what_a_longer_context_saves(go: Go, tokenizer: ModelDir) -> None:
    ran = go(long_rows(), tokenizer, max_length=LIMIT)
    loaded = load_tokenizer(tokenizer)
    reasons = {line["line"]: line["reason"] for line in ran.quarantine()}
    assert sorted(reasons) == [21, 41, 61]
    for line in ran.quarantine():
        tokens = len(encode(loaded, Row.model_validate_json(line["raw"])).input_ids)
        assert reasons[line["line"]] == f"{tokens} tokens, more than max_length={LIMIT}"
    lengths = [len(encode(loaded, row).input_ids) for row in ran.all()]
    assert max(lengths) <= LIMIT and len(lengths) == 97
    profile = ran.profile()["tokens"]
    assert (profile["over"], profile["sampled"], profile["p0"]) == (3, 100, min(lengths))
    saved = {int(context): count for context, count in profile["saved"].items()}
    assert list(saved)[0] == 2 * LIMIT and list(saved.values())[-1] == 3
    warning_start = "3 rows are longer than max_length=250 tokens and in quarantine; 500 tokens would save"
    assert any(warning_start in warning for warning in ran.report.warnings)
    assert "would save" in (ran.out / "report/profile.md").read_text()


def test_a_cut_row_keeps_its_answer_and_is_listed(go: Go, tokenizer: ModelDir) -> None:
    ran = go(long_rows(), tokenizer, max_length=LIMIT, over_long="cut")
    cut = [json.loads(line) for line in (ran.out / "cut.jsonl").read_text().splitlines()]
    assert [line["line"] for line in cut] == [21, 41] and cut[0]["max_length"] == LIMIT < cut[0]["tokens"]
    assert [line["line"] for line in ran.quarantine()] == [61]  # its answer alone is too long, and an answer is not cut
    loaded, answers = load_tokenizer(tokenizer), {row["answer"] for row in long_rows()}
    rows = ran.all()
    lengths = [len(encode(loaded, row).input_ids) for row in rows]
    assert len(rows) == 99 and LIMIT - 5 <= max(lengths) <= LIMIT
    assert all(row.answer in answers for row in rows)


def test_a_cut_row_with_another_fault_is_quarantined(go: Go, tokenizer: ModelDir) -> None:
    rows = long_rows()
    rows.append(rows[20])
    ran = go(rows, tokenizer, max_length=LIMIT, over_long="cut")
    assert {line["line"]: line["reason"] for line in ran.quarantine()}[101] == "duplicate of train.jsonl:21"
    cut = [json.loads(line)["line"] for line in (ran.out / "cut.jsonl").read_text().splitlines()]
    assert cut == [21, 41] and len(ran.all()) == 99


def test_fail_names_the_first_row(go: Go, tokenizer: ModelDir) -> None:
    with pytest.raises(
        BadData, match=r"3 rows are longer than max_length=250 tokens \(first: train.jsonl:21 with \d+\)"
    ):
        go(long_rows(), tokenizer, max_length=LIMIT, over_long="fail")


def test_no_row_that_is_too_long_is_ruled_out_by_its_bytes(tokenizer: ModelDir) -> None:
    """Texts with the most tokens a byte that there are: unknown letters, digits, emoji, control pictures."""
    loaded = load_tokenizer(tokenizer)
    ratio, fixed = tokens_per_byte(loaded)
    assert ratio == 1
    for text in ("17" * 50, "Ωñ漢字" * 20, "🔧\u200d" * 20, '{"a": [1, 2]}' * 9, "\\\n\t" * 30, "a"):
        turns = [Message(role=role, content=text) for role in ("system", "user", "assistant", "user", "assistant")]
        row = Row(messages=turns)
        line = json.dumps(row.model_dump(exclude={"labels"}), ensure_ascii=False, separators=(",", ":"))
        assert count_tokens(loaded, [row])[0] <= ratio * len(line.encode()) + fixed


def test_saved_rows_are_counted_up_to_the_longest() -> None:
    summary = summarise(pl.Series([10, 20, 30]), pl.Series([150, 250, 900]), 5, 100)
    assert summary.saved == {200: 1, 400: 2, 800: 2, 1600: 3}
    assert sum(summary.histogram) == 3 and summary.p100 == 30
