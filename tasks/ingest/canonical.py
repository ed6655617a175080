"""A good row as its canonical line, and the numbers that decide what becomes of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
from xxhash import xxh3_64_digest

from tasks.ingest.row_shapes import MISSING, SHORT, Turn, type_name

DEPTH = 2  # an answer's own fields, and those of the objects in them (`entities`)
MOST_KINDS = 20_000

Signature = tuple[tuple[str, str, Any], ...]
OPENING = {role: b'{"role":"%b","content":' % role.encode() for role in ("system", "user", "assistant")}
ASKED = {role: b'["%b", ' % role.encode() for role in OPENING}


PAIR = b'{"messages":[{"role":"user","content":%b},{"role":"assistant","content":%b}],"intent":%b}\n'
Canonical = tuple[bytes, bytes, bytes, "Kind", int, int]


class Kind(NamedTuple):
    """What many answers have in common: intent, and fields with their types; both None for text."""

    intent: str | None
    signature: Signature | None


TEXT = Kind(None, None)


class Kinds:
    """Numbers the kinds of answers; beyond `MOST_KINDS` fields are no longer told apart. Number 0 is text."""

    def __init__(self) -> None:
        self.all = [TEXT]
        self._number = {TEXT: 0}

    def number(self, kind: Kind) -> int:
        """The kind's place in `all`."""
        found = self._number.get(kind)
        if found is not None:
            return found
        if len(self.all) >= MOST_KINDS and kind.signature is not None:
            return self.number(Kind(kind.intent if len(self.all) < 2 * MOST_KINDS else None, None))
        self._number[kind] = len(self.all)
        self.all.append(kind)
        return self._number[kind]

    @property
    def too_many(self) -> bool:
        """Whether some answers' fields were not looked at."""
        return len(self.all) > MOST_KINDS


def canonical(turns: Sequence[Turn], salt: bytes, learn_all: bool) -> Canonical:
    """The row's line; its question's hash (XXH3; it decides the split; `salt` is the seed); its answer's; its kind.

    Then the characters of the messages before the answer, and of the answer.

    Raises ValueError when no message is to be learnt.
    """
    parts, questions = [], []
    for role, text, _ in turns:
        encoded = orjson.dumps(text)
        parts.append(OPENING[role] + encoded)
        questions.append(ASKED[role] + (encoded if text == text.strip() else orjson.dumps(text.strip())))
    questions.pop()
    answer, kind, intent = _answered(text, encoded)
    labels = _labels(turns, learn_all) if len(turns) > 3 or not turns[-1][2] else b""
    line = b'{"messages":[' + b"},".join(parts) + b'}],"intent":' + intent + labels + b"}\n"
    question = salt + b"[" + b"], ".join(questions) + b"]]"
    before = sum([len(turn[1]) for turn in turns]) - len(text)
    return line, xxh3_64_digest(question), xxh3_64_digest(answer), kind, before, len(text)


def canonical_pair(value: Any, fields: tuple[str, str | None, str], salt: bytes) -> Canonical | None:
    """The common row at a third of the cost: one question, one answer, nothing odd about either.

    `fields` are the question's, what is added to it (or None), and the answer's. None means that `to_turns` and
    `canonical` have to look at the row; control tokens, NUL and U+FFFD are the caller's to rule out.
    """
    first, second, last = fields
    if type(value) is not dict or "system" in value:
        return None
    asked, text = value.get(first), value.get(last)
    if type(asked) is not str or type(text) is not str or _odd(asked) or _odd(text):
        return None
    if second is not None and (more := value.get(second)):
        if type(more) is not str or _odd(more):
            return None
        asked = f"{asked}\n\n{more}"
    encoded, told = orjson.dumps(asked), orjson.dumps(text)
    stripped = asked.strip()
    question = encoded if len(stripped) == len(asked) else orjson.dumps(stripped)
    answer, kind, intent = _answered(text, told)
    line = PAIR % (encoded, told, intent)
    hashed = xxh3_64_digest(b'%b[["user", %b]]' % (salt, question))
    return line, hashed, xxh3_64_digest(answer), kind, len(asked), len(text)


def _odd(text: str) -> bool:
    """Whether `to_turns` may refuse this text: empty, short enough to stand for a missing value, or invisible."""
    return not text or text.isspace() or (len(text) < SHORT and (text in MISSING or not text.isascii()))


def _answered(text: str, encoded: bytes) -> tuple[bytes, Kind, bytes]:
    """The answer as duplicates compare it, its kind, and its intent as JSON."""
    parsed = json_object(text)
    if parsed is None:
        return encoded, TEXT, b"null"
    intent = parsed.get("intent")
    intent = intent if isinstance(intent, str) and intent else None
    kind = Kind(intent, signature(parsed))
    return orjson.dumps(parsed, option=orjson.OPT_SORT_KEYS), kind, orjson.dumps(intent)


def _labels(turns: Sequence[Turn], learn_all: bool) -> bytes:
    """Which messages are labels, where it is not the last alone."""
    last = len(turns) - 1
    found = [i for i, (_, _, learnt) in enumerate(turns) if learnt and (learn_all or i == last)]
    found = [i for i in found if turns[i][0] == "assistant"]
    if not found:
        raise ValueError("no message is to be learnt: the assistant's have weight 0")
    return b"" if found == [last] else b',"labels":' + orjson.dumps(found)


def json_object(text: str) -> dict[str, Any] | None:
    """`text` as a JSON object, None when it is not one."""
    if text[0] != "{" and not text.lstrip().startswith("{"):
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def signature(value: dict[str, Any], depth: int = DEPTH) -> Signature:
    """The object's fields, sorted: name, type, and for an object its own fields down to `depth`."""
    return tuple(
        (name, type_name(one), signature(one, depth - 1) if depth > 1 and type(one) is dict else None)
        for name, one in sorted(value.items())
    )
