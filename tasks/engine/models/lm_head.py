"""Runs decoder and LM head apart, so that logits exist at labelled positions only.

hidden = hidden_states(model, batch)        # (N, H), at the batch's N labelled positions
logits = head_of(model).logits(hidden)      # (N, V)
"""

from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, collate, to_device
from tasks.engine.losses.loss_mix import Head
from tasks.engine.models.family_registry import family_of


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model below a PEFT wrapper; adapters stay in its layers."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of the text model, in order."""
    body = cast(Any, unwrap(model).base_model)
    return list(getattr(body, "language_model", body).layers)


def head_of(model: nn.Module) -> Head:
    """The output projection and its softcap. Raises BadConfig for a head that carries an adapter or a bias."""
    inner = unwrap(model)
    head = cast(Any, inner).get_output_embeddings()
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        raise BadConfig(
            "the head carries an adapter, which the chunked loss would not see: leave it out of target_modules"
        )
    if head.bias is not None:
        raise BadConfig(f"{type(inner).__name__} has a head with a bias, which the chunked loss does not know")
    config = inner.config.get_text_config()
    return Head(head.weight, getattr(config, family_of(config.model_type).logit_softcap, None))


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The decoder's final hidden states (N, H) at the batch's N labelled positions, of packed or padded rows."""
    body, packed = cast(Any, unwrap(model).base_model), dict[str, Any]()
    if "decoder" in batch:
        return batch["decoder"](batch, body.embed_tokens(batch["input_ids"]))
    if batch["cu_seqlens"] is not None:
        borders, longest = batch["cu_seqlens"], batch["longest"]
        packed = {"position_ids": batch["position_ids"], "cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        packed |= {"max_length_q": longest, "max_length_k": longest}
    hidden: Tensor = body(input_ids=batch["input_ids"], use_cache=False, **packed).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch["positions"])


def check_head(model: nn.Module) -> None:
    """Raises BadConfig when decoder and head, run apart, do not give the model's own logits (a scale between them)."""
    ids = list(range(1, 9))
    batch = to_device(collate([(0, Example(ids, ids))]), next(model.parameters()).device)
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1].float()
        logits = head_of(model).logits(hidden_states(model, batch))
    if not torch.allclose(expected, logits, rtol=2e-2, atol=2e-2 * float(expected.abs().max())):
        raise BadConfig(
            f"{type(unwrap(model)).__name__} scales its logits in a way that the chunked loss does not know"
        )
