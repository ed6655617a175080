"""Schema of the JSON answers, inferred from most of them, and the answers that do not fit it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.ingest.canonical import AnswerKind, AnswerKinds, Signature

MAX_ENUM = 100
JSON_TYPES = {"an object": "object", "a list": "array", "an empty list": "array", "a boolean": "boolean",
              "a number": "number", "null": "null", "a string": "string"}  # fmt: skip
WORDS = {kind: words for words, kind in reversed(JSON_TYPES.items())}


class Schema:
    """Fields that `share` of the answers have, and the types that `share` of a field's values have."""

    def __init__(self, kinds: Sequence[tuple[AnswerKind, int]], share: float) -> None:
        self.intents: Counter[str] = Counter()
        self._share = share
        self.total = sum(count for _, count in kinds)
        self.fields: Counter[str] = Counter()
        self.types: dict[str, Counter[str]] = {}
        self.inner: dict[str, dict[str, Counter[str]]] = {}
        for kind, count in kinds:
            if kind.intent:
                self.intents[kind.intent] += count
            for name, type_words, inner in kind.signature or ():
                self.fields[name] += count
                self.types.setdefault(name, Counter())[_json_type(type_words)] += count
                for field, inner_words, _ in inner or ():
                    self.inner.setdefault(name, {}).setdefault(field, Counter())[_json_type(inner_words)] += count
        self.required = sorted(name for name, count in self.fields.items() if count >= share * self.total)
        self.typed = {name: expected for name, counts in self.types.items() if (expected := self._expected(counts))}

    def _expected(self, counts: Counter[str]) -> str | None:
        json_type, count = counts.most_common(1)[0]
        return json_type if count >= self._share * sum(counts.values()) and sum(counts.values()) > 1 else None

    def fault(self, signature: Signature) -> str | None:
        """The reason why an answer of this form does not fit; None when it does."""
        names = {name for name, _, _ in signature}
        for name in self.required:
            if name not in names:
                return f"the answer lacks {name!r}, which {self.fields[name]} of {self.total} answers have"
        for name, type_words, _ in signature:
            expected = self.typed.get(name)
            if expected and _json_type(type_words) != expected:
                count = self.types[name][expected]
                share = f"{count} of {self.fields[name]}"
                return f"the answer's {name!r} is {type_words}; in {share} answers it is {WORDS[expected]}"
        return None

    def to_json(self) -> dict[str, Any]:
        """JSON Schema of the answers; an intent's values are listed when there are not too many of them."""
        properties: dict[str, Any] = {}
        for name, counts in sorted(self.types.items()):
            properties[name] = {"type": self.typed.get(name) or sorted(counts)}
            if name in self.inner:
                properties[name]["properties"] = {
                    field: {"type": _type_or_types(types)} for field, types in sorted(self.inner[name].items())
                }
        if "intent" in properties and self.intents and len(self.intents) <= MAX_ENUM:
            properties["intent"]["enum"] = sorted(self.intents)
        return {"type": "object", "properties": properties, "required": self.required}


def infer(kinds: AnswerKinds, counts: Mapping[int, int], share: float) -> Schema | None:
    """The schema of all JSON answers, given how many rows there are of each kind; None when they are too various."""
    numbered = ((kinds.all[number], count) for number, count in counts.items())
    json_kinds = [(kind, count) for kind, count in numbered if kind.signature is not None]
    return Schema(json_kinds, share) if json_kinds and not kinds.too_many else None


def _json_type(name: str) -> str:
    return JSON_TYPES.get(name, "string")


def _type_or_types(counts: Counter[str]) -> str | list[str]:
    return next(iter(counts)) if len(counts) == 1 else sorted(counts)
