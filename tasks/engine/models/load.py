"""Loads a model directory: the right class, every tensor checked, an adapter on top, the device's dtype.

model = load_model(ModelDir.parse("bases/gemma-3-1b-it+runs/teacher"))
"""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from tasks.core.errors import Corrupted
from tasks.core.refs import ModelDir
from tasks.engine.models.dtypes import pick_device, pick_dtype
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.float16 import keep_residual_in_float32, with_float32_norms
from tasks.engine.models.load_adapter import attach_adapter
from tasks.engine.models.model_config import is_four_bit, model_class, read_config, require_file
from tasks.engine.models.quantized_loading import (
    check_quantized_modules,
    int8_options,
    nf4_options,
    set_compute_dtype,
)


def load_model(
    model: ModelDir,
    precision: str = "auto",
    device: str | None = None,
    four_bit: bool = False,
    eight_bit: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode on `device`, its adapter attached unmerged.

    `precision` is as in `pick_dtype`; `four_bit` stores the linear layers as NF4 with double quantization, but for the
    head, the towers and what the family excludes; `eight_bit` stores them in bitsandbytes' 8 bits, for inference. A
    checkpoint that is in 4 bits on disk stays as it is.
    Raises BadConfig for a directory that is no model or another model's adapter, Corrupted when a tensor is missing.
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # progress is reported by `Job`
    device = device or pick_device()
    config = read_config(model.base)
    family = family_of(config.model_type)
    require_file(model.base, "*.safetensors", "the weights")
    stored_in_4bit, dtype = is_four_bit(config), pick_dtype(precision, device)
    options: dict[str, Any] = {}
    if four_bit and not stored_in_4bit:
        options["quantization_config"] = nf4_options(family, dtype)
    if eight_bit and not stored_in_4bit:
        options["quantization_config"] = int8_options(family)
    architecture = model_class(config)
    if dtype == torch.float16:
        architecture = with_float32_norms(architecture)
    loaded = _from_pretrained(architecture, model.base, dtype, device, options)
    if four_bit or stored_in_4bit:
        check_quantized_modules(loaded, family)
        set_compute_dtype(loaded, dtype)
    if dtype == torch.float16:
        keep_residual_in_float32(loaded)
    apply_score_softcap(loaded)
    if model.adapter is not None:
        require_file(model.adapter, "adapter_model.safetensors", "the adapter's weights")
        loaded = attach_adapter(loaded, model, device)
    return cast(PreTrainedModel, loaded.eval())


def _from_pretrained(architecture: Any, base: Path, dtype: torch.dtype, device: str, options: dict[str, Any]) -> Any:
    """transformers' loading, which makes up what is missing; raises Corrupted instead."""
    loaded, info = architecture.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise Corrupted(f"{base}: {len(names)} tensors missing or of another shape, {names[0]} first; get it anew")
    return loaded


def apply_score_softcap(model: PreTrainedModel) -> None:
    """Switches to the attention implementation that caps scores where the config asks for it (Gemma 2): transformers'
    other implementations leave the cap out silently."""
    config = model.config.get_text_config()
    family = family_of(config.model_type)
    if getattr(config, family.score_softcap, None):
        implementation = family.softcapped_attention
        parts = [name for name in model.config.sub_configs if getattr(model.config, name) is config]
        model.set_attn_implementation(dict.fromkeys(parts, implementation) if parts else implementation)
