"""Scores against cases worked by hand, and against scikit-learn and statistics from elsewhere."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score

from tasks.core.errors import BadConfig
from tasks.core.metrics import AnsweredRow, observe
from tasks.core.metrics.definitions.entities import entity_pairs
from tasks.core.metrics.definitions.free_text import rouge_l, token_f1
from tasks.core.metrics.definitions.intents import INVALID
from tasks.core.metrics.json_values import canonical_json, json_object
from tasks.evaluate.schema import SchemaCheck, infer_schema, schema_validator
from tasks.evaluate.scores import score
from tasks.evaluate.user_metric import load_metric


def judge(expected: str, answer: str, validator: SchemaCheck | None = None) -> dict[str, Any]:
    return observe(AnsweredRow("", expected, answer, validator))


def same(left: object, right: object) -> bool:
    return canonical_json(left) == canonical_json(right)


def answer(intent: object, **entities: object) -> str:
    return json.dumps({"intent": intent, "entities": entities})


def test_judge_a_right_answer_in_another_spelling() -> None:
    row = judge(
        answer("close", audit="17", hall="north"), '{"entities":{"hall":"north","audit":"17"},\n"intent":"close"}'
    )
    assert row["exact_match"] and row["json_valid"] and row["json_valid_after_repair"]
    assert (row["intent"], row["entities"], row["f1"]) == (("close", "close"), (2, 2, 2), None)


@pytest.mark.parametrize(
    ("given", "valid", "repaired", "intent", "entities"),
    [
        (answer("close", audit="18", extra="x"), True, True, "close", (1, 3, 2)),
        (answer("open"), True, True, "open", (0, 0, 2)),
        (answer(["close"]), True, True, INVALID, (0, 0, 2)),
        ('{"intent": "close", "entities": {"audit": "17", "hall": "north"}', False, True, INVALID, (0, 0, 2)),
        ("{'intent': 'close'}", False, True, INVALID, (0, 0, 2)),
        ('Sure! {"intent": "close"}', False, True, INVALID, (0, 0, 2)),
        ('{"intent": NaN}', False, True, INVALID, (0, 0, 2)),
        ("[1]", False, False, INVALID, (0, 0, 2)),
        ("I cannot say", False, False, INVALID, (0, 0, 2)),
        ("", False, False, INVALID, (0, 0, 2)),
    ],
)
def test_judge_wrong_answers(
    given: str, valid: bool, repaired: bool, intent: str, entities: tuple[int, int, int]
) -> None:
    expected = answer("close", audit="17", hall="north")
    if given == answer("close", audit="18", extra="x"):
        given = answer("close", hall="north", audit="18", extra="x")
    row = judge(expected, given)
    assert (row["json_valid"], row["json_valid_after_repair"]) == (valid, repaired)
    assert (row["intent"], row["entities"], row["exact_match"]) == (("close", intent), entities, False)


def test_entities_are_bags() -> None:
    assert entity_pairs({"entities": {"tag": ["a", "a", "b"], "n": 1}}).total() == 4
    row = judge(answer("x", tag=["a", "a", "b"]), answer("x", tag=["a", "b", "b"]))
    assert row["entities"] == (2, 3, 3)
    assert judge('{"entities": [{"t": 1}]}', '{"entities": [{"t": 1}, {"t": 2}]}')["entities"] == (1, 2, 1)


def test_json_equality_knows_types() -> None:
    assert same({"a": 1, "b": [1]}, {"b": [1], "a": 1})
    assert not same({"a": 1}, {"a": True}) and not same({"a": 1}, {"a": "1"}) and not same([1, 2], [2, 1])
    assert json_object("[{}]") is None and json_object('{"a": Infinity}') is None and json_object("{}") == {}


def test_score_by_hand() -> None:
    out = answer("out_of_scope")
    pairs = [
        (answer("close", audit="1"), answer("close", audit="1")),  # right
        (answer("close", audit="2"), answer("close", audit="3")),  # wrong entity
        (answer("close", audit="4"), out),  # declined what it should do
        (out, out),
        (out, answer("close", audit="5")),
        (out, "no json"),
    ]
    scores = score([judge(*pair) for pair in pairs], "out_of_scope")
    values = {name: (rate["hits"], rate["of"]) for name, rate in scores["rates"].items()}
    assert values == {
        "exact_match": (2, 6),
        "json_valid": (5, 6),
        "json_valid_after_repair": (5, 6),
        "intent_accuracy": (3, 6),
        "out_of_scope_recall": (1, 3),
        "out_of_scope_precision": (1, 2),
        "entity_precision": (1, 3),
        "entity_recall": (1, 3),
    }
    assert scores["means"]["entity_f1"]["value"] == pytest.approx(1 / 3)
    assert scores["confusion"] == {
        "close": {"close": 2, "out_of_scope": 1},
        "out_of_scope": {INVALID: 1, "close": 1, "out_of_scope": 1},
    }


def test_intents_and_entities_agree_with_sklearn() -> None:
    chance = random.Random(7)
    labels = ["a", "b", "c", "out_of_scope"]
    expected = [chance.choice(labels) for _ in range(500)]
    given = [label if chance.random() < 0.7 else chance.choice([*labels, INVALID]) for label in expected]
    judged = [
        judge(answer(left, key=chance.choice("xy")), answer(right, key="x") if right != INVALID else "?")
        for left, right in zip(expected, given, strict=True)
    ]
    scores = score(judged, "out_of_scope")
    assert scores["rates"]["intent_accuracy"]["value"] == pytest.approx(accuracy_score(expected, given))
    assert scores["means"]["intent_macro_f1"]["value"] == pytest.approx(
        f1_score(expected, given, labels=labels, average="macro")
    )
    declined = ([label == "out_of_scope" for label in column] for column in (expected, given))
    truth, said = map(list, declined)
    assert scores["rates"]["out_of_scope_recall"]["value"] == pytest.approx(recall_score(truth, said))
    assert scores["rates"]["out_of_scope_precision"]["value"] == pytest.approx(precision_score(truth, said))
    everything = [*labels, INVALID]
    matrix = [[scores["confusion"].get(row, {}).get(column, 0) for column in everything] for row in everything]
    assert matrix == confusion_matrix(expected, given, labels=everything).tolist()
    hits, made, wanted = (sum(row["entities"][i] for row in judged if row["entities"]) for i in range(3))
    keys = [(row["entities"][0] > 0, row["entities"][1] > 0) for row in judged if row["entities"]]
    assert hits == sum(hit for hit, _ in keys) and made == sum(answered for _, answered in keys) and wanted == 500
    assert scores["means"]["entity_f1"]["value"] == pytest.approx(2 * hits / (made + wanted))


def test_macro_f1_counts_intents_that_are_expected() -> None:
    # a: tp 1, expected 2, given 1 -> 2/3; b: tp 1, expected 1, given 1 -> 1; z is only given
    rows = [{"exact_match": True, "intent": pair} for pair in (("a", "a"), ("a", "z"), ("b", "b"))]
    scores = score(rows, "z")
    assert scores["means"]["intent_macro_f1"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["intents"]["a"] == {"rows": 2, "precision": 1, "recall": 0.5, "f1": 2 / 3, "exact_match": 1}


def test_f1_intervals_narrow_with_the_rows_and_hold_the_value() -> None:
    def interval(times: int) -> tuple[float, float, float]:
        pairs = [("a", "a")] * 8 + [("a", "b")] * 2 + [("b", "b")] * 9 + [("b", "a")]
        rows = [judge(answer(left, k="x"), answer(right, k="x" if left == right else "y")) for left, right in pairs]
        means = score(rows * times, "-")["means"]
        assert means["entity_f1"]["value"] == pytest.approx(17 / 20)
        assert 0 < means["entity_f1"]["low"] < 17 / 20 < means["entity_f1"]["high"] <= 1
        return tuple(means["intent_macro_f1"].values())

    few, many = interval(2), interval(50)
    assert few[0] == many[0] and few[1] < many[1] < many[0] < many[2] < few[2]
    assert 0.15 < few[2] - few[1] < 0.35 and 0.03 < many[2] - many[1] < 0.06


def test_free_text() -> None:
    assert token_f1("The red valve.", "the red pump .") == pytest.approx(2 * 3 / 8)
    assert (token_f1("", ""), token_f1("a", "")) == (1.0, 0.0)
    scores = score([judge("It is red.", " It is red. "), judge("It is red.", "blue")], "out_of_scope")
    assert list(scores["rates"]) == ["exact_match"] and scores["rates"]["exact_match"]["hits"] == 1
    assert {name: mean["value"] for name, mean in scores["means"].items()} == {"token_f1": 0.5, "rouge_l": 0.5}
    assert scores["confusion"] == {} and scores["intents"] == {}


def test_rouge_l_is_lins() -> None:
    # Lin 2004, section 3: LCS of "police killed the gunman" with these two is 3 and 2 words of 4
    assert rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
    assert rouge_l("Open the valve!", "open valve") == pytest.approx(2 * 2 / 5)
    assert (rouge_l("", ""), rouge_l("a", "...")) == (1.0, 0.0)


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        score([], "out_of_scope")


def test_a_schema_is_what_training_answers_have_in_common() -> None:
    answers = [
        '{"intent": "close", "entities": {"audit": "17", "hall": "north"}}',
        '{"intent": "close", "entities": {"audit": "18"}}',
        '{"intent": "count", "entities": {"n": 3, "parts": ["a"]}, "note": null}',
        '{"intent": "count", "entities": {"n": 2.5, "parts": []}, "note": "x"}',
        '{"intent": "out_of_scope", "entities": {}}',
    ]
    schema = infer_schema(answers)
    assert schema is not None
    close, count, _ = schema["anyOf"]
    assert close["properties"]["intent"] == {"const": "close"} and list(close["properties"]) == ["intent", "entities"]
    assert close["properties"]["entities"]["required"] == ["audit"]
    assert count["properties"]["entities"]["properties"] == {
        "n": {"type": "number"},
        "parts": {"type": "array", "items": {"type": "string"}},
    }
    assert count["properties"]["note"] == {"anyOf": [{"type": "null"}, {"type": "string"}]}
    keeps = schema_validator(schema)
    assert all(keeps(json.loads(one)) for one in answers)
    for wrong in (
        '{"intent": "close", "entities": {"hall": "north"}}',
        '{"intent": "close", "entities": {"audit": 17}}',
        '{"intent": "close", "entities": {"audit": "17", "bay": "2"}}',
        '{"intent": "other", "entities": {}}',
        '{"intent": "out_of_scope"}',
        "{}",
    ):
        assert not keeps(json.loads(wrong)), wrong
    row = judge(answers[1], '{"intent": "close", "entities": {"hall": "north"}}', keeps)
    assert row["json_valid"] and row["schema_valid"] is False
    assert judge(answers[1], "no", keeps)["schema_valid"] is False
    assert infer_schema(["free text", "{}"]) is None and infer_schema([]) is None
    assert infer_schema(['{"a": 1}', '{"a": 2, "b": true}']) == {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }


def test_own_metric_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def words(question, expected, answer):\n    return len(answer.split()) / 4\n"
    source += "def text(*_):\n    return 'good'\nx = 1\n"
    (tmp_path / "team_metrics.py").write_text(source)
    with pytest.raises(BadConfig, match="put the module's directory on PYTHONPATH"):
        load_metric("team_metrics:words")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_metric("team_metrics:words")("q", "e", "one two") == 0.5
    with pytest.raises(BadConfig, match="has no nothing"):
        load_metric("team_metrics:nothing")
    with pytest.raises(BadConfig, match="is a int, not a function"):
        load_metric("team_metrics:x")
    for name, answer in (("text", "a"), ("words", "one two three four five")):
        with pytest.raises(BadConfig, match="gave .* for the question 'q': it must be a number from 0 to 1"):
            load_metric(f"team_metrics:{name}")("q", "e", answer)
