"""Pico models of every architecture that is compared with llama.cpp's own converter, saved as Hugging Face does."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nConfig,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

from tests.pico import pico_model, pico_tokenizer

TEXT: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
GEMMA = TEXT | {"query_pre_attn_scalar": 32, "sliding_window": 64}


def _saved(model: PreTrainedModel, directory: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def gemma3_float32(directory: Path) -> Path:
    """A Gemma 3 that is stored in float32, with values that bfloat16 has not."""
    pico_model(directory, hidden=64, layers=6)
    tensors = {name: tensor.float() * 1.0001 for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def gemma3_wide(directory: Path, layers: int = 8) -> Path:
    """Rows of 256 values, so that K- and IQ-kinds keep their types; four heads to a key."""
    return pico_model(
        directory, hidden=256, layers=layers, intermediate_size=256, num_attention_heads=4, head_dim=64,
        query_pre_attn_scalar=64,
    )  # fmt: skip


def gemma3_vision(directory: Path) -> Path:
    """A Gemma 3 with a tower, whose embedding has more rows than the tokenizer has pieces."""
    pico_tokenizer(directory)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = Gemma3TextConfig(**GEMMA, vocab_size=len(AutoTokenizer.from_pretrained(directory)) + 63)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    return _saved(model, directory)


def gemma3n(directory: Path, conditional: bool = True, without: int = 8, ffn: int = 96) -> Path:
    """A Gemma 3n whose last pieces are `without` per-layer embeddings, as Gemma 3n's pictures and sounds are;
    `conditional` in the layout of Gemma3nForConditionalGeneration, with tensors of towers.

    transformers can build that class only with timm and torchvision; llama.cpp's converter reads the files alone.
    The deviation behind its sparse MLP divides by n in transformers and by n - 1 in llama.cpp: take a wide `ffn` where
    their logits are compared.
    """
    pico_tokenizer(directory)
    count = len(AutoTokenizer.from_pretrained(directory))
    text = Gemma3nTextConfig(
        **(GEMMA | {"intermediate_size": [ffn] * 6}), vocab_size=count, vocab_size_per_layer_input=count - without,
        hidden_size_per_layer_input=256, laurel_rank=64, num_kv_shared_layers=0,
        layer_types=["sliding_attention"] * 4 + ["full_attention", "sliding_attention"],
        activation_sparsity_pattern=[0.95] * 6,
    )  # fmt: skip  # llama.cpp has 256, 64, 0.95 and every fifth layer in its code
    torch.manual_seed(0)
    _saved(Gemma3nForCausalLM(text), directory)
    if not conditional:
        return directory
    tensors = load_file(directory / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    towers = ["model.vision_tower.stem.weight", "model.audio_tower.conv.weight", "model.embed_vision.norm.weight"]
    renamed |= {name: torch.randn(4, 4, dtype=torch.bfloat16) for name in towers}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    config = Gemma3nConfig(text_config=text).to_dict() | {"architectures": ["Gemma3nForConditionalGeneration"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def llama(directory: Path) -> Path:
    """Untied, with rows of queries and keys that llama.cpp permutes."""
    return _generic(directory, LlamaForCausalLM, LlamaConfig, tie_word_embeddings=False)


def qwen2(directory: Path) -> Path:
    """Untied, with biases."""
    return _generic(directory, Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=False)


def qwen3(directory: Path) -> Path:
    """Tied."""
    return _generic(directory, Qwen3ForCausalLM, Qwen3Config, tie_word_embeddings=True)


def _generic(directory: Path, model: Any, config: Any, **options: Any) -> Path:
    pico_tokenizer(directory)
    torch.manual_seed(0)
    count = len(AutoTokenizer.from_pretrained(directory))
    return _saved(model(config(**TEXT, vocab_size=count, **options)), directory)


def gemma3(directory: Path) -> Path:
    """The pico Gemma 3 of all tests, in layers enough for llama.cpp."""
    return pico_model(directory, hidden=64, layers=6)


ARCHITECTURES = (gemma3, gemma3_float32, gemma3_wide, gemma3_vision, gemma3n, llama, qwen2, qwen3)
