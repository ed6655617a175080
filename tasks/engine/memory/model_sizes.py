"""A model's sizes before a byte of it is loaded: built from its config on torch's meta device and counted.

shapes = shapes_of(read_config(directory), config, "qlora")
"""

import re
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.load import NEVER_4BIT, TOWERS, is_four_bit, model_class, read_config
from tasks.engine.models.trainable import Method, with_adapters

VISION_WITHOUT_TIMM = 300_000_000  # mobilenetv5_300m, Gemma 3n's vision tower, where timm cannot build it


class Shapes(NamedTuple):
    """Sizes in elements. `ffn`, `query` and `key` are a layer's widths, `adapted_in` and `adapted_out` summed widths of
    a layer's adapted matrices, `streams` how many residual streams run side by side (AltUp in Gemma 3n), `per_layer`
    the width of per-layer embeddings, `embedded` the trained elements of embeddings; `gated` says whether the gated
    MLP has adapters on all its matrices, `stacked` whether tasks.engine.speed.gemma3 runs the layers when all are
    trained,
    `sparse` how many layers let few of their gates through (Gemma 3n)."""

    layers: int
    hidden: int
    ffn: int
    query: int
    key: int
    vocab: int
    streams: int
    per_layer: int
    packable: int
    largest: int
    rest: int
    trained: int
    adapted_in: int
    adapted_out: int
    embedded: int
    rank: int
    head: int
    gated: bool
    stacked: bool = False
    sparse: int = 0


def shapes_of(base: ModelDir, config: TrainingConfig, method: Method) -> Shapes:
    """The sizes of the model at `base` with what `config` and `method` add to it."""
    found = read_config(base.base)
    if base.adapter is not None and method != "full":
        earlier = LoraConfig.from_pretrained(str(base.adapter))
        targets = (
            earlier.target_modules if isinstance(earlier.target_modules, str) else sorted(earlier.target_modules or [])
        )
        config = config.model_copy(update={"rank": earlier.r, "use_dora": earlier.use_dora, "target_modules": targets})
    return count(found, config, method)


def count(found: PretrainedConfig, config: TrainingConfig, method: Method) -> Shapes:
    """As `shapes_of`, from a model's config."""
    text = cast(Any, found.get_text_config())
    model, towers = _on_meta(found)
    plain = {name: p.numel() for name, p in model.named_parameters()}
    packable, largest = 0, 0
    never = re.compile("|".join((*NEVER_4BIT, *TOWERS)))
    head = cast(Any, model).get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and not never.search(name):
            packable += module.weight.numel()
            largest = max(largest, module.weight.numel())
    if method == "full":
        trained = sum(size for name, size in plain.items() if not any(tower in name for tower in TOWERS))
        embedded = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        adapted_in = adapted_out = rank = 0
        gated = False
    else:
        with torch.device("meta"):
            model = cast(PreTrainedModel, with_adapters(config, model))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        named = list(cast(nn.Module, model).named_modules())
        wide_in = [cast(nn.Linear, m).in_features for name, m in named if name.endswith("lora_A.default")]
        wide_out = [cast(nn.Linear, m).out_features for name, m in named if name.endswith("lora_B.default")]
        adapted_in, adapted_out = (round(sum(wide) / text.num_hidden_layers) for wide in (wide_in, wide_out))
        embedded, rank = 0, config.rank
        mlp = ("gate_proj", "up_proj", "down_proj")
        gated = all(any(f".{one}.lora_A" in name for name, _ in named) for one in mlp)
    ffn = text.intermediate_size
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=max(ffn) if isinstance(ffn, list | tuple) else ffn,
        query=text.num_attention_heads * width,
        key=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * width,
        vocab=text.vocab_size,
        streams=getattr(text, "altup_num_inputs", 1),
        per_layer=getattr(text, "hidden_size_per_layer_input", 0) or 0,
        packable=packable,
        largest=largest,
        rest=sum(plain.values()) + towers - packable,
        trained=trained,
        adapted_in=adapted_in,
        adapted_out=adapted_out,
        embedded=embedded,
        rank=rank,
        head=text.vocab_size * text.hidden_size,
        gated=gated,
        stacked=text.model_type == "gemma3_text",
        sparse=sum(part > 0 for part in getattr(text, "activation_sparsity_pattern", None) or ()),
    )


def _on_meta(found: PretrainedConfig) -> tuple[PreTrainedModel, int]:
    """The model without weights, and the elements of towers that could not be built beside it."""
    if is_four_bit(found):
        found = type(found).from_dict({k: v for k, v in found.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        try:
            built = model_class(found)
            return (built(found) if built is not AutoModelForCausalLM else cast(Any, built).from_config(found)), 0
        except ImportError:  # Gemma 3n's vision tower needs timm
            model = cast(Any, AutoModelForCausalLM).from_config(found.get_text_config())
            audio = cast(Any, AutoModel).from_config(found.audio_config)
    return model, sum(p.numel() for p in audio.parameters()) + VISION_WITHOUT_TIMM
