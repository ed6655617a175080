"""What both ways of generating take and give: prompts as token ids in, answers as token ids out."""

from typing import NamedTuple

from tasks.core.errors import BadData


class Asked(NamedTuple):
    """Prompts as ids, and the ids that end an answer; the same for Hugging Face and llama.cpp.

    `rows` says which row of the test file (from 0) each prompt is, for messages.
    """

    rows: list[int]
    prompts: list[list[int]]
    ends: frozenset[int]
    max_new_tokens: int
    batch_size: int
    warmup_rows: int
    threads: int


class Answered(NamedTuple):
    """Answers as ids, the end token left out; `generated` counts all tokens made, ends too, in `seconds`."""

    answers: list[list[int]]
    generated: int
    seconds: float


def cut(ids: list[int], ends: frozenset[int]) -> list[int]:
    """The ids before the first end token."""
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)


def check_lengths(asked: Asked, context: int) -> None:
    """Raises BadData when a prompt and its answer would not fit into the model's context of `context` tokens."""
    longest, row = max(zip(map(len, asked.prompts), asked.rows, strict=True))
    if longest + asked.max_new_tokens > context:
        raise BadData(
            f"row {row} of the test file has {longest} prompt tokens; with max_new_tokens={asked.max_new_tokens} "
            f"that is more than the model's context of {context}. Lower max_new_tokens or take the row out"
        )
