"""Numbers, keys and depth of JSON: kept as they are written, or refused with the true reason."""

import json
import pickle

import pytest

from tasks.ingest.exact_json import Number, comparison_key, dump, json_object, load, load_row


@pytest.mark.parametrize(
    "text",
    [
        '{"price": 1.10}',
        '{"id": 12345678901234567890123}',
        '{"n": 1E5, "m": -0, "k": 0.30000000000000004000}',
        '{"a": {"b": [1.0, 2, null, true, "x \\" y"]}}',
        '{"a": "back\\\\\\\\slash", "b": 1.50}',
    ],
)
def test_an_object_is_written_as_it_was(text: str) -> None:
    assert dump(load(text.encode())) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"v": 1e400}', "the number 1e400 is out of range"),
        ('{"v": ' + "9" * 5000 + "}", "has 5000 digits, more than 4300"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "field 'c' stands twice"),
        ('{"a\\\\": "x", "a\\\\": "y"}', "stands twice"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 200 deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 200 deep"),
        ('{"a": NaN}', "NaN in field 'a'"),
        ('{"a": "\\ud800", "b": 1.10}', "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load(text.encode())
    if text.startswith("{") and "NaN" not in text and "ud800" not in text:
        with pytest.raises(ValueError, match=reason):
            json_object(text)


def test_equal_values_have_one_key_and_others_do_not() -> None:
    def key(text: str) -> bytes:
        return comparison_key(load(text.encode()))

    assert key('{"a": 1.10, "b": 2}') == key('{"b": 2, "a": 1.1}')
    assert key('{"a": 1e2}') == key('{"a": 100.0}')
    assert key('{"id": 12345678901234567890123}') != key('{"id": 12345678901234567890124}')
    assert key('{"a": 0.1}') != key('{"a": 0.10000000000000000001}')


def test_text_that_is_no_object_is_none() -> None:
    for text in ("plain", "{broken", '{"a": NaN}', "[1]", '{"a": "\\ud800"}'):
        assert json_object(text) is None


def test_a_line_may_end_in_a_comma() -> None:
    assert load_row(b'{"a": 1},\r\n') == {"a": 1}
    with pytest.raises(ValueError, match="not JSON"):
        load_row(b'{"a": 1,')


def test_a_number_travels_to_another_process() -> None:
    number = pickle.loads(pickle.dumps(Number("1.10")))
    assert number.text == "1.10"
    assert json.dumps(number) == "1.1"
