"""Every score of 500 generated rows equals scikit-learn's, rouge-score's or jsonschema's, which share no code."""

import json
import random
from typing import Any

import json_repair
import jsonschema
import pytest
import regex
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score
from sklearn.preprocessing import MultiLabelBinarizer

from tasks.core.metrics import AnsweredRow, observe
from tasks.core.metrics.definitions.free_text import tokens, words
from tasks.core.metrics.definitions.intents import INVALID
from tasks.evaluate.schema import infer_schema, schema_validator
from tasks.evaluate.scores import score

ROWS = 500
INTENTS = ["close", "open", "fee_$5", "out_of_scope"]
SCRIPTS = [
    "valve",
    "pump",
    "the",
    "Größe",
    "red",
    "l'eau",
    "图书馆",
    "休み",
    "ห้อง",
    "हिन्दी",
    "👍🏽",
    "👎",
    "12.5",
    "bay-9",
    "!",
    "…",
]


def generated_json(chance: random.Random) -> dict[str, Any]:
    entities = {key: chance.choice([1, 2, "x", "y"]) for key in chance.sample("abc", chance.randint(0, 3))}
    return {"intent": chance.choice(INTENTS), "entities": entities}


def changed(value: dict[str, Any], chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.4:
        numbers = {key: float(item) if isinstance(item, int) else item for key, item in value["entities"].items()}
        return json.dumps({"entities": numbers, "intent": value["intent"]}, indent=chance.choice([None, 1]))
    if kind < 0.8:
        return json.dumps(generated_json(chance))
    return chance.choice(["no json", json.dumps(value)[:-1], "[1]", "", json.dumps({**value, "note": None})])


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    chance = random.Random(14)
    values = [generated_json(chance) for _ in range(ROWS)]
    return [(json.dumps(value), changed(value, chance)) for value in values]


def parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def test_scores_of_json_answers(rows: list[tuple[str, str]]) -> None:
    schema = infer_schema([expected for expected, _ in rows])
    assert schema is not None
    keeps = schema_validator(schema)
    scores = score([observe(AnsweredRow("", *row, keeps)) for row in rows], "out_of_scope")
    means = {name: mean["value"] for name, mean in scores["means"].items()}
    rates = {name: rate["value"] for name, rate in scores["rates"].items()}
    expected = [json.loads(text) for text, _ in rows]
    given = [parsed(text) for _, text in rows]
    right = [left == value for left, value in zip(expected, given, strict=True)]
    assert rates["exact_match"] == pytest.approx(accuracy_score([True] * ROWS, right))
    assert rates["json_valid"] == pytest.approx(sum(value is not None for value in given) / ROWS)
    repaired = [json_repair.loads(text) if "{" in text else None for _, text in rows]
    mended = [
        value is not None or (isinstance(other, dict) and bool(other))
        for value, other in zip(given, repaired, strict=True)
    ]
    assert rates["json_valid_after_repair"] == pytest.approx(sum(mended) / ROWS)
    fits = [value is not None and jsonschema.Draft202012Validator(schema).is_valid(value) for value in given]
    assert rates["schema_valid"] == pytest.approx(sum(fits) / ROWS)

    names = [value["intent"] for value in expected]
    said = [(value or {}).get("intent", INVALID) for value in given]
    assert rates["intent_accuracy"] == pytest.approx(accuracy_score(names, said))
    assert means["intent_macro_f1"] == pytest.approx(f1_score(names, said, labels=INTENTS, average="macro"))
    declined, was = ([name == "out_of_scope" for name in column] for column in (said, names))
    assert rates["out_of_scope_recall"] == pytest.approx(recall_score(was, declined))
    assert rates["out_of_scope_precision"] == pytest.approx(precision_score(was, declined))
    labels = [*INTENTS, INVALID]
    table = [[scores["confusion"].get(row, {}).get(column, 0) for column in labels] for row in labels]
    assert table == confusion_matrix(names, said, labels=labels).tolist()
    for name in INTENTS:
        for key, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            assert scores["intents"][name][key] == pytest.approx(
                function(names, said, labels=[name], average="macro", zero_division=0)
            )

    binary = MultiLabelBinarizer()
    pairs = [[entity_set(value) for value in column] for column in (expected, given)]
    binary.fit([*pairs[0], *pairs[1]])
    truth, answers = (binary.transform(column) for column in pairs)
    assert means["entity_f1"] == pytest.approx(f1_score(truth, answers, average="micro"))
    assert rates["entity_precision"] == pytest.approx(precision_score(truth, answers, average="micro"))
    assert rates["entity_recall"] == pytest.approx(recall_score(truth, answers, average="micro"))


def entity_set(value: dict[str, Any] | None) -> set[tuple[str, str]]:
    items = value["entities"].items() if value else ()
    return {(key, repr(float(item) if isinstance(item, int) else item)) for key, item in items}


class Tokens:
    """rouge-score's interface to a tokenizer."""

    def __init__(self, function: Any) -> None:
        self.tokenize = function


def test_scores_of_text_in_every_script() -> None:
    chance = random.Random(15)
    texts = [[" ".join(chance.choices(SCRIPTS, k=chance.randint(1, 9))) for _ in range(2)] for _ in range(ROWS)]
    bags, ordered = RougeScorer(["rouge1"], tokenizer=Tokens(tokens)), RougeScorer(["rougeL"], tokenizer=Tokens(words))
    for expected, answer in texts:
        row = observe(AnsweredRow("", expected, answer))
        assert row["f1"] == pytest.approx(bags.score(expected, answer)["rouge1"].fmeasure)
        if row["rouge_l"] is None:
            assert not regex.search(r"[\p{L}\p{N}\p{So}]", expected)
        else:
            assert row["rouge_l"] == pytest.approx(ordered.score(expected, answer)["rougeL"].fmeasure)


def test_english_words_are_those_of_rouge_score() -> None:
    chance, theirs = random.Random(16), RougeScorer(["rougeL"])
    vocabulary = ["The", "valve", "pump_7", "12.5", "don't", "red-hot", "$5", "a+b", "(north)", "<b>", "?"]
    for _ in range(ROWS):
        expected, answer = (" ".join(chance.choices(vocabulary, k=chance.randint(1, 9))) for _ in range(2))
        value = observe(AnsweredRow("", expected, answer))["rouge_l"]
        if value is not None:
            assert value == pytest.approx(theirs.score(expected, answer)["rougeL"].fmeasure), (expected, answer)
