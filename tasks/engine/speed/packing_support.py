"""Whether a model's rows may lie one behind the other: packed attention switched on, and tried.

reason = make_packable(model, dtype)             # None, or why this architecture has to be padded
"""

import torch
from transformers import PreTrainedModel

from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, collate, to_device
from tasks.engine.data.sequence_packing import Packing, pack
from tasks.engine.models.lm_head import hidden_states, unwrap
from tasks.engine.speed.packed_attention import use_packed_attention


def make_packable(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Gives the model packed attention and tries it on two short rows; None, or the reason why it must be padded.

    `dtype` is what queries and keys are multiplied in. A model that fails gets its own attention back.
    """
    inner = unwrap(model)
    before = {name: getattr(inner.config, name)._attn_implementation for name in inner.config.sub_configs}
    before |= {"": inner.config._attn_implementation}
    rows = [(row, Example(ids, ids)) for row, ids in enumerate([list(range(1, 4)), list(range(4, 13))])]
    packing = Packing([[0, 1]], (), 2, 9)
    training = model.training
    model.train(False)
    try:
        with torch.no_grad(), torch.autocast(inner.device.type, dtype, enabled=dtype != torch.float32):
            want = torch.cat([_hidden(model, collate([row])) for row in rows])
            noise = _distance(_hidden(model, collate(rows)), want)
            use_packed_attention(inner, dtype)
            got = _hidden(model, pack(rows, packing))
        # Products of other shapes round otherwise: a deep model in half precision by several percent.
        if _distance(got, want) <= max(3 * noise, 1e-3 if dtype == torch.float32 else 2e-2):
            return None
        reason = "its rows see each other, or their place in the batch"
    except (TypeError, ValueError) as error:
        reason = str(error)
    finally:
        model.train(training)
    inner.set_attn_implementation(before)
    return f"{type(inner).__name__} cannot be packed: {reason}"


def _hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return hidden_states(model, to_device(batch, model.device)).float()


def _distance(ours: torch.Tensor, want: torch.Tensor) -> float:
    return float((ours - want).norm() / want.norm())
