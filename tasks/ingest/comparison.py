"""How rows are compared: without regard to case, white space, line ends, Unicode form and invisible characters.

For comparing only; what is written stays as it was. A question is compared in its context: every message before the
answer, the system's included. `Relations` are what a row can share with others beyond its question.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any
from unicodedata import normalize

import orjson
from xxhash import xxh3_64, xxh3_64_digest

from tasks.ingest.turns import Turn, type_name

Relations = Sequence[tuple[int, bytes]]
"""A row's relations: each its kind and a 64-bit hash. A kind from 1 on is the depth of an earlier answer, whose context
the hash is of."""
WITHOUT_SYSTEM, GROUP = 0, 255  # kinds: the question without the system message, the value of `group_by`
MAX_DEPTH = 254
# Soft hyphen, zero-width and direction marks, joiners, byte order mark, variation selectors.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)


def comparable(text: str) -> str:
    """The text as it is compared: NFC, case folded, white space as one space, no invisible characters."""
    if text.isascii():
        return " ".join(text.lower().split())
    folded = normalize("NFC", normalize("NFC", INVISIBLE.sub("", text)).casefold())
    return " ".join(folded.split())


def comparable_json(encoded: bytes) -> bytes:
    """`comparable` of a text that is encoded as JSON, as UTF-8; without decoding it where it is plain ASCII."""
    flat = encoded[1:-1].replace(b"\\n\\n", b" ")
    if b"\\" in flat or flat.find(b"  ") >= 0 or not flat.isascii() or flat[:1] == b" " or flat[-1:] == b" ":
        return comparable(orjson.loads(encoded)).encode()
    return flat.lower()


def context_hashes(turns: Iterable[tuple[str, str]], salt: bytes) -> list[bytes]:
    """XXH3 of what stands before each of the assistant's messages, as it is compared; the last is the question's."""
    running, hashes = xxh3_64(salt), []
    for role, text in turns:
        if role == "assistant":
            hashes.append(running.digest())
        running.update(f"\0{role}\0{comparable(text)}".encode())
    return hashes


def question_hash(question: bytes, salt: bytes) -> bytes:
    """`context_hashes` of a single question that is already `comparable`, as UTF-8."""
    return xxh3_64_digest(b"%b\0user\0%b" % (salt, question))


def relations(turns: Sequence[Turn], contexts: Sequence[bytes], salt: bytes) -> Relations:
    """The contexts before a row's last answer, and its question without the system message."""
    related = tuple(enumerate(contexts[:-1][:MAX_DEPTH], start=1))
    if turns[0][0] == "system":
        return (*related, (WITHOUT_SYSTEM, context_hashes([turn[:2] for turn in turns[1:]], salt)[-1]))
    return related


def group_hash(row: dict[str, Any], path: str, salt: bytes) -> bytes:
    """XXH3 of the row's value of `group_by`, a field or dotted path. Raises ValueError where it has none."""
    value: Any = row
    for name in [path] if path in row else path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"field {path!r} is missing or empty, and group_by needs it to keep its rows together")
    if isinstance(value, (dict, list, bool)):
        raise ValueError(f"field {path!r} is {type_name(value)}; group_by takes a text or a number")
    return xxh3_64_digest(salt + f"\0group\0{str(value).strip()}".encode())
