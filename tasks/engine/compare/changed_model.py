"""A changed model tried against reference logits, teacher forced.

`exact` is the share of rows whose every answer token is the most likely one: when greedy decoding writes the label.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.engine.compare.agreement import Agreement, answer_start
from tasks.engine.data.chat_template import Example


def trial(other: PreTrainedModel, examples: list[Example], reference: list[Tensor]) -> dict[str, float]:
    """Mean and worst KL, top-1 agreement, tokens that are not finite, and `exact`, of `other` on the answers."""
    agreement, exact = Agreement(), 0
    for example, expected in zip(examples, reference, strict=True):
        logits = _logits(other, example)
        agreement.add(expected, logits)
        exact += bool(logits.isfinite().all()) and logits.argmax(-1).tolist() == example.answer_ids
    return {**agreement.metrics(), "exact": exact / len(examples)}


@torch.no_grad()  # Quanto's 4-bit tensors cannot be made in inference mode
def _logits(model: PreTrainedModel, example: Example) -> Tensor:
    """As `answer_logits`: float32 on the CPU, [answer tokens, vocabulary]."""
    ids = torch.tensor([example.input_ids], device=model.device)
    keep = len(example.input_ids) - answer_start(example) + 1
    logits: Tensor = model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits[0, :-1]
    return logits.float().cpu()
