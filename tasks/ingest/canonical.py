"""Canonical line of a good row, with the hashes and lengths that splits and comparisons need."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
from xxhash import xxh3_64_digest

from tasks.ingest.comparison import Relations, comparable_json, context_hashes, question_hash, relations
from tasks.ingest.exact_json import comparison_key, json_object
from tasks.ingest.row_shapes import PairShape
from tasks.ingest.turns import PLACEHOLDERS, SHORT, TYPE_NAMES, Turn, type_name

DEPTH = 2  # an answer's own fields, and those of the objects in them (`entities`)
MAX_KINDS = 20_000

Signature = tuple[tuple[str, str, Any], ...]
LINE_OPENING = {role: b'{"role":"%b","content":' % role.encode() for role in ("system", "user", "assistant")}
HASH_OPENING = {role: b'["%b", ' % role.encode() for role in LINE_OPENING}
PAIR_LINE = b'{"messages":[{"role":"user","content":%b},{"role":"assistant","content":%b}],"intent":%b}\n'


class AnswerKind(NamedTuple):
    """Common form of many answers: intent, and fields with their types; both None for text."""

    intent: str | None
    signature: Signature | None


TEXT = AnswerKind(None, None)


CanonicalRow = tuple[bytes, bytes, bytes, AnswerKind, int, int, bytes, Relations]
"""A row's canonical line; XXH3 hashes of its question (as it is compared, with the seed) and its answer; the answer's
kind; characters of the messages before the answer, and of the answer; 32 bits of the hash of the question as it is
written; the row's relations. A plain tuple: one is made for every row."""


class AnswerKinds:
    """Numbers the kinds of answers; beyond `MAX_KINDS` fields are no longer distinguished. Number 0 is text."""

    def __init__(self) -> None:
        self.all = [TEXT]
        self._numbers = {TEXT: 0}

    def number(self, kind: AnswerKind) -> int:
        """The kind's index in `all`."""
        number = self._numbers.get(kind)
        if number is not None:
            return number
        if len(self.all) >= MAX_KINDS and kind.signature is not None:
            return self.number(AnswerKind(kind.intent if len(self.all) < 2 * MAX_KINDS else None, None))
        self._numbers[kind] = len(self.all)
        self.all.append(kind)
        return self._numbers[kind]

    @property
    def too_many(self) -> bool:
        """Whether the fields of some answers were not distinguished."""
        return len(self.all) > MAX_KINDS


def canonical(turns: Sequence[Turn], salt: bytes, learn_all: bool) -> CanonicalRow:
    """The canonical form of a row's turns; `salt` is the seed, and with the question decides the split.

    Raises ValueError when no message is to be learnt.
    """
    parts, questions = [], []
    for role, text, _ in turns:
        encoded = orjson.dumps(text)
        parts.append(LINE_OPENING[role] + encoded)
        questions.append(HASH_OPENING[role] + (encoded if text == text.strip() else orjson.dumps(text.strip())))
    questions.pop()
    answer, kind, intent = _parse_answer(text, encoded)
    labels = _labels(turns, learn_all) if len(turns) > 3 or not turns[-1][2] else b""
    line = b'{"messages":[' + b"},".join(parts) + b'}],"intent":' + intent + labels + b"}\n"
    prompt_chars = sum([len(turn[1]) for turn in turns]) - len(text)
    contexts = context_hashes([turn[:2] for turn in turns], salt)
    written, related = xxh3_64_digest(b"".join(questions))[:4], relations(turns, contexts, salt)
    return line, contexts[-1], xxh3_64_digest(answer), kind, prompt_chars, len(text), written, related


def canonical_pair(row: Any, shape: PairShape, salt: bytes) -> CanonicalRow | None:
    """The canonical form of a common row at a third of the cost: one question, one answer, nothing odd about either.

    None means that `to_turns` and `canonical` have to look at the row; control tokens, NUL and U+FFFD are the caller's
    to rule out.
    """
    if type(row) is not dict or "system" in row:
        return None
    prompt, text = row.get(shape.question), row.get(shape.answer)
    if type(prompt) is not str or type(text) is not str or _is_suspect(prompt) or _is_suspect(text):
        return None
    if shape.context is not None and (context := row.get(shape.context)):
        if type(context) is not str or _is_suspect(context):
            return None
        prompt = f"{prompt}\n\n{context}"
    encoded, encoded_answer = orjson.dumps(prompt), orjson.dumps(text)
    stripped = prompt.strip()
    question = encoded if len(stripped) == len(prompt) else orjson.dumps(stripped)
    answer, kind, intent = _parse_answer(text, encoded_answer)
    line = PAIR_LINE % (encoded, encoded_answer, intent)
    compared = comparable_json(question)
    written = xxh3_64_digest(HASH_OPENING["user"] + question)[:4]
    return line, question_hash(compared, salt), xxh3_64_digest(answer), kind, len(prompt), len(text), written, ()


def _is_suspect(text: str) -> bool:
    """Whether `to_turns` may refuse this text: empty, short enough for a placeholder, or invisible."""
    return not text or text.isspace() or (len(text) < SHORT and (text in PLACEHOLDERS or not text.isascii()))


def _parse_answer(text: str, encoded: bytes) -> tuple[bytes, AnswerKind, bytes]:
    """The answer as duplicates compare it, its kind, and its intent as JSON."""
    parsed = json_object(text)
    if parsed is None:
        return encoded, TEXT, b"null"
    intent = parsed.get("intent")
    intent = intent if isinstance(intent, str) and intent else None
    kind = AnswerKind(intent, signature(parsed))
    return comparison_key(parsed), kind, orjson.dumps(intent)


def _labels(turns: Sequence[Turn], learn_all: bool) -> bytes:
    """The field `labels` of a canonical line; empty where the last message alone is one."""
    last = len(turns) - 1
    allowed = [i for i, (_, _, may_learn) in enumerate(turns) if may_learn and (learn_all or i == last)]
    labels = [i for i in allowed if turns[i][0] == "assistant"]
    if not labels:
        raise ValueError("no message is to be learnt: the assistant's have weight 0")
    return b"" if labels == [last] else b',"labels":' + orjson.dumps(labels)


def signature(value: dict[str, Any], depth: int = DEPTH) -> Signature:
    """The object's fields, sorted: name, type, and for an object its own fields down to `depth`."""
    fields = []
    for name in sorted(value):
        field = value[name]
        kind = type(field)
        inner = signature(field, depth - 1) if kind is dict and depth > 1 else None
        fields.append((name, TYPE_NAMES.get(kind) or type_name(field), inner))
    return tuple(fields)
