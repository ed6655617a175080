"""Two models on the same rows: the pairs, the slices, and what refuses to be compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from tasks.core.errors import BadData
from tasks.core.metrics import AnsweredRow, observe
from tasks.core.paired_comparison import (
    Prediction,
    compare,
    compare_slices,
    disagreements,
    read_predictions,
    same_rows,
    slices,
)


def prediction(row: int, right: bool, intent: str = "close", question: str | None = None) -> Prediction:
    expected = json.dumps({"intent": intent, "entities": {}})
    answer = expected if right else '{"intent": "open", "entities": {}}'
    found = {"row": row, "prompt": question or f"question {row} " + "x" * row, "expected": expected, "answer": answer}
    return found | observe(AnsweredRow("", expected, answer))


def predictions(rights: str, intents: str | None = None) -> list[Prediction]:
    """A row a letter: `+` is right; intents by letter, `o` out of scope."""
    names = {"c": "close", "m": "measure", "o": "out_of_scope"}
    return [prediction(i, one == "+", names[(intents or "c" * len(rights))[i]]) for i, one in enumerate(rights)]


def test_all_rows_and_slices_by_hand() -> None:
    intents = "ccccmmmmoooo"
    a, b = predictions("++++++--++--", intents), predictions("+++---+-+++-", intents)
    found = {one.slice: one for one in compare_slices(a, b, "exact_match")}
    assert list(found)[0] == "all"
    whole = found["all"]
    assert (whole.rows, whole.better, whole.worse) == (12, 2, 3)
    assert whole.difference == pytest.approx(-1 / 12) and whole.p == pytest.approx(binomtest(2, 5).pvalue)
    assert whole.low < whole.bound < whole.difference < whole.high
    counts = {name: (one.rows, one.better, one.worse) for name, one in found.items()}
    assert counts["out of scope"] == (4, 1, 0) and counts["in scope"] == (8, 1, 3)
    assert counts["intent close"] == (4, 0, 1) and counts["intent measure"] == (4, 1, 2)
    assert counts["short questions"][0] + counts["medium questions"][0] + counts["long questions"][0] == 12


def test_numbers_are_compared_too() -> None:
    texts = [("the red valve", "the red valve"), ("the red valve", "a blue pump"), ("open it", "open it now")]
    rows: list[list[Prediction]] = []
    for swap in (False, True):
        found = [{"row": i, "prompt": "q", "expected": e, "answer": a} | observe(AnsweredRow("q", e, e if swap else a))
                 for i, (e, a) in enumerate(texts)]  # fmt: skip
        rows.append(found)
    one = compare(same_rows(*rows), "token_f1")
    assert one is not None and (one.better, one.worse, one.b) == (2, 0, 1.0)
    assert one.difference == pytest.approx((0 + 1 + 0.2) / 3) and compare(same_rows(*rows), "json_valid") is None
    assert list(slices(rows[0])) == ["all", "short questions", "medium questions", "long questions"]


def test_disagreements_show_both_answers_losses_first() -> None:
    found = disagreements(predictions("+-+-"), predictions("-++-"))
    assert [(row["row"], row["better"]) for row in found] == [(0, False), (1, True)]
    assert found[0]["a"] == found[0]["expected"] != found[0]["b"]


def test_different_data_cannot_be_compared(tmp_path: Path) -> None:
    a, b = predictions("++"), predictions("++")
    b[1]["prompt"] = "something else"
    with pytest.raises(BadData, match="row 1 is another question"):
        same_rows(a, b)
    with pytest.raises(BadData, match="share no row"):
        same_rows(a, [row | {"row": row["row"] + 10} for row in b])
    assert len(same_rows(a, predictions("+"))) == 1  # one was asked fewer rows
    with pytest.raises(BadData, match="output directory of the evaluate stage"):
        read_predictions(tmp_path / "predictions.jsonl")
    (tmp_path / "predictions.jsonl").touch()
    with pytest.raises(BadData, match="is empty"):
        read_predictions(tmp_path / "predictions.jsonl")


def kept(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_what_was_written_compares_as_what_was_not(tmp_path: Path) -> None:
    a, b = predictions("++-"), predictions("+--")
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in a))
    assert compare_slices(read_predictions(path), kept(b), "exact_match") == compare_slices(a, b, "exact_match")
