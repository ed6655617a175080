"""Fields beyond question and answer: used as their makers mean them, refused with the reason, or told by name."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tasks.core.errors import BadData
from tasks.core.rows import Message, Row
from tests.ingest.conftest import Run, text_rows
from tests.ingest.faults import PAGE
from tests.ingest.fields import END, START, table

Go = Callable[..., Run]


def pairs(**fields: Any) -> list[dict[str, Any]]:
    """Eighty plain rows, the last five with more fields."""
    rows = text_rows(80)
    return rows[:75] + [row | fields for row in rows[75:]]


def chats(**fields: Any) -> list[dict[str, Any]]:
    """Sixty conversations of two answers, with more fields on the first answer of each."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"First {row['question']}"},
                {"role": "assistant", "content": f"WRONG {row['answer']}", **fields},
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in text_rows(60)
    ]


def reasons(ran: Run) -> set[str]:
    return {line["reason"] for line in ran.quarantine()}


@pytest.mark.parametrize("name", ["weight", "loss", "train", "trainable", "loss_mask", "lossMask", "Loss-Weight"])
@pytest.mark.parametrize("value", [0, 0.0, False, "0", "false", "0.0"])
def test_no_answer_that_is_switched_off_is_learnt(go: Go, name: str, value: Any) -> None:
    assert {tuple(row.labels or [3]) for row in go(chats(**{name: value})).all()} == {(3,)}


@pytest.mark.parametrize("fields", [{"weight": 1}, {"loss": True}, {"train": "true"}, {"masked": False}])
def test_an_answer_that_is_switched_on_is_learnt(go: Go, fields: dict[str, Any]) -> None:
    assert all(row.labels == [1, 3] for row in go(chats(**fields)).all())


@pytest.mark.parametrize("value", [0.3, -1, 2, "half", [0], float("inf")])
def test_weights_between_on_and_off_are_refused(go: Go, value: Any) -> None:
    rows = text_rows(60) + [{"question": "q" * 20, "answer": "a" * 20, "weight": value}]
    ran = go(rows)
    assert len(ran.all()) == 60 and len(ran.quarantine()) == 1
    if value != float("inf"):
        assert "an answer is learnt (1, true) or not (0, false), nothing in between" in ran.quarantine()[0]["reason"]


def test_null_switches_nothing_where_every_message_has_it_and_is_unclear_elsewhere(go: Go) -> None:
    rows = chats(weight=None)
    with pytest.raises(BadData, match="field 'weight' of message 2 is null"):
        go(rows)
    for row in rows:
        for message in row["messages"]:
            message["weight"] = None
        row["messages"][1]["weight"] = 0
    assert all(row.labels is None for row in go(rows).all())


def test_masks_parts_and_rows_that_are_switched_off(go: Go) -> None:
    off = go([*pairs(train=False)])
    assert reasons(off) == {"the row is switched off by its field 'train' (false)"}
    with pytest.raises(BadData, match="field 'train_detail' of message 2 masks parts of the text"):
        go(chats(train_detail=[{"begin_offset": 0, "end_offset": 3, "train": False}]))
    part = {"type": "text", "text": "WRONG", "weight": 0}
    with pytest.raises(BadData, match="a part of message 2 is switched off by its field 'weight'"):
        go(chats(content=[part]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rating": 1}, "field 'rating' grades the answer"),
        ({"quality_score": 0.2}, "field 'quality_score' grades the answer"),
        ({"label": "bad"}, "field 'label' grades the answer"),
        ({"tools": [{"type": "function"}]}, "field 'tools' offers or calls tools"),
        ({"images": ["a.png"]}, "field 'images' is no text"),
        ({"reasoning_content": "I think"}, "field 'reasoning_content' holds the reasoning"),
        ({"generations": ["a", "b"]}, "field 'generations' holds several answers"),
    ],
)
def test_fields_that_change_what_an_answer_means_are_refused_or_ignored_by_name(
    go: Go, fields: dict[str, Any], reason: str
) -> None:
    ran = go(pairs(**fields))
    assert len(ran.quarantine()) == 5 and len(ran.all()) == 75
    assert all(text.startswith(reason) and text.endswith("or name it in ignore_fields") for text in reasons(ran))
    ignored = go(pairs(**fields), ignore_fields=list(fields))
    assert ignored.quarantine() == [] and ignored.profile()["unread_fields"][next(iter(fields))]["rows"] == 5
    with pytest.raises(BadData, match=f"field '{next(iter(fields))}' of message 2"):
        go(chats(**fields))


def test_empty_fields_say_nothing(go: Go) -> None:
    ran = go(pairs(label=None, tools=[], history="[]", system="", images=None, score=" ", note=""))
    assert ran.quarantine() == [] and ran.profile()["unread_fields"] == {}


def test_what_is_not_read_is_told_by_name_with_its_share_and_an_example(go: Go) -> None:
    rows = pairs(category="qa", source={"page": 7})
    rows[0]["category"] = None
    ran = go(rows)
    fields = ran.profile()["unread_fields"]
    assert fields["category"] == {"rows": 5, "example": '"qa"', "first": "train.jsonl:76", "share": 0.0625}
    assert fields["source"]["example"] == '{"page": 7}'
    (warning,) = [text for text in ran.report.warnings if text.startswith("Fields that are not read")]
    assert 'category (6.2% of rows, e.g. "qa")' in warning
    for page in ("profile.md", "profile.html"):
        text = (ran.out / "report" / page).read_text()
        assert "Fields that are not read" in text and "category" in text and "6.2%" in text
    named = go(chats(name="bot"))
    assert named.profile()["unread_fields"]["messages[].name"]["share"] == 1


def test_history_context_and_system_are_used(go: Go) -> None:
    row = {"instruction": "And now?", "input": "Here.", "output": "Later.", "system_prompt": "Be brief."}
    rows = [row | {"instruction": f"And now {n}?", "history": [[f"Q{n}", "A"], ["R", "B"]]} for n in range(60)]
    (first,) = [made for made in go(rows).all() if made.messages[1].content == "Q0"]
    assert [message.content for message in first.messages] == [
        "Be brief.", "Q0", "A", "R", "B", "And now 0?\n\nHere.", "Later."
    ]  # fmt: skip
    assert first.labels == [2, 4, 6]
    asked = [{"question": "Which?", "context": f"Line {n}.", "answer": f"Pump {n}."} for n in range(60)]
    assert {made.messages[0].content for made in go(asked).all()} == {f"Which?\n\nLine {n}." for n in range(60)}
    two = [chat | {"system": "One."} for chat in chats()]
    for chat in two:
        chat["messages"] = [{"role": "system", "content": "Another."}, *chat["messages"]]
    with pytest.raises(BadData, match="two system messages: field 'system' says another one"):
        go(two)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda q, a: {"instruction": q, "context": "", "response": a, "category": "qa"}, "dolly"),
        (lambda q, a: {"query": q, "response": a, "history": []}, "query_response"),
        (lambda q, a: {"id": "1", "question": q, "answers": {"text": [a, a], "answer_start": [0, 0]}}, "squad"),
        (lambda q, a: {"instruction": q, "output": [{"value": a, "status": "submitted"}]}, "alpaca"),
        (
            lambda q, a: {
                "systemInstruction": {"parts": [{"text": "S"}]},
                "contents": [{"role": "user", "parts": [{"text": q}]}, {"role": "model", "parts": [{"text": a}]}],
            },
            "contents",
        ),
        (
            lambda q, a: {
                "system": [{"text": "S"}],
                "messages": [{"role": r, "content": [{"text": t}]} for r, t in (("user", q), ("assistant", a))],
            },
            "messages",
        ),
    ],
)
def test_formats_of_other_tools_are_read(go: Go, make: Callable[[str, str], Any], shape: str) -> None:
    rows = text_rows(80)
    ran = go([make(row["question"], row["answer"]) for row in rows])
    assert ran.profile()["shapes"] == {"train.jsonl": shape}
    read = {(row.messages[-2].content, row.messages[-1].content) for row in ran.all()}
    assert read == {(row["question"], row["answer"]) for row in rows}
    assert {len(row.messages) for row in ran.all()} == ({3} if shape in ("contents", "messages") else {2})


@pytest.mark.parametrize(
    ("row", "tool"),
    [
        ({"id": "b", "custom_id": "r", "response": {}, "error": None}, "OpenAI batch output"),
        ({"custom_id": "r", "method": "POST", "body": {}}, "OpenAI batch input"),
        ({"id": 1, "data": {"text": "a"}, "annotations": []}, "Label Studio's export"),
        ({"id": 1, "text": "a", "label": [[0, 1, "X"]]}, "doccano"),
        ({"text": "a", "topic.responses": ["b"]}, "plain text"),
        ({"prompt_text": "a", "topic.responses": ["b"]}, "Argilla's export"),
        ({"segments": [{"label": True, "text": "a"}]}, "axolotl's input_output"),
    ],
)
def test_formats_that_are_not_read_are_named_with_the_remedy(go: Go, row: dict[str, Any], tool: str) -> None:
    with pytest.raises(BadData, match=tool):
        go([row])


U = {"role": "user", "content": "Q?"}
G = {"role": "assistant", "content": "Good."}
B = {"role": "assistant", "content": "Bad."}
PAIR = {"prompt": [U], "chosen": [G], "rejected": [B]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "chosen": "Good.", "rejected": "Bad."},
        {"prompt": [U], "chosen": [G], "rejected": [B]},
        {"chosen": [U, G], "rejected": [U, B]},
        {"prompt": "Q?", "chosen": [U, G], "rejected": [U, B], "chosen-rating": 5},
        {"instruction": "Q?", "input": "", "output": ["Good.", "Bad."]},
        {"instruction": "Q?", "input": "", "chosen": "Good.", "rejected": "Bad."},
        {"conversations": [{"from": "human", "value": "Q?"}], "chosen": {"from": "gpt", "value": "Good."},
         "rejected": {"from": "gpt", "value": "Bad."}},
        {"query": "Q?", "response": "Good.", "rejected_response": "Bad."},
        {"messages": [U, G], "rejected_response": "Bad."},
    ],
)  # fmt: skip
def test_preference_rows_of_every_spelling(go: Go, row: dict[str, Any]) -> None:
    with pytest.raises(BadData, match="preference rows"):
        go([row])
    if "output" in row or "query" in row or "messages" in row or "conversations" in row:
        return  # another file's shape
    ran = go([*text_rows(60), row])
    assert [json.loads(line) for line in (ran.out / "preference.jsonl").read_text().splitlines()] == [PAIR]
    assert ran.profile()["preference_rows"] == 1 and ran.quarantine() == []
    assert all("Q?" not in message.content for good in ran.all() for message in good.messages)


@pytest.mark.parametrize("value", [False, 0, "false"])
def test_kto_rows_keep_their_label(go: Go, value: Any) -> None:
    ran = go(pairs(label=value))
    lines = [json.loads(line) for line in (ran.out / "preference.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [False] * 5 and len(ran.all()) == 75
    assert lines[0].keys() == {"prompt", "completion", "label"}


def test_a_held_out_question_is_no_preference_row(go: Go, tmp_path: Any) -> None:
    rows = text_rows(80)
    directory = tmp_path / "data"
    directory.mkdir()
    pair = {"prompt": rows[70]["question"], "chosen": "Good.", "rejected": "Bad."}
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:60], pair]))
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[60:]))
    ran = go(directory)
    assert reasons(ran) == {"the same question is held out, so preference must not hold it"}
    assert (ran.out / "preference.jsonl").read_text() == ""


def test_a_row_is_asked_up_to_the_last_answer_that_counts(go: Go) -> None:
    rows = chats()
    rows[0]["messages"][3]["weight"] = 0
    ran = go(rows)
    (row,) = [row for row in ran.all() if len(row.messages) == 2]
    assert row.answer == rows[0]["messages"][1]["content"] and row.labels is None
    name = "messages[] behind the last answer that is learnt"
    assert ran.profile()["unread_fields"][name]["rows"] == 1
    messages = [Message.model_validate(message) for message in rows[1]["messages"]]
    row = Row(messages=messages, labels=[1])
    assert row.prompt == rows[1]["messages"][:1] and row.question == messages[0].content
    assert row.answer == messages[1].content and row.up_to_answer() == Row(messages=messages[:2])


def test_the_page_has_every_field() -> None:
    assert table() in PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0], (
        "run python -m tests.ingest.fields --write"
    )
