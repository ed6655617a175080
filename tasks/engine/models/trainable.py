"""A model with what of it is trained in float32: an adapter (LoRA, QLoRA), or all weights outside the towers."""

from typing import Literal, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.float16 import keep_residual_in_float32
from tasks.engine.models.lm_head import check_head, head_of, unwrap
from tasks.engine.models.load import load_model
from tasks.engine.models.load_adapter import continue_adapter
from tasks.engine.models.model_config import is_four_bit, read_config
from tasks.engine.models.new_adapter import add_adapter

Method = Literal["lora", "qlora", "full"]


def trainable_model(config: TrainingConfig, method: Method, base: ModelDir, device: str) -> PreTrainedModel:
    """The base with its trained parameters in float32: adapters, or every weight outside the towers.

    Where `base` carries an adapter, that adapter is trained on, with its own rank, alpha and modules, or merged into
    the weights that `full` trains. Raises BadConfig when `target_modules` fit nothing, or for `full` in 4 bits.
    """
    if method == "full" and is_four_bit(read_config(base.base)):
        raise BadConfig(f"{base.base} is stored in 4 bits, which cannot be trained themselves: set method=qlora")
    bare, precision = ModelDir(base.base), "float32" if method == "full" else config.precision
    model = load_model(base if method == "full" else bare, precision, device, four_bit=method == "qlora")
    check_head(model)
    torch.manual_seed(config.seed)
    if method == "full":
        model = _with_trainable_text(model, config.precision == "float16")
    elif base.adapter is not None:
        model = continue_adapter(config, model, base, device)
    else:
        model = cast(PreTrainedModel, add_adapter(config, model))
    head_of(model)  # raises when the head carries an adapter
    _check_embedding(model)
    return model


def _with_trainable_text(model: PreTrainedModel, float16: bool) -> PreTrainedModel:
    """The model with its adapter merged and every parameter outside the towers trained."""
    if isinstance(model, PeftModel):
        model = cast(PreTrainedModel, model.merge_and_unload())
    if float16:
        keep_residual_in_float32(model)
    family = family_of(model.config.model_type)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not family.is_tower(name))
    return model


def _check_embedding(model: nn.Module) -> None:
    """Raises BadConfig for an adapter on an embedding that is the head as well, which would not get it."""
    embedding = unwrap(model).get_input_embeddings()
    base = getattr(embedding, "base_layer", None)
    if base is not None and base.weight is head_of(model).weight:
        raise BadConfig(
            "target_modules: the embedding is the head as well, which would not get its adapter: leave it out"
        )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """`parameters` and `trainable_parameters`; a 4-bit weight counts by its elements, not its bytes."""
    counts = {"parameters": 0, "trainable_parameters": 0}
    for parameter in model.parameters():
        two_a_byte = type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8
        counts["parameters"] += parameter.numel() * (2 if two_a_byte else 1)
        counts["trainable_parameters"] += parameter.numel() if parameter.requires_grad else 0
    return counts
