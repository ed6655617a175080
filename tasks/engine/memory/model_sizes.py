"""Sizes of a model before it is loaded, counted on torch's meta device from its config.

sizes = sizes_of(ModelDir.parse("bases/gemma-3-1b-it"), config, "qlora")
"""

from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.family import Family
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.model_config import is_four_bit, model_class, read_config
from tasks.engine.models.new_adapter import add_adapter
from tasks.engine.models.trainable import Method


class ModelSizes(NamedTuple):
    """Sizes in elements, of a model with what is trained of it.

    `ffn`, `query` and `key` are a layer's widths, `per_layer` that of its own embedding; `streams` residual streams
    run side by side, and `sparse_layers` set a fraction of their MLP gates to zero. `quantizable` are the elements of
    linear layers that 4 bits are for, `largest` those of the largest one, `unquantizable` all others. `adapted_in` and
    `adapted_out` are the widths of a layer's adapted matrices, summed; `embedding` the trained elements of embeddings.
    `mlp_adapted`: all of the gated MLP's matrices have adapters. `handwritten`: tasks.engine.speed.gemma3 runs the
    layers when all are trained.
    """

    layers: int
    hidden: int
    ffn: int
    query: int
    key: int
    vocab: int
    streams: int
    per_layer: int
    quantizable: int
    largest: int
    unquantizable: int
    trainable: int
    adapted_in: int
    adapted_out: int
    embedding: int
    rank: int
    head: int
    mlp_adapted: bool
    handwritten: bool = False
    sparse_layers: int = 0


class _Trained(NamedTuple):
    """What is trained, in the fields of `ModelSizes`."""

    trainable: int
    adapted_in: int = 0
    adapted_out: int = 0
    embedding: int = 0
    rank: int = 0
    mlp_adapted: bool = False


def sizes_of(base: ModelDir, config: TrainingConfig, method: Method) -> ModelSizes:
    """The sizes of the model at `base` with what `config` and `method` add to it."""
    if base.adapter is not None and method != "full":
        earlier = LoraConfig.from_pretrained(str(base.adapter))
        targets = (
            earlier.target_modules if isinstance(earlier.target_modules, str) else sorted(earlier.target_modules or [])
        )
        config = config.model_copy(update={"rank": earlier.r, "use_dora": earlier.use_dora, "target_modules": targets})
    return count_sizes(read_config(base.base), config, method)


def count_sizes(model_config: PretrainedConfig, config: TrainingConfig, method: Method) -> ModelSizes:
    """As `sizes_of`, from a model's config."""
    text, family = cast(Any, model_config.get_text_config()), family_of(model_config.model_type)
    model, missing = _on_meta(model_config, family)
    total = missing + sum(parameter.numel() for parameter in model.parameters())
    head = cast(Any, model).get_output_embeddings()
    linear = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not family.is_never_4bit(name)
    ]
    trained = _all_weights(model, family) if method == "full" else _adapters(model, config, text.num_hidden_layers)
    ffn = text.intermediate_size
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSizes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=max(ffn) if isinstance(ffn, list | tuple) else ffn,
        query=text.num_attention_heads * width,
        key=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width,
        vocab=text.vocab_size,
        streams=family.streams(text),
        per_layer=family.per_layer(text),
        quantizable=sum(linear),
        largest=max(linear, default=0),
        unquantizable=total - sum(linear),
        head=text.vocab_size * text.hidden_size,
        handwritten=family.handwritten_layers,
        sparse_layers=family.sparse_layers(text),
        **trained._asdict(),
    )


def _all_weights(model: PreTrainedModel, family: Family) -> _Trained:
    """Every weight outside the towers."""
    trainable = sum(p.numel() for name, p in model.named_parameters() if not family.is_tower(name))
    embedding = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    return _Trained(trainable, embedding=embedding)


def _adapters(model: PreTrainedModel, config: TrainingConfig, layers: int) -> _Trained:
    """The adapters that `config` puts on the model."""
    with torch.device("meta"):
        model = cast(PreTrainedModel, add_adapter(config, model))
    modules = list(cast(nn.Module, model).named_modules())
    inputs = sum(cast(nn.Linear, module).in_features for name, module in modules if name.endswith("lora_A.default"))
    outputs = sum(cast(nn.Linear, module).out_features for name, module in modules if name.endswith("lora_B.default"))
    mlp = ("gate_proj", "up_proj", "down_proj")
    return _Trained(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapted_in=round(inputs / layers),
        adapted_out=round(outputs / layers),
        rank=config.rank,
        mlp_adapted=all(any(f".{matrix}.lora_A" in name for name, _ in modules) for matrix in mlp),
    )


def _on_meta(config: PretrainedConfig, family: Family) -> tuple[PreTrainedModel, int]:
    """The model without weights, and the elements of towers that could not be built with it."""
    if is_four_bit(config):
        config = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        try:
            built = model_class(config)
            return (built(config) if built is not AutoModelForCausalLM else cast(Any, built).from_config(config)), 0
        except ImportError:
            if not family.unbuildable_tower_elements:
                raise
            model = cast(Any, AutoModelForCausalLM).from_config(config.get_text_config())
            audio = cast(Any, AutoModel).from_config(config.audio_config)
    return model, sum(p.numel() for p in audio.parameters()) + family.unbuildable_tower_elements
