# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped"
"""Attention over packed rows, forward and backward: Triton kernels for short rows, torch's flash kernel for long ones.

Chat rows are a hundred tokens or two, a few blocks of a row. Here a block holds the heads that share keys side by side
(`GROUP` of them for each token), so that keys and values are read once for all, and their gradients are summed over
the heads by the product itself. Online softmax and recomputation as in FlashAttention-2 (arXiv 2307.08691).
"""

import torch
import triton
from torch import Tensor

from tasks.engine.speed.gemma3.attention_shapes import Attention, Rows
from tasks.engine.speed.gemma3.kernels.attention_backward import attention_backward_keys, attention_backward_queries
from tasks.engine.speed.gemma3.kernels.attention_forward import attention_forward

LOG2E = 1.4426950408889634
SHORT = 512  # tokens: longer rows go to torch's kernel
# (queries times heads, keys, warps, stages) of a block
FORWARD, QUERIES, KEYS = (64, 32, 4, 2), (64, 16, 4, 3), (32, 64, 8, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, kind: Attention) -> tuple[Tensor, Tensor]:
    """See plain.attend; known besides are the scores' log-sum-exps."""
    borders, longest = rows.cu_seqlens, rows.longest
    if longest > SHORT:
        out, known, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v.contiguous(), borders, borders, longest, longest, 0.0, _causal(rows, kind),
            False, scale=kind.scale, **_window(rows, kind),
        )  # fmt: skip
        return out.flatten(1), known
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group, (block, keys, warps, stages) = kind.heads // kind.kv_heads, FORWARD
    block = max(block, 16 * group)
    grid = (len(borders) - 1, triton.cdiv(longest, block // group), kind.kv_heads)
    attention_forward[grid](
        q, k, v, out, lse, borders, kind.scale * LOG2E, kind.window, v.stride(0), v.stride(1),
        GROUP=group, KV_HEADS=kind.kv_heads, WIDTH=kind.head_dim, BLOCK=block, KEYS=keys, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out.flatten(1), lse


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, known: Tensor, rows: Rows, kind: Attention
) -> tuple[Tensor, Tensor]:
    """See plain.attend_backward."""
    borders, longest = rows.cu_seqlens, rows.longest
    if longest > SHORT:
        nothing = torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do.view(q.shape), q, k, v.contiguous(), out.view(q.shape), known, borders, borders, longest,
            longest, 0.0, _causal(rows, kind), torch.zeros(2, dtype=torch.uint64, device=q.device), nothing,
            scale=kind.scale, **_window(rows, kind),
        )  # fmt: skip
        v.copy_(dv)
        return dq, dk
    dq, dk, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(known)
    group = kind.heads // kind.kv_heads
    same = dict(GROUP=group, KV_HEADS=kind.kv_heads, WIDTH=kind.head_dim)
    scale, strides = kind.scale * LOG2E, (v.stride(0), v.stride(1))
    block, keys, warps, stages = QUERIES
    block = max(block, 16 * group)
    grid = (len(borders) - 1, triton.cdiv(longest, block // group), kind.kv_heads)
    attention_backward_queries[grid](
        q, k, v, out, do, known, delta, dq, borders, scale, kind.scale, kind.window, *strides,
        **same, BLOCK=block, KEYS=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block, keys, warps, stages = KEYS
    block = max(block, 8 * group)
    grid = (len(borders) - 1, triton.cdiv(longest, keys), kind.kv_heads)
    attention_backward_keys[grid](
        q, k, v, do, known, delta, dk, borders, scale, kind.scale, kind.window, *strides,
        **same, BLOCK=block, KEYS=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk


def _causal(rows: Rows, kind: Attention) -> bool:
    """What torch's kernel is told where there is no window."""
    return not 0 < kind.window < rows.longest


def _window(rows: Rows, kind: Attention) -> dict[str, int]:
    return {"window_size_left": -1 if _causal(rows, kind) else kind.window - 1, "window_size_right": 0}
