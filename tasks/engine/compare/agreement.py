"""Agreement of two models: KL(reference || other) and top-1 agreement on the answers' tokens, over the vocabulary.

agreement = Agreement()
for example in examples:
    agreement.add(answer_logits(reference, example), answer_logits(other, example))
agreement.require("merged model", max_mean_kl=0.01, min_top1=0.98)
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.errors import BadData, GateFailed
from tasks.core.rows import Row, read_rows
from tasks.engine.data.chat_template import IGNORE, Example


def test_rows(dataset: Path, count: int) -> list[Row]:
    """`count` rows of `test.jsonl`, evenly spread over the file; all of them when there are fewer."""
    rows = list(read_rows(dataset / "test.jsonl"))
    if not rows:
        raise BadData(f"{dataset}/test.jsonl is empty: two models cannot be compared without held-out rows")
    return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows


def answer_start(example: Example) -> int:
    """The index of the answer's first token."""
    return next(i for i, label in enumerate(example.labels) if label != IGNORE)


@torch.inference_mode()
def answer_logits(model: PreTrainedModel, example: Example) -> Tensor:
    """Logits that predict the answer's tokens, float32 on the CPU: [answer tokens, vocabulary]."""
    ids = torch.tensor([example.input_ids], device=model.device)
    keep = len(example.input_ids) - answer_start(example) + 1
    logits: Tensor = model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits[0, :-1]
    return logits.float().cpu()


class Agreement:
    """KL divergence and top-1 agreement, summed over tokens; V is the vocabulary.

    A token with a NaN or infinite logit in either model counts as no agreement and is left out of the mean KL.
    """

    def __init__(self) -> None:
        self.tokens = self.same_top1 = self.not_finite = 0
        self.kl = self.worst_kl = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Adds logits of the same tokens, [tokens, V] each; a padded vocabulary is cut to the smaller one."""
        width = min(reference.shape[-1], other.shape[-1])
        reference, other = reference[:, :width], other[:, :width]
        finite = reference.isfinite().all(-1) & other.isfinite().all(-1)
        self.tokens += len(finite)
        self.not_finite += int((~finite).sum())
        log_p, log_q = reference[finite].log_softmax(-1), other[finite].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # the sum of float32 terms can end just below 0
        self.kl += float(kl.double().sum())
        self.worst_kl = max(self.worst_kl, float(kl.max()) if len(kl) else 0.0)
        self.same_top1 += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return self.kl / max(1, self.tokens - self.not_finite)

    @property
    def top1(self) -> float:
        """The fraction of tokens whose most likely next token is the same."""
        return self.same_top1 / max(1, self.tokens)

    def metrics(self) -> dict[str, float]:
        """The numbers, for a report."""
        return {
            "mean_kl": self.mean_kl,
            "worst_kl": self.worst_kl,
            "top1": self.top1,
            "tokens": float(self.tokens),
            "not_finite": float(self.not_finite),
        }

    def require(self, label: str, max_mean_kl: float, min_top1: float) -> None:
        """Raises GateFailed with the numbers when they exceed the limits; `label` names the other model."""
        if self.not_finite or not self.mean_kl <= max_mean_kl or self.top1 < min_top1:
            raise GateFailed(
                f"{label} does not agree with its source on {self.tokens} answer tokens: mean KL {self.mean_kl:.3g} "
                f"(at most {max_mean_kl:g}), top-1 agreement {self.top1:.1%} (at least {min_top1:.1%}), "
                f"{self.not_finite} tokens with NaN or infinite logits (none allowed)"
            )
