"""Enables packed attention on a model and checks that it computes what padded rows do.

reason = enable_packing(model, dtype)             # None, or why this architecture has to be padded
"""

import torch
from transformers import PreTrainedModel

from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, collate, to_device
from tasks.engine.data.sequence_packing import Packing, collate_packed
from tasks.engine.models.lm_head import hidden_states, unwrap
from tasks.engine.speed.packed_attention import use_packed_attention


def enable_packing(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Switches a model to packed attention if two short rows packed have the hidden states of rows alone.

    Returns None, or the reason why its rows must be padded; it then has its own attention back. `dtype` is that of
    queries and keys.
    """
    inner = unwrap(model)
    implementations = {name: getattr(inner.config, name)._attn_implementation for name in inner.config.sub_configs}
    implementations |= {"": inner.config._attn_implementation}
    rows = [(index, Example(ids, ids)) for index, ids in enumerate([list(range(1, 4)), list(range(4, 13))])]
    packing = Packing([[0, 1]], (), 2, 9)
    training = model.training
    model.train(False)
    try:
        with torch.no_grad(), torch.autocast(inner.device.type, dtype, enabled=dtype != torch.float32):
            expected = torch.cat([_float_states(model, collate([index])) for index in rows])
            noise = _relative_error(_float_states(model, collate(rows)), expected)
            use_packed_attention(inner, dtype)
            packed = _float_states(model, collate_packed(rows, packing))
        # Matrix products of other shapes round otherwise: a deep model in half precision by several percent.
        if _relative_error(packed, expected) <= max(3 * noise, 1e-3 if dtype == torch.float32 else 2e-2):
            return None
        reason = "its rows see each other, or their position in the batch"
    except (TypeError, ValueError) as error:
        reason = str(error)
    finally:
        model.train(training)
    inner.set_attn_implementation(implementations)
    return f"{type(inner).__name__} cannot be packed: {reason}"


def _float_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return hidden_states(model, to_device(batch, model.device)).float()


def _relative_error(states: torch.Tensor, expected: torch.Tensor) -> float:
    return float((states - expected).norm() / expected.norm())
