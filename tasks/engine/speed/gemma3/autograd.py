"""Forward and backward of all decoder layers as one autograd function, with recomputation of what is cheap.

A layer computes, with norm(x; w) = x / sqrt(mean(x^2) + eps) * (1 + w):

    [q | k | v] = norm(x; pre_attention) W_qkv'          attended = attention(rope(norm(q)), rope(norm(k)), v) W_out'
    mid  = x + norm(attended; post_attention)            [gate | up] = norm(mid; pre_mlp) W_gate_up'
    down = (gelu(gate) * up) W_down'                     x_next = mid + norm(down; post_mlp)

A product y = n W' has the gradients d_n = d_y W and d_W += d_y' n, the latter summed in float32 by the product itself
(tasks.engine.losses.gradient_accumulation). Saved are qkv, attention's output and log-sum-exps, attended, mid, gate_up
and down; the backward recomputes norms, q and k, gelu(gate) * up and x_next. The last layer's output projection and MLP
see the labelled positions alone.

Shapes: T tokens, N labelled positions, H hidden, A heads, G key/value heads, D head dimension.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.gemma3.attention_shapes import AttentionShape, PackedRows
from tasks.engine.speed.gemma3.layer_weights import DecoderWeights
from tasks.engine.speed.gemma3.norm_gradients import NormGradients


def decode(x: Tensor, decoder: DecoderWeights, rows: PackedRows, positions: Tensor, overwrite: bool) -> Tensor:
    """Final hidden states (N, H) at `positions` (N,) of embedded tokens (T, H).

    The backward adds to the gradients in `decoder`, or with `overwrite` replaces them.
    """
    return cast(Tensor, cast(Any, _DecoderFunction).apply(x, decoder, rows, positions, overwrite))


class _DecoderFunction(torch.autograd.Function):
    """See `decode`; the weights' gradients go past autograd into their buffers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, decoder: DecoderWeights, rows: PackedRows, positions: Tensor, overwrite: bool
    ) -> Tensor:
        ops, eps, saved, embedded = decoder.ops, decoder.eps, list[Tensor](), x
        normed = ops.norm(x, decoder.layers[0].norms["pre_attention"], eps)
        for number, layer in enumerate(decoder.layers):
            last = number + 1 == len(decoder.layers)
            qkv = normed @ layer.qkv.T
            q, k = ops.norm_rotate(qkv, layer.norms["q"], layer.norms["k"], rows, layer.attention)
            out, lse = ops.attend(q, k, _values(qkv, layer.attention), rows, layer.attention)
            saved += [qkv, out, lse]
            del q, k
            if last:  # only labelled positions are read from here on
                x, out = x.index_select(0, positions), out.index_select(0, positions)
            attended = out @ layer.out.T
            x, normed = ops.add_norm(x, attended, layer.norms["post_attention"], layer.norms["pre_mlp"], eps)
            gate_up = normed @ layer.gate_up.T
            down = ops.gated_gelu(gate_up) @ layer.down.T
            saved += [attended, x, gate_up, down]
            next_norm = decoder.norm if last else decoder.layers[number + 1].norms["pre_attention"]
            x, normed = ops.add_norm(x, down, layer.norms["post_mlp"], next_norm, eps)
        ctx.save_for_backward(embedded, *saved, positions)
        ctx.decoder, ctx.rows, ctx.overwrite = decoder, rows, overwrite
        return cast(Tensor, normed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        decoder, rows, overwrite = ctx.decoder, ctx.rows, ctx.overwrite
        ops, eps, saved = decoder.ops, decoder.eps, list(ctx.saved_tensors)
        positions = saved.pop()
        d_x, d_normed, next_norm, next_grad = None, grads[0].contiguous(), decoder.norm, decoder.norm_grad
        norm_grads = NormGradients(decoder, d_normed)
        pending: tuple[Tensor, Tensor] | None = None  # qkv's weight gradient, whose input the next kernel recomputes
        for number in range(len(decoder.layers) - 1, -1, -1):
            layer = decoder.layers[number]
            last, norms, layer_grads = number + 1 == len(decoder.layers), layer.norms, layer.grads
            qkv, out, lse, attended, mid, gate_up, down = saved[-7:]
            del saved[-7:]
            partials = norm_grads.norm(next_grad, layer_grads["post_mlp"])
            d_x, d_down, normed = ops.add_norm_backward(
                d_x, d_normed, mid, down, norms["post_mlp"], next_norm, eps, partials, True
            )
            if pending:
                add_product(*pending, normed, overwrite=overwrite)
            gate_up, hidden = ops.gated_gelu_backward(gate_up, d_down @ layer.down)
            add_product(layer_grads["down"], d_down.T, hidden, overwrite=overwrite)
            del hidden, d_down, normed
            d_normed = gate_up @ layer.gate_up
            partials = norm_grads.norm(layer_grads["pre_mlp"], layer_grads["post_attention"])
            d_x, d_attended, normed = ops.add_norm_backward(
                d_x, d_normed, mid, attended, norms["post_attention"], norms["pre_mlp"], eps, partials, False
            )
            add_product(layer_grads["gate_up"], gate_up.T, normed, overwrite=overwrite)
            del gate_up, normed
            d_out = d_attended @ layer.out
            if last:
                add_product(layer_grads["out"], d_attended.T, out.index_select(0, positions), overwrite=overwrite)
                d_x, d_out = (_scatter_rows(grad, positions, len(out)) for grad in (d_x, d_out))
            else:
                add_product(layer_grads["out"], d_attended.T, out, overwrite=overwrite)
            q, k = ops.norm_rotate(qkv, norms["q"], norms["k"], rows, layer.attention)
            d_q, d_k = ops.attend_backward(d_out, q, k, _values(qkv, layer.attention), out, lse, rows, layer.attention)
            del q, k, d_out, out
            ops.norm_rotate_backward(
                d_q, d_k, qkv, norms["q"], norms["k"], rows, layer.attention, norm_grads.heads(layer)
            )
            d_normed = qkv @ layer.qkv  # qkv now holds its own gradient
            pending = layer_grads["qkv"], qkv.T
            next_norm, next_grad = norms["pre_attention"], layer_grads["pre_attention"]
        d_x, _, normed = ops.add_norm_backward(
            d_x, d_normed, saved[0], None, None, next_norm, eps, norm_grads.norm(next_grad), False
        )
        assert pending is not None
        add_product(*pending, normed, overwrite=overwrite)
        norm_grads.add(overwrite)
        return d_x, None, None, None, None


def _values(qkv: Tensor, shape: AttentionShape) -> Tensor:
    """View of the values (T, G, D) in qkv (T, (A + 2G) D)."""
    return qkv.view(len(qkv), -1, shape.head_dim)[:, shape.heads + shape.kv_heads :]


def _scatter_rows(grad: Tensor, positions: Tensor, length: int) -> Tensor:
    """Gradient of index_select: (N, H) -> (length, H). Padded labels' positions, which repeat, add zeros."""
    return grad.new_zeros((length, grad.shape[1])).index_add_(0, positions, grad)
