"""The quickstart's two Gemma-3 shapes and how a base is written to disk.

Teacher rows are multiples of 256, so K-quants fit; student rows are multiples of 32 only, as on Gemma-3-270M, so they
do not. llama.cpp takes every sixth layer of a Gemma 3 as the full-attention one, hence six layers.
"""

import json
import shutil
from pathlib import Path

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

SHAPES: dict[str, dict[str, int]] = {
    "teacher": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "student": {
        "hidden_size": 160,
        "intermediate_size": 224,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
}
LAYERS = 6
END_OF_TURN = "<end_of_turn>"


def build(which: str, vocabulary: int, end_of_turn: int) -> Gemma3ForCausalLM:
    """A randomly initialised float32 base of the shape `which` ("teacher" or "student")."""
    shape = SHAPES[which]
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        num_hidden_layers=LAYERS,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        query_pre_attn_scalar=shape["head_dim"],
        sliding_window=512,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=[1, end_of_turn],
        bos_token_id=2,
    )
    return Gemma3ForCausalLM(config)


def save(model: Gemma3ForCausalLM, tokenizer: Path, out: Path) -> None:
    """Write bf16 weights, configs and the tokenizer's files; generation stops at `<eos>` and at `<end_of_turn>`."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16()
    copy.save_pretrained(out)
    for path in tokenizer.iterdir():
        if path.is_file():
            shutil.copyfile(path, out / path.name)
    stop = {"bos_token_id": 2, "eos_token_id": model.config.eos_token_id, "pad_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(stop, indent=2) + "\n")
