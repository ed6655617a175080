"""What both ways of generating take and give: prompts as token ids in, answers as token ids out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from tasks.core.errors import BadData

Schema = dict[str, Any]
Whole = Callable[[list[int]], bool]
"""Whether an answer, given as ids, is all that was wanted: its last id has just come."""


class Asked(NamedTuple):
    """Prompts as ids, and the ids that end an answer; the same for Hugging Face and llama.cpp.

    `rows` says which row of the test file (from 0) each prompt is, for messages. `whole` ends an answer early.
    """

    rows: list[int]
    prompts: list[list[int]]
    ends: frozenset[int]
    max_new_tokens: int
    batch_size: int
    threads: int
    whole: Whole | None = None


class Answered(NamedTuple):
    """Answers as ids, the end token left out; `generated` counts all tokens made, ends too, in `seconds`."""

    answers: list[list[int]]
    generated: int
    seconds: float


class Latency(NamedTuple):
    """One row asked alone: seconds to its first token, seconds to its end, and tokens made, the end too."""

    first_token: float
    total: float
    tokens: int


class Text(NamedTuple):
    """Ids whose probability is wanted from place `start` (at least 1) on."""

    input_ids: list[int]
    start: int


class Loss(NamedTuple):
    """Summed negative log-likelihood in nats over so many tokens."""

    nats: float
    tokens: int


class Engine(Protocol):
    """A loaded model, in Hugging Face or in llama.cpp. All raise GateFailed where logits are NaN or infinite."""

    def answer(self, places: Sequence[int], schema: Schema | None = None) -> Answered:
        """Answers prompts (by place in `Asked.prompts`) many at a time, held to a JSON schema where one is given."""

    def alone(self, place: int) -> Latency:
        """Answers one prompt with nothing else running."""

    def loss(self, texts: Sequence[Text]) -> Loss:
        """What the texts cost the model."""

    def parameters(self) -> dict[str, Any]:
        """Statistics of the weights; see `tasks.evaluate.parameters`."""


def cut(ids: list[int], asked: Asked) -> list[int]:
    """The ids before the first end token, and no more than a whole answer."""
    ids = next((ids[:i] for i, token in enumerate(ids) if token in asked.ends), ids)
    if asked.whole is not None:
        return next((ids[: i + 1] for i in range(len(ids)) if asked.whole(ids[: i + 1])), ids)
    return ids


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` places out of `total`, evenly spread; all of them when there are fewer."""
    count = min(total, wanted)
    return [i * total // count for i in range(count)]


def check_lengths(asked: Asked, context: int) -> None:
    """Raises BadData when a prompt and its answer would not fit into the model's context of `context` tokens."""
    longest, row = max(zip(map(len, asked.prompts), asked.rows, strict=True))
    if longest + asked.max_new_tokens > context:
        raise BadData(
            f"row {row} of the test file has {longest} prompt tokens; with max_new_tokens={asked.max_new_tokens} "
            f"that is more than the model's context of {context}. Lower max_new_tokens or take the row out"
        )
