"""Chat messages to token ids: what training teaches is, id for id, what generation will see.

prompt = prompt_ids(tokenizer, row.prompt)      # generation starts here
example = encode(tokenizer, row)                # the same ids, the answer's and its end-of-turn
"""

from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadConfig
from tasks.core.rows import Row

IGNORE = -100


class Example(NamedTuple):
    """A row as ids; `labels` is `input_ids` where the answer is and -100 on the prompt (not shifted)."""

    input_ids: list[int]
    labels: list[int]

    @property
    def answer_ids(self) -> list[int]:
        """The labels without the prompt's -100."""
        return [label for label in self.labels if label != IGNORE]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids of the messages and the opening of the assistant's turn, with exactly one BOS where the model has one."""
    return _template(tokenizer, messages, generation=True)


def encode(tokenizer: PreTrainedTokenizerBase, row: Row, end: int | None = None) -> Example:
    """A row's ids and labels; the last label is the end-of-turn token. `end` saves computing `turn_end` for each row.

    Raises ValueError when the ids of the whole conversation do not start with the ids of its prompt.
    """
    prompt = prompt_ids(tokenizer, row.prompt)
    whole = _template(tokenizer, [message.model_dump() for message in row.messages], generation=False)
    if whole[: len(prompt)] != prompt:
        at = next(i for i, (a, b) in enumerate(zip([*whole, None], [*prompt, None], strict=False)) if a != b)
        raise ValueError(
            f"the chat template's prompt is not a prefix of the conversation: they part at token {at}, after "
            f"{tokenizer.decode(prompt[:at])[-40:]!r}. Training would teach what generation never sees; use a chat "
            "template whose generation prompt opens the assistant's turn exactly as a finished turn is written"
        )
    end = turn_end(tokenizer) if end is None else end
    answer = whole[len(prompt) :]
    # What a template writes behind the end of turn is never generated; one that writes no end of turn gets it here.
    answer = answer[: len(answer) - answer[::-1].index(end)] if end in answer else [*answer, end]
    return Example(prompt + answer, [IGNORE] * len(prompt) + answer)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn: the first that the template writes after the answer, else EOS."""
    mark = "answer"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
    text = cast(str, _apply(tokenizer, messages, tokenize=False))
    ids = tokenizer(text.rpartition(mark)[2].strip(), add_special_tokens=False)["input_ids"]
    if ids:
        return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise BadConfig("the chat template writes no end of turn and the tokenizer has no EOS: set one of them")
    return int(cast(int, tokenizer.eos_token_id))


def end_ids(tokenizer: PreTrainedTokenizerBase, model_or_config: Any) -> list[int]:
    """Tokens at which generation stops: the model's own EOS ids, the tokenizer's, and the template's end of turn."""
    found = {turn_end(tokenizer), tokenizer.eos_token_id}
    for source in (getattr(model_or_config, "generation_config", None), getattr(model_or_config, "config", None)):
        found.update(_listed(getattr(source, "eos_token_id", None)))
    found.update(_listed(getattr(model_or_config, "eos_token_id", None)))
    return sorted(int(cast(int, token)) for token in found if token is not None)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool) -> list[int]:
    ids = list(_apply(tokenizer, messages, tokenize=True, return_dict=False, add_generation_prompt=generation))
    bos = tokenizer.bos_token_id
    start = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    wants_bos = start > 0 or (bos is not None and bos in tokenizer("")["input_ids"])
    return [bos] * wants_bos + ids[start:]


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> Any:
    if not tokenizer.chat_template:
        raise BadConfig(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template (a base model?). Set chat_template=gemma, "
            "or put the right chat_template.jinja into the model directory"
        )
    return tokenizer.apply_chat_template(messages, **options)
