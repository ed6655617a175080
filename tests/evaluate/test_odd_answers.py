"""One bad answer never ends an evaluation, and what is scored is what was said."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.core.metrics import AnsweredRow, observe
from tasks.core.metrics.definitions.entities import entity_pairs
from tasks.core.metrics.definitions.free_text import rouge_l, token_f1
from tasks.core.metrics.json_values import comparable_json, json_object
from tasks.core.paired_comparison import read_predictions
from tasks.evaluate.outputs import write_outputs
from tasks.evaluate.schema import decoding_schema, infer_schema, schema_validator
from tasks.evaluate.scores import score

EXPECTED = '{"intent": "close", "entities": {"audit": "17"}}'
TWO_TO_SURROGATE = '{"intent": "\\ud800", "entities": {}}'
ODD = {
    "open brackets": "{" * 100_000,
    "open lists": '{"a": ' + "[" * 100_000,
    "nested": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "nested at the limit": '{"a": ' * 900 + "1" + "}" * 900,
    "half a surrogate pair": TWO_TO_SURROGATE,
    "one token": "a" * 10_000,
    "one token in a key": '{"' + "a " * 10_000,
    "one emoji": "{" + "😀" * 10_000,
    "line ends": "{" + "\n" * 10_000,
    "commas": "{" + "," * 10_000,
    "marks": "\u0301" * 10_000,
    "objects": "{}" * 10_000,
    "long integer": '{"intent": "close", "entities": {"audit": ' + "9" * 5000 + "}}",
    "large number": '{"intent": "close", "entities": {"audit": 1e400}}',
    "larger number": '{"intent": "close", "entities": {"audit": 1e99999999999999999999}}',
    "mathtext": '{"intent": "fee_$5_to_$ \\\\frac{", "entities": {}}',
    "markdown": '{"intent": "a|b `c` <b>\\n# x", "entities": {}}',
    "escape": '{"intent": "\\u001b[31mred", "entities": {}}',
    "NUL": "\0",
    "nothing": "",
    "long name": json.dumps({"intent": "x" * 400, "entities": {}}),
}


@pytest.fixture(scope="module")
def observed() -> dict[str, dict[str, Any]]:
    keeps = schema_validator(infer_schema([EXPECTED]) or {})
    rows = {}
    for name, answer in ODD.items():
        start = time.monotonic()
        rows[name] = observe(AnsweredRow("Close audit 17.", EXPECTED, answer, keeps))
        observe(AnsweredRow("Why?", "Because of the valve.", answer))
        assert time.monotonic() - start < 5, name
    return rows


def test_every_answer_is_judged_and_written(observed: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    rows = list(observed.values())
    assert not any(row["exact_match"] for row in rows)
    scores = score(rows, "out_of_scope") | {"cut_answers": 1, "max_new_tokens": 40}
    predictions = [
        {
            "row": number,
            "prompt": f"q \ud800 {name}",
            "expected": EXPECTED,
            "answer": ODD[name],
            **row,
            "cut": not number,
        }
        for number, (name, row) in enumerate(observed.items())
    ]
    write_outputs(tmp_path, predictions, scores, None, 20)
    assert read_predictions(tmp_path / "predictions.jsonl") == json.loads(json.dumps(predictions))
    assert (tmp_path / "report/confusion.png").stat().st_size > 5000
    page = (tmp_path / "report/mistakes.md").read_text(encoding="utf-8")
    assert "1 were cut at max_new_tokens" in page and "\x1b" not in page and "\0" not in page


def test_many_intents_make_a_picture_that_can_be_drawn(tmp_path: Path) -> None:
    answers = [json.dumps({"intent": f"intent {number}", "entities": {}}) for number in range(300)]
    rows = [observe(AnsweredRow("q", answer, answers[number - 1])) for number, answer in enumerate(answers)]
    scores = score(rows, "-") | {"cut_answers": 0}
    write_outputs(tmp_path, [{"row": 0, "prompt": "", "expected": "", "answer": "", **rows[0]}], scores, None, 1)
    assert len(scores["confusion"]) == 300 and (tmp_path / "report/confusion.png").is_file()


def test_numbers_that_python_does_not_hold_are_read(observed: dict[str, dict[str, Any]]) -> None:
    assert observed["long integer"]["json_valid"] and observed["large number"]["json_valid"]
    assert observed["larger number"]["json_valid"] is False
    for name in ("half a surrogate pair", "nested", "nested at the limit", "open brackets", "nothing"):
        assert observed[name]["json_valid"] is False, name
    long = json.dumps({"n": int("9" * 4000)})
    assert infer_schema([long, '{"n": ' + "9" * 5000 + "}"]) == infer_schema(['{"n": 1}'])
    keeps = schema_validator(infer_schema(['{"n": 1}']) or {})
    assert keeps(json_object('{"n": ' + "9" * 5000 + "}")) and not keeps(json_object('{"n": 1e-400}'))
    assert decoding_schema({}, ['{"n": ' + "9" * 5000 + "}"])["x-guidance"]["item_separator"] == ", "
    assert infer_schema(["{" * 100_000]) is None


@pytest.mark.parametrize(
    ("expected", "answer", "equal"),
    [
        ('{"n": 1}', '{"n": 1.0}', True),
        ('{"n": 1.10}', '{"n": 11e-1}', True),
        ('{"n": 100}', '{"n": 1e2}', True),
        ('{"n": 0}', '{"n": -0.0}', True),
        ('{"n": 12345678901234567890123}', '{"n": 12345678901234567890124}', False),
        ('{"n": ' + "9" * 5000 + "}", '{ "n":' + "9" * 5000 + "}", True),
        ('{"n": ' + "9" * 5000 + "}", '{ "n":' + "9" * 4999 + "8}", False),
        ('{"n": 1}', '{"n": true}', False),
        ('{"n": 1}', '{"n": "1"}', False),
        ('{"n": [1, 2]}', '{"n":[1.0,2]}', True),
        ('{"n": [1, 2]}', '{"n": [2, 1]}', False),
        ('{"n": {"a": [null, {"b": 2}]}}', '{"n":{"a":[null,{"b":2.0}]}}', True),
        ("[1, 2]", "[1,2.0]", True),
        ("[1, 2]", "[2, 1]", False),
        ("42", "42.0", True),
        ("42", "forty-two", False),
        ("true", "True", False),
        ('"a"', '"a"', True),
        ("It is red.", " It is red. ", True),
    ],
)
def test_json_compares_by_value(expected: str, answer: str, equal: bool) -> None:
    assert observe(AnsweredRow("", expected, answer))["exact_match"] is equal


def test_a_text_that_is_no_json_compares_as_text() -> None:
    assert comparable_json("01") is None and comparable_json("NaN") is None and comparable_json("null") is None


def test_nulls_are_no_entities() -> None:
    assert entity_pairs({"entities": {"a": None, "b": ["x", None], "c": 1}}).total() == 2
    padded = '{"intent": "close", "entities": {"audit": "17", "hall": null}}'
    assert observe(AnsweredRow("", EXPECTED, padded))["entities"] == (1, 1, 1)


@pytest.mark.parametrize(
    ("expected", "same", "other"),
    [
        ("👍", "👍", "👎"),
        ("Great 👍🏽", "great 👍🏽!", "Great 👎🏽"),
        ("图书馆星期一休息", "图书馆星期一休息。", "今天天气很好"),
        ("図書館は月曜日が休みです", "図書館は月曜日が休みです。", "きょうはあつい"),
        ("ห้องสมุดปิดวันจันทร์", "ห้องสมุดปิดวันจันทร์!", "กขค"),
        ("हिन्दी भाषा", "हिन्दी भाषा।", "हन्द भष"),
        ("Cafe\u0301", "café", "cafe"),
        ("5 €", "5 €.", "5 ¥"),
    ],
)
def test_words_of_every_script(expected: str, same: str, other: str) -> None:
    assert rouge_l(expected, same) == 1.0 and token_f1(expected, same) > 0.6
    worse = rouge_l(expected, other)
    assert worse is not None and worse < 1 and token_f1(expected, other) < token_f1(expected, same)


def test_a_part_of_a_chinese_answer_is_partly_right() -> None:
    assert token_f1("图书馆星期一休息", "图书馆星期二休息") == pytest.approx(7 / 8)
    assert rouge_l("图书馆星期一休息", "图书馆星期二休息") == pytest.approx(7 / 8)


def test_rouge_says_nothing_where_no_word_is_expected() -> None:
    assert rouge_l("+", "-") is None and token_f1("+", "-") == 0.0 and token_f1("+", "+") == 1.0
    row = observe(AnsweredRow("", "+", "-"))
    assert row["rouge_l"] is None and "rouge_l" not in score([row], "-")["means"]
