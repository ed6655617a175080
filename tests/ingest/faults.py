"""A deliberately broken dataset: every kind of fault that ingest knows, each in a row of its own.

python -m tests.ingest.faults            # prints the table of docs/data.md: each kind and ingest's reason
python -m tests.ingest.faults --write    # writes it to docs/data.md
"""

import csv
import io
import json
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.ingest import IngestConfig
from tasks.ingest.run import ingest
from tests.pico import pico_tokenizer

CONFIG = IngestConfig(near_duplicates="drop", max_length=400, max_quarantined_fraction=0.5)
PAGE = Path(__file__).parents[2] / "docs" / "data.md"
START, END = "<!-- faults: python -m tests.ingest.faults --write -->", "<!-- end of faults -->"
TEXT = (
    "valve pump line pressure report close open audit hall north south seal mixer leaks oil bay "
    "red green check measure turn please motor belt shift crew label drum filter tank rinse weld "
    "crane gauge sensor alarm floor roof gate paint screw bolt cable switch panel boiler chimney ladder "
    "pallet forklift helmet glove visor mask apron shelf bin scrap batch order customer invoice sample acid "
    "water steam vapour dust noise light dark cold warm early late "
)
WORDS = TEXT.split()
INTENTS = ("close_audit", "report_issue", "out_of_scope")


class Fault(NamedTuple):
    """A row with a fault: the fault's name, file and line, and a part of the reason that ingest must give."""

    name: str
    file: str
    line: int
    reason: str


def question(random: Random) -> str:
    return " ".join(random.sample(WORDS, 14)) + "."


def answer(random: Random) -> str:
    return json.dumps({"intent": random.choice(INTENTS), "entities": {"place": random.choice(WORDS)}})


def alpaca(random: Random) -> dict[str, Any]:
    return {"instruction": question(random), "input": "", "output": answer(random)}


def chat(random: Random) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question(random)}, {"role": "assistant", "content": answer(random)}]


def write_broken(directory: Path) -> list[Fault]:
    """Writes train.jsonl, test.jsonl, chat.jsonl, table.csv and array.json; returns their faults."""
    random = Random(0)
    held_out = [alpaca(random) for _ in range(60)]
    _lines(directory / "test.jsonl", held_out)
    good = [alpaca(random) for _ in range(300)]
    plain = _no_objects(random) + _faulty_rows(random) + _duplicates_and_leaks(good, held_out)
    _lines(directory / "train.jsonl", [*good, *(row for _, row, _ in plain)])
    faults = [Fault(name, "train.jsonl", 301 + i, reason) for i, (name, _, reason) in enumerate(plain)]
    chats = _chats(random)
    _lines(directory / "chat.jsonl", [*({"messages": chat(random)} for _ in range(60)), *(row for _, row, _ in chats)])
    faults += [Fault(name, "chat.jsonl", 61 + i, reason) for i, (name, _, reason) in enumerate(chats)]
    return [*faults, *_table(directory / "table.csv", random), *_array(directory / "array.json", random)]


def _no_objects(random: Random) -> list[tuple[str, Any, str]]:
    """Lines that are no JSON object."""
    row = json.dumps(alpaca(random)).encode()
    return [
        ("line cut off", row[:-20], "the row ends too early"),
        ("another encoding (Latin-1)", row[:-2] + "é".encode("latin-1") + row[-2:], "not UTF-8: byte 0xe9 at byte"),
        ("NaN", b'{"instruction": "a", "output": NaN}', "NaN in field 'output'"),
        ("Infinity", row[:-1] + b', "score": -Infinity}', "-Infinity in field 'score'"),
        ("Python dict", str(alpaca(random)).encode(), "a Python dict"),
        ("two objects on a line", row + b" " + row, "write one object a line"),
        ("tab inside a string", row.replace(b" ", b"\t", 3), "an unescaped control character"),
        ("comma before the brace", row[:-1] + b",}", "a comma before the closing bracket"),
        ("NUL bytes", b"\0" * 40, "NUL bytes"),
        ("half a surrogate pair", row[:-2] + b'\\ud800"}', "half of a surrogate pair"),
        ("list instead of an object", [question(random), answer(random)], "not a JSON object but a list"),
        ("string instead of an object", question(random), "not a JSON object but a string"),
    ]


def _faulty_rows(random: Random) -> list[tuple[str, Any, str]]:
    """Rows that are wrong by themselves."""

    def row(**fields: Any) -> dict[str, Any]:
        return {**alpaca(random), **fields}

    def answered(**fields: Any) -> dict[str, Any]:
        return row(output=json.dumps({"intent": "close_audit", "entities": {}, **fields}))

    return [
        ("missing field", {"instruction": question(random)}, "missing field 'output'"),
        ("field written otherwise", {"instruction": question(random), "Output": answer(random)}, "it has 'Output'"),
        ("another shape", {"question": question(random), "answer": answer(random)}, "has the shape question_answer"),
        ("null", row(output=None), "field 'output' is not a string but null"),
        ("number", row(instruction=17), "field 'instruction' is not a string but a number"),
        ("list in a field", row(output=[answer(random)]), "field 'output' is not a string but a list"),
        ("empty field", row(instruction=""), "empty field 'instruction'"),
        ("nothing but spaces", row(output=" \n\t"), "empty field 'output'"),
        ("invisible characters", row(instruction="\u200b\ufeff"), "its characters are invisible"),
        ("'nan' as text", row(input="nan"), "'nan', which programs write where a value is missing"),
        ("control token", row(instruction="a<end_of_turn>\n<start_of_turn>model"), "control token <end_of_turn>"),
        ("lost character", row(instruction="Pr\ufffdfe Pumpe 7"), "U+FFFD"),
        ("NUL character", row(instruction="pump\0seven"), "a NUL character"),
        ("text for JSON", row(output="I do not know."), "the answer should be a JSON object"),
        ("broken JSON", row(output='{"intent": "close_audit", '), "the answer should be a JSON object"),
        ("JSON list as answer", row(output="[1, 2]"), "the answer should be a JSON object"),
        ("answer without intent", row(output='{"entities": {}}'), "the answer lacks 'intent', which"),
        (
            "null as intent",
            answered(intent=None),
            "the answer's 'intent' is null; in 489 of 490 answers it is a string",
        ),
        ("empty intent", answered(intent=""), "the answer's 'intent' is empty"),
        ("entities of another type", answered(entities=["north"]), "the answer's 'entities' is a list; in"),
        ("too long", row(instruction=" ".join(random.choices(WORDS, k=400))), "tokens, more than max_length=400"),
    ]


def _duplicates_and_leaks(good: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> list[tuple[str, Any, str]]:
    """Rows that are wrong in comparison with others."""
    spaced = json.dumps(json.loads(good[1]["output"]), indent=2)
    other = json.dumps({"intent": "other_intent", "entities": {}})
    almost = [row["instruction"].replace(".", " !").capitalize() for row in (good[2], held_out[1])]
    return [
        ("duplicate", good[0], "duplicate of train.jsonl:1"),
        ("duplicate but for the JSON's spaces", {**good[1], "output": spaced}, "duplicate of train.jsonl:2"),
        ("almost a duplicate", {**good[2], "instruction": almost[0]}, "almost a duplicate of train.jsonl:3"),
        ("another answer", {**good[3], "output": other}, "the same question has another answer at train.jsonl:4"),
        ("held out", held_out[0], "the same question is held out (test.jsonl:1), so "),
        ("almost held out", {**held_out[1], "instruction": almost[1]}, "almost the same question is held out (test.js"),
    ]


def _chats(random: Random) -> list[tuple[str, Any, str]]:
    def row(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"messages": list(messages), **fields}

    (user, answer), (second_user, _) = chat(random), chat(random)
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "close"}}]}
    return [
        ("assistant first", row(answer, user, answer), "message 1 is assistant's, not user's"),
        ("user twice", row(user, second_user, answer), "message 2 is user's, not assistant's"),
        ("no answer at the end", row(user, answer, second_user), "the last message is not the assistant's"),
        (
            "system in the middle",
            row(user, {"role": "system", "content": "Be brief."}, answer),
            "message 2 is system's",
        ),
        ("unknown role", row(user, {"role": "tool", "content": "7"}), "unknown role 'tool'"),
        ("no messages", row(), "messages must be a list with a message or more, and are an empty list"),
        ("messages as text", {"messages": "user: hello"}, "messages must be a list with a message or more"),
        ("message as text", row(user, "hello"), "message 2 is not an object but a string"),  # type: ignore[arg-type]
        ("message without content", row(user, {"role": "assistant"}), "message 2 has no content"),
        ("picture", row(image, answer), "message 1 has a part that is no text (image_url)"),
        ("tool call", row(user, call), "message 2 calls a tool"),
        ("nothing to learn", row(user, {**answer, "weight": 0}), "no message is to be learnt"),
    ]


def _table(path: Path, random: Random) -> list[Fault]:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["question", "answer"])
    writer.writerows([question(random), answer(random)] for _ in range(40))
    rows = ["only a question", 'turn valve, open gate,"{}"', "b\udce9lt," + "x", '"turn" valve,x']
    path.write_bytes((text.getvalue() + "\n".join(rows) + "\n").encode(errors="surrogateescape"))
    faults = [
        ("CSV: a field is missing", "1 fields, not the header's 2"),
        ("CSV: a comma without quotes", "3 fields, not the header's 2"),
        ("CSV: another encoding", "not UTF-8: byte 0xe9"),
        ("CSV: a stray quote", "is a quote left open"),
    ]
    return [Fault(name, path.name, line, reason) for line, (name, reason) in enumerate(faults, start=42)]


def _array(path: Path, random: Random) -> list[Fault]:
    rows = [json.dumps(alpaca(random)) for _ in range(20)]
    path.write_text("[\n" + ",\n".join(rows) + ',\n{"instruction": "open gate", "output": }\n]')
    return [Fault("JSON array: a broken element", path.name, 22, "not JSON: Expecting value")]


def _lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")


def quarantine_reasons(directory: Path) -> tuple[list[Fault], dict[tuple[str, int], str]]:
    """The faults, and the quarantine's reason at each file and line."""
    faults = write_broken(directory / "in")
    (directory / "out").mkdir()
    tokenizer = ModelDir(pico_tokenizer(directory / "tokenizer"))
    ingest(CONFIG, directory / "in", directory / "out", Job(directory / "work"), tokenizer)
    lines = map(json.loads, (directory / "out/quarantine.jsonl").read_text().splitlines())
    return faults, {(line["file"], line["line"]): line["reason"] for line in lines}


def table() -> str:
    """The kinds of faults and the reason that ingest gives for each, as Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        faults, reasons = quarantine_reasons(Path(directory))
    rows = [(f.name, f"`{f.file}:{f.line}`", _cell(reasons[f.file, f.line])) for f in faults]
    lines = [f"| {number} | {' | '.join(cells)} |" for number, cells in enumerate(rows, start=1)]
    return "\n".join(["| | what is wrong | where | what ingest says |", "|---|---|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


if __name__ == "__main__":
    markdown = table()
    print(markdown)
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{START}\n\n{markdown}\n\n{END}{after}", encoding="utf-8")
