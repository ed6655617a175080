"""Scores against cases worked by hand, and against scikit-learn and statistics from elsewhere."""

import json
import random

import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score

from tasks.evaluate.scores import INVALID, entity_pairs, json_object, judge, macro_f1, same, score, token_f1, wilson


def answer(intent: object, **entities: object) -> str:
    return json.dumps({"intent": intent, "entities": entities})


@pytest.mark.parametrize(("count", "of"), [(0, 10), (10, 10), (1, 3), (37, 400), (399, 400), (1, 1)])
def test_wilson_is_scipys(count: int, of: int) -> None:
    rate, expected = wilson(count, of), binomtest(count, of).proportion_ci(0.95, method="wilson")
    assert (rate.value, rate.low, rate.high) == pytest.approx((count / of, expected.low, expected.high), abs=1e-6)


def test_wilson_by_hand() -> None:
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415 = 0.71674, half width 1.96 sqrt(0.016 + 0.0096037) / 1.38415 = 0.22657
    assert wilson(8, 10)[1:3] == pytest.approx((0.49016, 0.94332), abs=2e-5)


def test_judge_a_right_answer_in_another_spelling() -> None:
    row = judge(
        answer("close", audit="17", hall="north"), '{"entities":{"hall":"north","audit":"17"},\n"intent":"close"}'
    )
    assert row.exact_match and row.json_valid and row.json_valid_after_repair
    assert (row.intent, row.entities, row.f1) == (("close", "close"), (2, 2, 2), None)


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
    assert (row.json_valid, row.json_valid_after_repair) == (valid, repaired)
    assert (row.intent, row.entities, row.exact_match) == (("close", intent), entities, False)


def test_entities_are_bags() -> None:
    assert entity_pairs({"entities": {"tag": ["a", "a", "b"], "n": 1}}).total() == 4
    row = judge(answer("x", tag=["a", "a", "b"]), answer("x", tag=["a", "b", "b"]))
    assert row.entities == (2, 3, 3)
    assert judge('{"entities": [{"t": 1}]}', '{"entities": [{"t": 1}, {"t": 2}]}').entities == (1, 2, 1)


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
    assert scores["means"]["entity_f1"] == pytest.approx(1 / 3)
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
    assert scores["means"]["intent_macro_f1"] == pytest.approx(
        f1_score(expected, given, labels=labels, average="macro")
    )
    declined = ([label == "out_of_scope" for label in column] for column in (expected, given))
    truth, said = map(list, declined)
    assert scores["rates"]["out_of_scope_recall"]["value"] == pytest.approx(recall_score(truth, said))
    assert scores["rates"]["out_of_scope_precision"]["value"] == pytest.approx(precision_score(truth, said))
    everything = [*labels, INVALID]
    matrix = [[scores["confusion"].get(row, {}).get(column, 0) for column in everything] for row in everything]
    assert matrix == confusion_matrix(expected, given, labels=everything).tolist()
    hits, made, wanted = (sum(row.entities[i] for row in judged if row.entities) for i in range(3))
    keys = [(row.entities[0] > 0, row.entities[1] > 0) for row in judged if row.entities]
    assert hits == sum(hit for hit, _ in keys) and made == sum(answered for _, answered in keys) and wanted == 500
    assert scores["means"]["entity_f1"] == pytest.approx(2 * hits / (made + wanted))


def test_macro_f1_counts_intents_that_are_expected() -> None:
    # a: tp 1, expected 2, given 1 -> 2/3; b: tp 1, expected 1, given 1 -> 1; z is only given
    assert macro_f1([("a", "a"), ("a", "z"), ("b", "b")]) == pytest.approx((2 / 3 + 1) / 2)


def test_free_text() -> None:
    assert token_f1("The red valve.", "the red pump .") == pytest.approx(2 * 3 / 8)
    assert (token_f1("", ""), token_f1("a", "")) == (1.0, 0.0)
    scores = score([judge("It is red.", " It is red. "), judge("It is red.", "blue")], "out_of_scope")
    assert list(scores["rates"]) == ["exact_match"] and scores["rates"]["exact_match"]["hits"] == 1
    assert scores["means"] == {"token_f1": 0.5} and scores["confusion"] == {}


def test_no_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        score([], "out_of_scope")
