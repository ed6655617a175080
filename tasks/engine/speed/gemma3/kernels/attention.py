# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Causal attention over packed rows, forward and backward: Triton kernels for short rows, torch's flash for long ones.

Chat rows are a hundred tokens or two, a few blocks each. A block of queries holds all `GROUP` heads that share a key
head, so keys and values are read once for the group and the product itself sums their gradients over it. Online softmax
and recomputation as in FlashAttention-2 (arXiv 2307.08691); formulas in tasks.engine.speed.gemma3.reference_ops.
"""

import torch
import triton
from torch import Tensor

from tasks.engine.speed.gemma3.attention_shapes import AttentionShape, PackedRows
from tasks.engine.speed.gemma3.kernels.attention_backward import attention_backward_keys, attention_backward_queries
from tasks.engine.speed.gemma3.kernels.attention_forward import attention_forward

LOG2E = 1.4426950408889634
MAX_LENGTH = 512  # tokens: longer rows take torch's kernel
# Blocks: (queries x heads of a group, keys, warps, stages)
FORWARD, QUERIES, KEYS = (64, 32, 4, 2), (64, 16, 4, 3), (32, 64, 8, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """See reference_ops.attend; the second result is the scores' log-sum-exps (T, A) in base 2."""
    cu_seqlens, longest = rows.cu_seqlens, rows.longest
    if longest > MAX_LENGTH:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v.contiguous(), cu_seqlens, cu_seqlens, longest, longest, 0.0, _causal(rows, shape),
            False, scale=shape.scale, **_window(rows, shape),
        )  # fmt: skip
        return out.flatten(1), lse
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group, (block, keys, warps, stages) = shape.heads // shape.kv_heads, FORWARD
    block = max(block, 16 * group)
    grid = (len(cu_seqlens) - 1, triton.cdiv(longest, block // group), shape.kv_heads)
    attention_forward[grid](
        q, k, v, out, lse, cu_seqlens, shape.scale * LOG2E, shape.window, v.stride(0), v.stride(1),
        GROUP=group, KV_HEADS=shape.kv_heads, WIDTH=shape.head_dim, BLOCK=block, KEYS=keys, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out.flatten(1), lse


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: PackedRows, shape: AttentionShape
) -> tuple[Tensor, Tensor]:
    """See reference_ops.attend_backward."""
    cu_seqlens, longest = rows.cu_seqlens, rows.longest
    if longest > MAX_LENGTH:
        unused = torch.empty(0, device=q.device)
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            d_out.view(q.shape), q, k, v.contiguous(), out.view(q.shape), lse, cu_seqlens, cu_seqlens, longest,
            longest, 0.0, _causal(rows, shape), torch.zeros(2, dtype=torch.uint64, device=q.device), unused,
            scale=shape.scale, **_window(rows, shape),
        )  # fmt: skip
        v.copy_(d_v)
        return d_q, d_k
    d_q, d_k, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(lse)
    group = shape.heads // shape.kv_heads
    sizes = dict(GROUP=group, KV_HEADS=shape.kv_heads, WIDTH=shape.head_dim)
    scale, strides = shape.scale * LOG2E, (v.stride(0), v.stride(1))
    block, keys, warps, stages = QUERIES
    block = max(block, 16 * group)
    grid = (len(cu_seqlens) - 1, triton.cdiv(longest, block // group), shape.kv_heads)
    attention_backward_queries[grid](
        q, k, v, out, d_out, lse, delta, d_q, cu_seqlens, scale, shape.scale, shape.window, *strides,
        **sizes, BLOCK=block, KEYS=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block, keys, warps, stages = KEYS
    block = max(block, 8 * group)
    grid = (len(cu_seqlens) - 1, triton.cdiv(longest, keys), shape.kv_heads)
    attention_backward_keys[grid](
        q, k, v, d_out, lse, delta, d_k, cu_seqlens, scale, shape.scale, shape.window, *strides,
        **sizes, BLOCK=block, KEYS=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return d_q, d_k


def _causal(rows: PackedRows, shape: AttentionShape) -> bool:
    """Whether attention is plainly causal, the window being off or longer than every row."""
    return not 0 < shape.window < rows.longest


def _window(rows: PackedRows, shape: AttentionShape) -> dict[str, int]:
    return {"window_size_left": -1 if _causal(rows, shape) else shape.window - 1, "window_size_right": 0}
