"""Forward and backward of all layers as one operation of autograd.

Shapes: T tokens, H hidden, N positions. A layer keeps its inputs to norms and products where they are dear to make
again; norms, the gate's product and every other sum of the residual stream are made again. A weight's gradient is
summed in float32 by its product itself. Of the last layer only the labelled positions go through the MLP.
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.losses.gradient_accumulation import add_product
from tasks.engine.speed.gemma3.attention_shapes import Attention, Rows
from tasks.engine.speed.gemma3.layer_weights import Decoder
from tasks.engine.speed.gemma3.norm_gradients import NormGradients


def decode(x: Tensor, decoder: Decoder, rows: Rows, positions: Tensor, fresh: bool) -> Tensor:
    """Final hidden states (N, H) at `positions` (N,) of embedded tokens (T, H). Backward adds the weights' gradients
    to the layers' own, or with `fresh` puts them there."""
    return cast(Tensor, cast(Any, _Layers).apply(x, decoder, rows, positions, fresh))


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, decoder: Decoder, rows: Rows, positions: Tensor, fresh: bool) -> Tensor:
        ops, eps, kept, start = decoder.ops, decoder.eps, list[Tensor](), x
        normed = ops.norm(x, decoder.layers[0].norms["first"], eps)
        for number, layer in enumerate(decoder.layers):
            last = number + 1 == len(decoder.layers)
            qkv = normed @ layer.qkv.T
            q, k = ops.rotate(qkv, layer.norms["q"], layer.norms["k"], rows, layer.kind)
            out, known = ops.attend(q, k, _values(qkv, layer.kind), rows, layer.kind)
            kept += [qkv, out, known]
            del q, k
            if last:  # what no label sees ends here
                x, out = x.index_select(0, positions), out.index_select(0, positions)
            attended = out @ layer.out.T
            x, normed = ops.add_norm(x, attended, layer.norms["after"], layer.norms["second"], eps)
            gate_up = normed @ layer.gate_up.T
            down = ops.gated(gate_up) @ layer.down.T
            kept += [attended, x, gate_up, down]
            following = decoder.norm if last else decoder.layers[number + 1].norms["first"]
            x, normed = ops.add_norm(x, down, layer.norms["last"], following, eps)
        ctx.save_for_backward(start, *kept, positions)
        ctx.decoder, ctx.rows, ctx.fresh = decoder, rows, fresh
        return cast(Tensor, normed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        decoder, rows, fresh = ctx.decoder, ctx.rows, ctx.fresh
        ops, eps, kept = decoder.ops, decoder.eps, list(ctx.saved_tensors)
        positions = kept.pop()
        dx, dn, weight, into = None, grads[0].contiguous(), decoder.norm, decoder.norm_grad
        sums = NormGradients(decoder, dn)
        waiting: tuple[Tensor, Tensor] | None = None  # a product whose input is made again by the next kernel
        for number in range(len(decoder.layers) - 1, -1, -1):
            layer = decoder.layers[number]
            last, norms, added = number + 1 == len(decoder.layers), layer.norms, layer.grads
            qkv, out, known, attended, middle, gate_up, down = kept[-7:]
            del kept[-7:]
            share = sums.norm(into, added["last"])
            dx, ddown, normed = ops.add_norm_backward(dx, dn, middle, down, norms["last"], weight, eps, share, True)
            if waiting:
                add_product(*waiting, normed, fresh=fresh)
            gate_up, gated = ops.gated_backward(gate_up, ddown @ layer.down)
            add_product(added["down"], ddown.T, gated, fresh=fresh)
            del gated, ddown, normed
            dn = gate_up @ layer.gate_up
            share = sums.norm(added["second"], added["after"])
            dx, dattended, normed = ops.add_norm_backward(
                dx, dn, middle, attended, norms["after"], norms["second"], eps, share, False
            )
            add_product(added["gate_up"], gate_up.T, normed, fresh=fresh)
            del gate_up, normed
            do = dattended @ layer.out
            if last:
                add_product(added["out"], dattended.T, out.index_select(0, positions), fresh=fresh)
                dx, do = (_spread(part, positions, len(out)) for part in (dx, do))
            else:
                add_product(added["out"], dattended.T, out, fresh=fresh)
            q, k = ops.rotate(qkv, norms["q"], norms["k"], rows, layer.kind)
            dq, dk = ops.attend_backward(do, q, k, _values(qkv, layer.kind), out, known, rows, layer.kind)
            del q, k, do, out
            ops.rotate_backward(dq, dk, qkv, norms["q"], norms["k"], rows, layer.kind, sums.heads(layer))
            dn = qkv @ layer.qkv
            waiting = added["qkv"], qkv.T
            weight, into = norms["first"], added["first"]
        dx, _, normed = ops.add_norm_backward(dx, dn, kept[0], None, None, weight, eps, sums.norm(into), False)
        assert waiting is not None
        add_product(*waiting, normed, fresh=fresh)
        sums.add(fresh)
        return dx, None, None, None, None


def _values(qkv: Tensor, kind: Attention) -> Tensor:
    """The values (T, G, D) in a product's (T, (A + 2G) D)."""
    return qkv.view(len(qkv), -1, kind.head_dim)[:, kind.heads + kind.kv_heads :]


def _spread(grad: Tensor, positions: Tensor, length: int) -> Tensor:
    """The gradient of an index_select: (T, H), 0 where nothing was selected. Filled-up positions bring zeros."""
    return grad.new_zeros((length, grad.shape[1])).index_add_(0, positions, grad)
