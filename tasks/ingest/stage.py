"""First pass: every record becomes a canonical line in a scratch file and one line of numbers in memory.

The numbers (hashes, lengths: about 60 bytes a row) are what `tasks.ingest.verdict` decides on, for all rows at once.
"""

import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson

from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.rows import Message
from tasks.ingest import IngestConfig
from tasks.ingest.read import Record, Split, data_files, read
from tasks.ingest.shapes import recognise, to_messages

SAMPLE = 200
EVERY = 5000


class Staged(NamedTuple):
    """What the first pass found. `columns` has an entry a good row, in file order; hashes are unsigned 64-bit.

    `file` indexes `files`; `prompt` hashes the question, `answer` the answer (for JSON: its meaning, not its
    spacing); `draw` decides the split; `is_object` is 1 when the answer is a JSON object.
    """

    files: list[tuple[str, Split]]
    shapes: dict[str, str]
    columns: dict[str, "array[int]"]
    faults: int
    passed_over: list[str]


COLUMNS = ("file", "line", "prompt", "answer", "draw", "is_object", "prompt_chars", "answer_chars")


def stage_rows(config: IngestConfig, files: Path, staged: Path, quarantine: IO[str], job: Job) -> Staged:
    """Reads all files; good rows go to `staged`, faulty ones to `quarantine` with their reason."""
    paths, passed_over = data_files(files)
    root = files if files.is_dir() else files.parent
    names = [(str(path.relative_to(root)), split) for path, split in paths]
    total, done = sum(path.stat().st_size for path, _ in paths), 0
    columns = {name: array("Q") for name in COLUMNS}
    result = Staged(names, {}, columns, 0, [str(path.relative_to(root)) for path in passed_over])
    faults = 0
    with staged.open("w", encoding="utf-8") as out:
        for index, (path, _) in enumerate(paths):
            name = names[index][0]
            if not path.stat().st_size:
                raise BadData(f"{name} is empty (0 bytes); give a file with rows, or take it away")
            count = 0
            for record in _shaped(config, path, name, result.shapes):
                count += 1
                if count % EVERY == 0:
                    job.progress(done, total, "bytes", f"{name}: {count} rows")
                faults += not _stage(config, record, result.shapes[name], index, columns, out, quarantine)
            if not count:
                raise BadData(f"{name} holds no rows; give a file with rows, or take it away")
            done += path.stat().st_size
            job.progress(done, total, "bytes", f"{name}: {count} rows")
    return result._replace(faults=faults)


def _shaped(config: IngestConfig, path: Path, name: str, shapes: dict[str, str]) -> Iterator[Record]:
    records = read(path, name)
    head = list(islice(records, SAMPLE))
    if head and config.format == "auto":
        _refuse_unreadable(head, name)
        shapes[name] = recognise((record.value for record in head), name)
    else:
        shapes[name] = config.format
    return chain(head, records)


def _refuse_unreadable(head: list[Record], name: str) -> None:
    if all(record.fault for record in head):
        raise BadData(f"{name}: none of the first {len(head)} rows can be read; line {head[0].line} is {head[0].fault}")


def _stage(
    config: IngestConfig,
    record: Record,
    shape: str,
    file: int,
    columns: dict[str, "array[int]"],
    out: IO[str],
    quarantine: IO[str],
) -> bool:
    """True when the row is good. A staged line is the canonical row, a tab (JSON has none), and the raw text."""
    if record.fault:
        write_quarantine(quarantine, record, record.fault)
        return False
    try:
        messages = to_messages(record.value, shape, config.system_prompt)
    except ValueError as error:
        write_quarantine(quarantine, record, str(error))
        return False
    parsed = json_object(messages[-1].content)
    intent = parsed.get("intent") if parsed is not None else None
    row = {"messages": [message.model_dump() for message in messages], "intent": intent if _is_intent(intent) else None}
    out.write(json.dumps(row, ensure_ascii=False) + "\t" + record.raw.replace("\n", " ") + "\n")
    question = _question(messages)
    answer = messages[-1].content.strip() if parsed is None else json.dumps(parsed, sort_keys=True)
    values = (
        file,
        record.line,
        _hash(question),
        _hash(answer),
        _hash(f"{config.seed}\n{question}"),
        parsed is not None,
        sum(len(message.content) for message in messages[:-1]),
        len(messages[-1].content),
    )
    for name, value in zip(COLUMNS, values, strict=True):
        columns[name].append(value)
    return True


def json_object(text: str) -> dict[str, Any] | None:
    """`text` as a JSON object, None when it is not one."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def write_quarantine(file: IO[str], record: Record, reason: str) -> None:
    """One line of quarantine.jsonl."""
    line = {"file": record.file, "line": record.line, "reason": reason, "raw": record.raw}
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _is_intent(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _question(messages: list[Message]) -> str:
    return json.dumps([(message.role, message.content.strip()) for message in messages[:-1]], ensure_ascii=False)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
