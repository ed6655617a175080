"""What llama.cpp sees in a tensor's name: its role, whether it is quantized at all, and its place in a file."""

import re

# Parts of names that llama.cpp never quantizes (tensor_allows_quantization).
NEVER = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight",
    "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight",
    "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight",
    "attn_rel_b.weight", ".position_embd", "position_embd.weight", "token_types.weight", ".patch_embd", ".rel_pos",
)  # fmt: skip
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


def role(name: str) -> str:
    """The first of llama.cpp's tensor categories that fits."""
    if name == "output.weight":
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    for part in ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight", "attn_k.weight", "attn_q.weight"):
        if part in name:
            return "attn_v" if part in ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight") else part[:6]
    found = [part for part in ("attn_output.weight", "ffn_up", "ffn_gate", "ffn_down") if part in name]
    return found[0].removesuffix(".weight") if found else "other"


def quantizable(name: str, ndim: int) -> bool:
    """Whether llama.cpp quantizes such a tensor at all: matrices that end in `weight`, but for a list of names."""
    return ndim >= 2 and name.endswith("weight") and not any(part in name for part in NEVER)


def dimensions(shape: tuple[int, ...]) -> int:
    """As ggml counts them: without the ones at the end."""
    return max([i + 1 for i, size in enumerate(shape) if size > 1], default=1)


def layer_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which llama.cpp's quantizer goes through tensors and writes them."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)
