"""Chat messages as token ids: a training prompt is, id for id, the prompt of generation.

prompt = prompt_ids(tokenizer, row.prompt)      # generation starts here
example = encode(tokenizer, row)                # the same ids, the answer's and its end of turn
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadConfig
from tasks.core.rows import Row
from tasks.engine.data.literal_tokens import encode_text, special_tokens

IGNORE = -100


class Example(NamedTuple):
    """A row as ids; `labels` are `input_ids` in the answers that are trained on, -100 elsewhere (not shifted)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def answer_ids(self) -> list[int]:
        """The labels without the -100."""
        return [label for label in self.labels if label != IGNORE]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids of the messages and the opening of the assistant's turn, with exactly one BOS where the model has one."""
    _refuse_turn_tokens(tokenizer, messages)
    return _ids(tokenizer, [_text(tokenizer, messages, generation=True)])[0]


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, end: int | None = None) -> Example:
    """A row's ids and labels; the last label is the end-of-turn token, `end`, computed from the template by default.

    Labels are the messages that `row.labels` names, each with its end of turn, or the last one. Raises ValueError when
    the conversation does not start with what generation of one of them would start with.
    """
    end = end_of_turn_id(tokenizer) if end is None else end
    messages = [message.model_dump() for message in row.messages]
    _refuse_turn_tokens(tokenizer, messages)
    last = len(messages) - 1
    conversation = _text(tokenizer, messages, generation=False)
    ids = _ids(tokenizer, [conversation])[0]
    spans: list[tuple[int, int]] = []
    for index in row.labels or [last]:
        earlier_ids, labelled = ids, spans[-1][1] if spans else 0
        opening = _text(tokenizer, messages[:index], generation=True)
        ids, start = _split_behind(tokenizer, conversation, ids, opening)
        stop = len(ids)
        if ids[:labelled] != earlier_ids[:labelled]:
            raise ValueError("two answers cannot both start as generation starts them; set learn_turns=last")
        if index != last:
            closed = _text(tokenizer, messages[: index + 1], generation=False)
            ids, stop = _split_behind(tokenizer, conversation, ids, closed)
        spans.append((start, _turn_stop(ids, start, stop, end)))
    if row.labels is None or row.labels[-1] == last:
        # Text behind the end of turn is never generated; where the template writes no end of turn, it is added here.
        start, stop = spans[-1]
        ids = ids[:stop] if ids[stop - 1] == end else [*ids, end]
        spans[-1] = (start, len(ids))
    labels = [IGNORE] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return Example(ids, labels)


def count_tokens(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[int]:
    """Length of each row's ids, as `encode` makes them, tokenized together.

    One token less for each answer whose first characters would merge with the opening before it.
    """
    end = end_of_turn_id(tokenizer)
    texts = [_text(tokenizer, [m.model_dump() for m in row.messages], generation=False) for row in rows]
    counts = []
    for row, ids in zip(rows, _ids(tokenizer, texts), strict=True):
        if row.labels is not None and row.labels[-1] != len(row.messages) - 1:
            counts.append(len(ids))
        else:
            counts.append(_turn_stop(ids, 0, len(ids), end) if end in ids else len(ids) + 1)
    return counts


def _split_behind(
    tokenizer: PreTrainedTokenizerBase, conversation: str, ids: list[int], opening: str
) -> tuple[list[int], int]:
    """The conversation's ids with a token border where `opening` ends, and that border.

    Text that follows may merge with the opening's last token (a line break with the answer's own); generation never
    sees that, so then both parts are tokenized separately.
    """
    start = _ids(tokenizer, [opening])[0]
    if ids[: len(start)] == start:
        return ids, len(start)
    if not conversation.startswith(opening):
        pairs = zip(conversation + "\0", opening + "\1", strict=False)
        i = next(i for i, (a, b) in enumerate(pairs) if a != b)
        raise ValueError(
            f"the chat template's prompt is not a prefix of the conversation: they differ behind "
            f"{opening[max(0, i - 40) : i]!r}, where generation has {opening[i : i + 20]!r}. Training would teach "
            "what generation never sees; use a chat template that opens the assistant's turn exactly as a finished "
            "turn is written, or learn_turns=last for one that rewrites earlier turns"
        )
    [answer] = encode_text(tokenizer, [conversation[len(opening) :]])
    return [*start, *answer], len(start)


def _turn_stop(ids: list[int], start: int, stop: int, end: int) -> int:
    """Where the turn in `ids[start:stop]` ends: behind its last end-of-turn token, or at `stop` without one."""
    return next((i + 1 for i in range(stop - 1, start - 1, -1) if ids[i] == end), stop)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn: the first that the template writes after the answer, else EOS."""
    answer = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = cast(str, _apply(tokenizer, messages, tokenize=False))
    ids = tokenizer(text.rpartition(answer)[2].strip(), add_special_tokens=False)["input_ids"]
    if ids:
        return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise BadConfig("the chat template writes no end of turn and the tokenizer has no EOS: set one of them")
    return int(cast(int, tokenizer.eos_token_id))


def answer_opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that the template writes between the opening of the assistant's turn and the answer; empty for most.

    Qwen3's is an empty think block, which training teaches and a model therefore generates. White space alone counts
    as none.
    """
    answer, messages = "answer", [{"role": "user", "content": "question"}]
    opening = _text(tokenizer, messages, generation=True)
    finished = _text(tokenizer, [*messages, {"role": "assistant", "content": answer}], generation=False)
    text = finished.removeprefix(opening).rpartition(answer)[0] if finished.startswith(opening) else ""
    return text if text.strip() else ""


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model_or_config: Any) -> list[int]:
    """Tokens at which generation stops: the model's own EOS ids, the tokenizer's, and the template's end of turn."""
    ids = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    for source in (getattr(model_or_config, "generation_config", None), getattr(model_or_config, "config", None)):
        ids.update(_as_list(getattr(source, "eos_token_id", None)))
    ids.update(_as_list(getattr(model_or_config, "eos_token_id", None)))
    return sorted(int(cast(int, token)) for token in ids if token is not None)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool) -> str:
    return cast(str, _apply(tokenizer, messages, tokenize=False, add_generation_prompt=generation))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of rendered conversations, each with exactly one BOS where the model or the template has one."""
    bos = tokenizer.bos_token_id
    added = bos is not None and bos in tokenizer("")["input_ids"]
    encoded = []
    for ids in encode_text(tokenizer, texts):
        start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        encoded.append([bos] * (start > 0 or added) + ids[start:])
    return encoded


def _refuse_turn_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> None:
    """Raises ValueError for a message that holds a token of turns: llama.cpp cannot read it as text."""
    tokens = special_tokens(tokenizer)
    for number, message in enumerate(messages, start=1):
        if token := tokens.turn_token(message["content"]):
            raise ValueError(
                f"message {number} holds the control token {token}, which the model's chat template writes and no text "
                "may: take it out of the text"
            )


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> Any:
    if not tokenizer.chat_template:
        raise BadConfig(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template (a base model?). Set chat_template=gemma, "
            "or put the right chat_template.jinja into the model directory"
        )
    return tokenizer.apply_chat_template(messages, **options)
