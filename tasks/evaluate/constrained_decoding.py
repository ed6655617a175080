"""JSON-schema constrained decoding for Hugging Face models, with llguidance: what may come next, token by token."""

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadConfig
from tasks.evaluate.generation import Asked, Schema


class SchemaGuide:
    """A matcher a row, made when the row comes; a `tasks.evaluate.greedy_decoding.Guide`.

    `width` is the logits' vocabulary, which may be padded beyond the tokenizer's; padding is never allowed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, schema: Schema, asked: Asked, width: int) -> None:
        import llguidance  # noqa: PLC0415  (only where it is asked for)
        from llguidance.hf import from_tokenizer  # noqa: PLC0415

        self._matcher = llguidance.LLMatcher
        self._tokenizer = from_tokenizer(cast(Any, tokenizer), n_vocab=width, eos_token=sorted(asked.ends))
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        problem = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        if problem:
            raise BadConfig(f"llguidance cannot hold answers to this schema: {problem}. Set constrained_rows=0")
        self._rows: dict[int, Any] = {}
        self._width = width

    def allow(self, places: Sequence[int], logits: Tensor) -> Tensor:
        """Logits [rows, vocabulary] with -inf for tokens that leave the schema."""
        mask = torch.zeros((len(places), -(-self._width // 32)), dtype=torch.int32)
        for row, place in enumerate(places):
            matcher = self._rows.get(place) or self._new(place)
            matcher.unsafe_compute_mask_ptr(mask[row].data_ptr(), mask.shape[1] * 4)
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((mask.to(logits.device).unsqueeze(-1) >> bits) & 1).flatten(1)[:, : self._width]
        return logits.masked_fill(allowed == 0, -torch.inf)

    def accept(self, place: int, token: int) -> None:
        """The row's matcher goes on by one token."""
        self._rows[place].consume_token(token)

    def _new(self, place: int) -> Any:
        self._rows[place] = self._matcher(self._tokenizer, self._grammar)
        return self._rows[place]
