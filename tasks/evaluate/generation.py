"""Interface of both engines, Hugging Face and llama.cpp: prompts as token ids in, answers as token ids out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from tasks.core.errors import BadData

Schema = dict[str, Any]
CompletionCheck = Callable[[list[int]], bool]
"""Whether an answer, as the ids so far, is complete and generation may stop."""


class GenerationRequest(NamedTuple):
    """Prompts as token ids, the ids that end an answer, and limits.

    `row_numbers` are the prompts' rows in the test file (from 0), for messages. `is_complete` ends an answer early.
    `opening` is what the chat template itself writes before an answer (Qwen3: an empty think block); answers under a
    schema start behind it.
    """

    row_numbers: list[int]
    prompts: list[list[int]]
    end_ids: frozenset[int]
    max_new_tokens: int
    batch_size: int
    threads: int
    is_complete: CompletionCheck | None = None
    opening: tuple[int, ...] = ()

    def constrained(self) -> "GenerationRequest":
        """The request for answers under a schema."""
        return self._replace(prompts=[[*prompt, *self.opening] for prompt in self.prompts])


class Generation(NamedTuple):
    """Answers as ids without the end token; `tokens` counts all that were generated in `seconds`, end tokens too.

    `cut` are the answers that had not ended at `max_new_tokens`.
    """

    answers: list[list[int]]
    tokens: int
    seconds: float
    cut: Sequence[bool] = ()


class Latency(NamedTuple):
    """One prompt with nothing else running: seconds to the first token and to the end, and tokens, the end too."""

    first_token: float
    total: float
    tokens: int


class Text(NamedTuple):
    """Token ids; the loss is taken from position `start` (at least 1) on."""

    input_ids: list[int]
    start: int


class Loss(NamedTuple):
    """Summed negative log-likelihood in nats over so many tokens."""

    nats: float
    tokens: int


class Engine(Protocol):
    """A loaded model, in Hugging Face or in llama.cpp. All raise GateFailed where logits are NaN or infinite.

    Prompts are named by their index in `GenerationRequest.prompts`.
    """

    def generate(self, indices: Sequence[int], schema: Schema | None = None) -> Generation:
        """Answers prompts, many at a time, constrained to a JSON schema where one is given."""

    def time_single(self, index: int) -> Latency:
        """Answers one prompt with nothing else running."""

    def loss(self, texts: Sequence[Text]) -> Loss:
        """Cross-entropy of the texts, summed."""

    def parameters(self) -> dict[str, Any]:
        """Statistics of the weights; see `tasks.evaluate.parameters`."""


def truncate(ids: list[int], request: GenerationRequest) -> list[int]:
    """The ids before the first end token, and no more than a complete answer."""
    ids = next((ids[:i] for i, token in enumerate(ids) if token in request.end_ids), ids)
    if request.is_complete is not None:
        return next((ids[: i + 1] for i in range(len(ids)) if request.is_complete(ids[: i + 1])), ids)
    return ids


def is_cut(ids: list[int], request: GenerationRequest) -> bool:
    """Whether generated ids stop at `max_new_tokens` without an end token or a complete answer."""
    if len(ids) < request.max_new_tokens or not request.end_ids.isdisjoint(ids):
        return False
    return request.is_complete is None or not request.is_complete(truncate(ids, request))


def evenly_spaced(total: int, count: int) -> list[int]:
    """`count` indices out of `total`, evenly spread; all of them when there are fewer."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def check_lengths(request: GenerationRequest, context: int) -> None:
    """Raises BadData when a prompt and its answer would not fit into the model's context of `context` tokens."""
    longest, row = max(zip(map(len, request.prompts), request.row_numbers, strict=True))
    if longest + len(request.opening) + request.max_new_tokens > context:
        raise BadData(
            f"row {row} of the test file has {longest} prompt tokens; with max_new_tokens={request.max_new_tokens} "
            f"that is more than the model's context of {context}. Lower max_new_tokens or take the row out"
        )
