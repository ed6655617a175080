"""Pico checkpoints for the tests of loading: a Gemma 3, one with a vision tower, and the text half of a Gemma 3n."""

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3nForCausalLM, Gemma3nTextConfig

from tests.pico import pico_model

TEXT = dict(
    vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return pico_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def with_tower(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma3")
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_index=419)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def gemma3n(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma3n")
    config = Gemma3nTextConfig(
        **TEXT, vocab_size_per_layer_input=420, hidden_size_per_layer_input=256, laurel_rank=4, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    Gemma3nForCausalLM(config).save_pretrained(directory)
    return directory
