"""bitsandbytes' options for a family: linear layers in 4 or 8 bits, but for those that do not survive it."""

from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from tasks.core.errors import BadConfig
from tasks.engine.models.family import Family


def nf4_options(family: Family, compute: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization (QLoRA, arXiv 2305.14314), multiplied in `compute`."""
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=_skipped_modules(family),
    )


def int8_options(family: Family) -> BitsAndBytesConfig:
    """bitsandbytes' 8 bits, for inference."""
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_skipped_modules(family))  # type: ignore[no-untyped-call]


def check_quantized_modules(model: nn.Module, family: Family) -> None:
    """Raises BadConfig where a module that breaks in 4 bits was quantized all the same."""
    for name, module in model.named_modules():
        if family.is_never_4bit(name) and type(module).__name__ == "Linear4bit":
            raise BadConfig(f"{name} was quantized to 4 bits, which it does not survive: set method=lora")


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Sets the dtype that 4-bit layers multiply in, whatever the checkpoint was written for.

    On CPUs with AVX512-BF16, bitsandbytes would also repack the weights at the first inference: their scales are then
    rounded to bfloat16, and widths below a block of 64 raise. The weights stay as they are stored instead.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer = cast(Any, module)
            layer.compute_dtype, layer.support_avx512bf16_for_cpu = dtype, False


def _skipped_modules(family: Family) -> list[str]:
    return [f".*{name}" for name in (*family.never_4bit, *family.towers)]
