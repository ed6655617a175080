"""llama.cpp's reading of tensor names: role, whether a tensor is quantized at all, and position in a file."""

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
    """llama.cpp's category of a tensor: output, embedding, attn_v, ffn_down ... or other."""
    if name == "output.weight":
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    for part in ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight", "attn_k.weight", "attn_q.weight"):
        if part in name:
            return "attn_v" if part in ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight") else part[:6]
    parts = [part for part in ("attn_output.weight", "ffn_up", "ffn_gate", "ffn_down") if part in name]
    return parts[0].removesuffix(".weight") if parts else "other"


def quantizable(name: str, ndim: int) -> bool:
    """Whether llama.cpp quantizes a tensor: a matrix whose name ends in `weight` and contains none of `NEVER`."""
    return ndim >= 2 and name.endswith("weight") and not any(part in name for part in NEVER)


def dimensions(shape: tuple[int, ...]) -> int:
    """Number of dimensions as ggml counts them, without trailing ones."""
    return max([i + 1 for i, size in enumerate(shape) if size > 1], default=1)


def layer_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which llama.cpp's quantizer writes tensors."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)
