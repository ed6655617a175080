"""A good row as its canonical line, and the numbers that decide what becomes of it."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from tasks.ingest.shapes import Turn, type_name

DEPTH = 2  # an answer's own fields, and those of the objects in them (`entities`)
MOST_KINDS = 20_000

Signature = tuple[tuple[str, str, Any], ...]
OPENING = {role: b'{"role":"%b","content":' % role.encode() for role in ("system", "user", "assistant")}
ASKED = {role: b'["%b", ' % role.encode() for role in OPENING}


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


def canonical(turns: Sequence[Turn], salt: bytes, learn_all: bool) -> tuple[bytes, bytes, bytes, Kind]:
    """The row's line; its question's hash (8 bytes, they decide the split; `salt` is the seed); its answer's; its kind.

    Raises ValueError when no message is to be learnt.
    """
    parts, questions = [], []
    for role, text, _ in turns:
        encoded = orjson.dumps(text)
        parts.append(OPENING[role] + encoded)
        questions.append(ASKED[role] + (encoded if text == text.strip() else orjson.dumps(text.strip())))
    questions.pop()
    parsed = json_object(text)
    if parsed is None:
        intent, kind, answer = None, TEXT, encoded
    else:
        intent = parsed.get("intent") or None
        intent = intent if isinstance(intent, str) else None
        kind, answer = Kind(intent, signature(parsed)), orjson.dumps(parsed, option=orjson.OPT_SORT_KEYS)
    labels = _labels(turns, learn_all) if len(turns) > 3 or not turns[-1][2] else b""
    tail = b"null" if intent is None else orjson.dumps(intent)
    line = b'{"messages":[' + b"},".join(parts) + b'}],"intent":' + tail + labels + b"}\n"
    question = salt + b"[" + b"], ".join(questions) + b"]]"
    return line, blake2b(question, digest_size=8).digest(), blake2b(answer, digest_size=8).digest(), kind


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
