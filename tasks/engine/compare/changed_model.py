"""Scores a changed model against reference logits on the answers, teacher forced."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.engine.compare.agreement import Agreement, answer_start
from tasks.engine.data.chat_template import Example


def compare_answers(model: PreTrainedModel, examples: list[Example], reference: list[Tensor]) -> dict[str, float]:
    """Mean and worst KL, top-1 agreement and tokens that are not finite, of `model` on the answers; and `exact`, the
    share of rows whose every answer token is the most likely one, so that greedy decoding writes the label."""
    agreement, exact = Agreement(), 0
    for example, expected in zip(examples, reference, strict=True):
        logits = _logits(model, example)
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
