"""Special tokens that a text merely mentions (`<pad>`, `<mask>`, `<unused0>`) are encoded as text.

A conversation is rendered as one text, so a tokenizer cannot tell the template's own tokens from the same characters in
a question. Tokens that the template writes stay what they are, and a message that holds one is refused; every other
special token is text, and a GGUF file says so to llama.cpp (`text_token_ids`), which then reads the same ids.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# llama.cpp makes these control tokens, or ends an answer at them, whatever the file says (src/llama-vocab.cpp).
LLAMA_CPP_CONTROL = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "</s>",
        "<end_of_utterance>",
        "<|eom_id|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<｜end▁of▁sentence｜>",
        "<|channel|>",
        "<|message|>",
        "<|start|>",
        "<|constrain|>",
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    ]
)
LOOKS_SPECIAL = re.compile(
    r"<start_of_turn>|<end_of_turn>|<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL
)
"""Added tokens that are control tokens for llama.cpp's converter, or of turns, although a tokenizer may not say so."""


class SpecialTokens:
    """A tokenizer's special tokens with one chat template: those of turns, and those that are text in a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {token.content: (index, token.special) for index, token in tokenizer.added_tokens_decoder.items()}
        special = {text for text, (_, special) in added.items() if special or LOOKS_SPECIAL.fullmatch(text)}
        rendered = _rendered(tokenizer)
        own = {tokenizer.bos_token, tokenizer.eos_token} | LLAMA_CPP_CONTROL
        turns = {text for text in special if text in own or text in rendered}
        self.text_ids = {text: added[text][0] for text in special - turns} if rendered else {}
        self._numbers = frozenset(self.text_ids.values())
        longest_first = sorted(turns, key=len, reverse=True)
        self._turns = re.compile("|".join(map(re.escape, longest_first))) if turns else None
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._literal: Any = None

    def encode(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts without BOS; almost always the tokenizer's own, which costs nothing more."""
        encoded: list[list[int]] = list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])
        for number, ids in enumerate(encoded):
            if not self._numbers.isdisjoint(ids):
                encoded[number] = self._literal_tokenizer().encode(texts[number], add_special_tokens=False).ids
        return encoded

    def turn_token(self, text: str) -> str | None:
        """The first token of turns that a message's text holds; None without one."""
        match = self._turns.search(text) if self._turns is not None else None
        return match[0] if match else None

    def _literal_tokenizer(self) -> Any:
        if self._literal is None:
            assert self._backend is not None
            self._literal = _without(self._backend, frozenset(self.text_ids))
        return self._literal


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The tokenizer's special tokens, worked out once for each chat template."""
    return _special_tokens(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> SpecialTokens:
    return SpecialTokens(tokenizer)


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without BOS, in which only the chat template's own special tokens are more than text."""
    return special_tokens(tokenizer).encode(tokenizer, texts)


def text_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens that are text in a text: a GGUF file must not have them as control tokens."""
    return sorted(special_tokens(tokenizer).text_ids.values())


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes around short messages, with and without a system message; empty without a template."""
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    texts = []
    for messages in (turns, turns[:-1], [{"role": "system", "content": "x"}, *turns]):
        try:
            options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": messages is not turns}
            texts.append(str(tokenizer.apply_chat_template(messages, **options)))
        except TemplateError:  # no system message, or none before another's turn
            continue
    return "\n".join(texts)


def _without(backend: Any, texts: frozenset[str]) -> Any:
    """A copy of the tokenizer that reads these added tokens as text; no other token's id changes."""
    document = json.loads(backend.to_str())
    vocabulary = document["model"]["vocab"]
    pieces = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    # One that the model's own vocabulary lacks keeps its number under a name that no text has.
    document["added_tokens"] = [
        {**token, "content": f"\ufdd0{token['id']}\ufdd1"} if token["content"] in texts else token
        for token in document["added_tokens"]
        if token["content"] not in texts or token["content"] not in pieces
    ]
    return type(backend).from_str(json.dumps(document | {"truncation": None, "padding": None}))
