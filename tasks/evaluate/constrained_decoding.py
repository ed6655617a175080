"""JSON-schema constrained decoding for Hugging Face models, with llguidance: masks tokens that leave the schema."""

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadConfig
from tasks.evaluate.generation import GenerationRequest, Schema


class SchemaGuide:
    """One llguidance matcher a row; a `tasks.evaluate.greedy_decoding.Guide`.

    `vocabulary` is the width of the logits, which may be padded beyond the tokenizer's; padding is never allowed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, schema: Schema, request: GenerationRequest, vocabulary: int
    ) -> None:
        import llguidance  # noqa: PLC0415  (only for constrained rows)
        from llguidance.hf import from_tokenizer  # noqa: PLC0415

        self._matcher_class = llguidance.LLMatcher
        self._tokenizer = from_tokenizer(cast(Any, tokenizer), n_vocab=vocabulary, eos_token=sorted(request.end_ids))
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        problem = llguidance.LLMatcher.validate_grammar(self._grammar, self._tokenizer)
        if problem:
            raise BadConfig(f"llguidance cannot hold answers to this schema: {problem}. Set constrained_rows=0")
        self._matchers: dict[int, Any] = {}
        self._vocabulary = vocabulary

    def allow(self, indices: Sequence[int], logits: Tensor) -> Tensor:
        """Logits [rows, vocabulary] with -inf for tokens that leave the schema."""
        mask = torch.zeros((len(indices), -(-self._vocabulary // 32)), dtype=torch.int32)
        for row, index in enumerate(indices):
            matcher = self._matchers.get(index) or self._new_matcher(index)
            matcher.unsafe_compute_mask_ptr(mask[row].data_ptr(), mask.shape[1] * 4)
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        allowed = ((mask.to(logits.device).unsqueeze(-1) >> bits) & 1).flatten(1)[:, : self._vocabulary]
        return logits.masked_fill(allowed == 0, -torch.inf)

    def accept(self, index: int, token: int) -> None:
        """Advances the row's matcher by one token."""
        self._matchers[index].consume_token(token)

    def _new_matcher(self, index: int) -> Any:
        self._matchers[index] = self._matcher_class(self._tokenizer, self._grammar)
        return self._matchers[index]
