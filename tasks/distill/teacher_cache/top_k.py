"""Error of a top k: the exact distribution against the top k with a tail, on a sample of rows."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import collate, to_device
from tasks.engine.models.lm_head import head_of, hidden_states

SAMPLE_ROWS = 64


@torch.no_grad()
def topk_error(model: PreTrainedModel, examples: Sequence[Example], k: int, temperature: float) -> dict[str, float]:
    """Over the labels of evenly spread rows: `tail_mass`, and `kl`, the nats a label between the exact distribution
    and the top k with its tail spread evenly: the most that any student could still learn of the tail."""
    step = max(1, len(examples) // SAMPLE_ROWS)
    tail_mass = divergence = labels = 0.0
    for row in range(0, len(examples), step):
        batch = to_device(collate([(row, examples[row])]), model.device)
        logp = torch.log_softmax(head_of(model).logits(hidden_states(model, batch)) / temperature, -1).double()
        top = logp.topk(k).values
        tail_tokens = logp.shape[1] - k
        tail = (1 - top.exp().sum(-1)).clamp(min=0)
        spread = torch.log((tail / max(1, tail_tokens)).clamp(min=1e-300))
        kl = (logp.exp() * logp).sum(-1) - (top.exp() * top).sum(-1) - tail * spread
        tail_mass, divergence, labels = tail_mass + float(tail.sum()), divergence + float(kl.sum()), labels + len(kl)
    return {"tail_mass": tail_mass / labels, "kl": divergence / labels, "labels": labels}
