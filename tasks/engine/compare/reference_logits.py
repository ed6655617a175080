"""Reference logits without the reference model: its hidden states and LM head, so that it need not stay in memory.

reference = ReferenceLogits(load_model(a, "float32"), examples)      # final hidden states: H numbers a token, not V
other = load_model(b, "float32")
agreement.add(reference.logits(i), answer_logits(other, examples[i]))
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.engine.compare.agreement import answer_logits
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import collate, to_device
from tasks.engine.losses.loss_mix import Head
from tasks.engine.models.lm_head import check_head, head_of, hidden_states


class ReferenceLogits:
    """A model's logits on the answers of `examples`, stored as final hidden states and recomputed with the LM head.

    Of a model whose head does not give its logits, the logits themselves are stored: rows x vocabulary in float32.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, examples: Sequence[Example]) -> None:
        self._head: Head | None = None
        try:
            check_head(model)
        except BadConfig:
            self._rows = [answer_logits(model, example) for example in examples]
            return
        self._head = head_of(model)
        self._rows = [
            hidden_states(model, to_device(collate([(0, example)]), model.device)).clone() for example in examples
        ]

    @torch.inference_mode()
    def logits(self, i: int) -> Tensor:
        """Logits that predict the answer of example `i`, float32 on the CPU: [answer tokens, vocabulary]."""
        if self._head is None:
            return self._rows[i]
        return self._head.logits(self._rows[i]).float().cpu()

    def share_head(self, other: "ReferenceLogits") -> None:
        """Uses `other`'s head in place of an equal one of its own, to free memory: a merge seldom changes it."""
        if self._head and other._head and torch.equal(self._head.weight, other._head.weight):
            self._head = other._head
