"""float16 for cards without bfloat16 (T4, V100): matrices in float16, residual stream and its norms in float32.

Gemma 3's residual stream exceeds 65504, float16's largest number, while the inputs of its matrices stay small
(transformers PR#37226, onnxruntime PR#29611: matmuls of gemma-3-270m-it peak near 324). So embedding, norms, and the
sums between layers are computed in float32, and only the inputs of matrices are rounded. Loss scaling keeps gradients
above float16's smallest numbers (tasks.engine.training.loss_scaling).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.engine.models.family import EMBEDDING_SCALE
from tasks.engine.models.family_registry import family_of


def with_float32_norms(architecture: Any) -> Any:
    """A model class that reads its norms in float32 where all else is read in float16: Gemma stores gain - 1, and a
    gain near 0 is lost near -1."""
    modules = [*(architecture._keep_in_fp32_modules or []), "norm"]
    attributes = {"_keep_in_fp32_modules": modules, "__module__": architecture.__module__}
    return type(architecture.__name__, (architecture,), attributes)


def matrix_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the model's embedding, and so of its matrices."""
    return cast(nn.Embedding, model.get_input_embeddings()).weight.dtype


def keep_residual_in_float32(model: PreTrainedModel) -> None:
    """Hooks that compute a model's residual stream in float32, where its matrices are float16 or autocast rounds to it.

    Raises BadConfig for families whose residual stream enters products unnormed.
    """
    config = model.config.get_text_config()
    if not family_of(config.model_type).trains_in_float16:
        raise BadConfig(
            f"{config.model_type} does not keep its residual stream out of float16: set precision=float32, or use a "
            "card with bfloat16 (Ampere or newer)"
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Embedding) and module is model.get_input_embeddings():
            module.register_forward_hook(_embed_exactly)
        elif name.endswith(("q_norm", "k_norm")):  # of a head's queries and keys, which are small
            module.to(matrix_dtype(model))
        elif kind.endswith(("RMSNorm", "LayerNorm")) and module.weight.shape == (config.hidden_size,):
            module.to(torch.float32)
            module.register_forward_pre_hook(_to_float32)
        elif kind.endswith("RotaryEmbedding"):
            module.register_forward_hook(_rotate_in_float16)
        elif isinstance(module, nn.Linear) and module.weight.dtype == torch.float16 and "lora_" not in name:
            module.register_forward_pre_hook(_to_float16)


def _to_float32(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _to_float16(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (args[0].to(torch.float16), *args[1:])


def _embed_exactly(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Rows of the embedding in float32 times Gemma's factor, which would overflow in float16."""
    rows = F.embedding(args[0], module.weight, module.padding_idx)
    return rows.float() * getattr(module, EMBEDDING_SCALE, 1.0)


def _rotate_in_float16(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Sine and cosine in the queries' dtype; they would follow the residual stream's."""
    return tuple(part.to(torch.float16) for part in output)
