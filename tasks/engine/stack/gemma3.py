"""Gemma 3's layers written out, forward and backward, for training all of their weights in bfloat16 on one card.

    stack = Stack.of(model, grads)      # None where the model is another one; grads: each parameter's, float32
    stack.refresh()                     # at a step's start: the weights in bfloat16
    hidden = stack(batch, embedded)     # as tasks.engine.head.hidden_states; backward adds to `grads` in place

What is between two products is one kernel (tasks.engine.stack.kernels). Queries, keys and values are one product, gate
and up another, and a weight's gradient is summed in float32 by its product itself. A layer keeps its inputs to norms
and products where they are dear to make again; norms, the gate's product and every other sum of the residual stream
are made again. Of the last layer only the labelled positions go through the MLP. The same formulas in plain torch serve
the CPU (tests), where nothing is won.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3TextModel

from tasks.engine.batches import Batch
from tasks.engine.head import layers_of, unwrap
from tasks.engine.products import add_product
from tasks.engine.stack import plain
from tasks.engine.stack.shapes import Attention, Rows

ALIGNED = 64  # elements: where a parameter's gradient may begin, so that neighbours lie without a gap


@dataclass
class Layer:
    """A layer's weights: products in the dtype they are multiplied in, norms as they are; and all their gradients."""

    kind: Attention
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norms: dict[str, Tensor]
    grads: dict[str, Tensor]


class Stack:
    """The layers of one model. `weights` are the trained parameters in `dtype`, in one buffer."""

    def __init__(self, model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype, ops: ModuleType) -> None:
        self.body = cast(Any, unwrap(model).base_model)
        self.ops, self.dtype = ops, dtype
        self.eps = float(self.body.config.rms_norm_eps)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = dict[int, Tensor]()
        self.flat = torch.empty(sum(p.numel() for p in self.parameters), dtype=dtype, device=model.device)
        start = 0
        for p in self.parameters:
            self.weights[id(p)] = self.flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
        self.layers = [self._layer(layer, grads) for layer in layers_of(model)]
        self.last = (self.body.norm.weight, grads[id(self.body.norm.weight)])
        self.head = self.weights.get(id(cast(Any, unwrap(model)).get_output_embeddings().weight))
        self._tables: dict[int, dict[bool, tuple[Tensor, Tensor]]] = {}

    @staticmethod
    def of(model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype) -> "Stack | None":
        """The stack of a model that it is right for."""
        if not _fits(model, grads, dtype):
            return None
        ops: ModuleType = plain
        if model.device.type == "cuda":
            from tasks.engine.stack import kernels as ops  # noqa: PLC0415  # Triton is where CUDA is
        return Stack(model, grads, dtype, ops)

    def _layer(self, layer: Any, grads: dict[int, Tensor]) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        config = attention.config
        kind = Attention(
            config.num_attention_heads, config.num_key_value_heads, attention.head_dim, float(attention.scaling),
            self.eps, attention.sliding_window or 0, attention.is_sliding,
        )  # fmt: skip
        parts = {"qkv": [attention.q_proj, attention.k_proj, attention.v_proj], "out": [attention.o_proj],
                 "gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}  # fmt: skip
        found = {name: _joined([self.weights[id(m.weight)] for m in modules]) for name, modules in parts.items()}
        added = {name: _joined([grads[id(m.weight)] for m in modules]) for name, modules in parts.items()}
        norms = {
            "first": layer.input_layernorm, "q": attention.q_norm, "k": attention.k_norm,
            "after": layer.post_attention_layernorm, "second": layer.pre_feedforward_layernorm,
            "last": layer.post_feedforward_layernorm,
        }  # fmt: skip
        added |= {name: grads[id(module.weight)] for name, module in norms.items()}
        return Layer(kind, **found, norms={n: m.weight.detach() for n, m in norms.items()}, grads=added)

    def refresh(self) -> None:
        """The products' weights as they are now."""
        with torch.no_grad():
            torch._foreach_copy_(list(self.weights.values()), [p.detach() for p in self.parameters])

    def rows(self, batch: Batch) -> Rows:
        """The batch's rows; padded ones are rows of equal length."""
        ids, positions, borders = batch["input_ids"], batch["position_ids"], batch["cu_seqlens"]
        if positions is None or borders is None:
            count, length = ids.shape
            positions = torch.arange(length, device=ids.device).repeat(count)
            borders = torch.arange(0, ids.numel() + 1, length, device=ids.device, dtype=torch.int32)
        longest = batch["longest"]
        if longest not in self._tables:
            self._tables[longest] = self._angles(longest)
        return Rows(positions.flatten(), borders, longest, self._tables[longest])

    def _angles(self, longest: int) -> dict[bool, tuple[Tensor, Tensor]]:
        """Cosines and sines of positions below `longest` for local and global layers, in float32."""
        config, found = self.body.config, {}
        like = torch.zeros(1, dtype=torch.float32, device=self.flat.device)
        for layer_type in set(config.layer_types):
            both = self.body.rotary_emb(like, torch.arange(longest, device=like.device)[None], layer_type)
            found[layer_type == "sliding_attention"] = tuple(x[0, :, : x.shape[-1] // 2].contiguous() for x in both)
        return cast(dict[bool, tuple[Tensor, Tensor]], found)

    def __call__(self, batch: Batch, embedded: Tensor, fresh: bool = False) -> Tensor:
        """Final hidden states (N, H) at the batch's positions, of embedded tokens (..., H). With `fresh` the backward
        puts the layers' gradients in the place of what is there."""
        with torch.autocast(embedded.device.type, enabled=False):
            rows, x = self.rows(batch), embedded.flatten(0, -2).to(self.dtype)
            return cast(Tensor, cast(Any, _Layers).apply(x, self, rows, batch["positions"], fresh))


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Stack, rows: Rows, positions: Tensor, fresh: bool) -> Tensor:
        ops, eps, kept, start = stack.ops, stack.eps, list[Tensor](), x
        normed = ops.norm(x, stack.layers[0].norms["first"], eps)
        for number, layer in enumerate(stack.layers):
            last = number + 1 == len(stack.layers)
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
            following = stack.last[0].detach() if last else stack.layers[number + 1].norms["first"]
            x, normed = ops.add_norm(x, down, layer.norms["last"], following, eps)
        ctx.save_for_backward(start, *kept, positions)
        ctx.stack, ctx.rows, ctx.fresh = stack, rows, fresh
        return cast(Tensor, normed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        stack, rows, fresh = ctx.stack, ctx.rows, ctx.fresh
        ops, eps, kept = stack.ops, stack.eps, list(ctx.saved_tensors)
        positions = kept.pop()
        dx, dn, weight, into = None, grads[0].contiguous(), stack.last[0].detach(), stack.last[1]
        sums = _Sums(stack, dn)
        waiting: tuple[Tensor, Tensor] | None = None  # a product whose input is made again by the next kernel
        for number in range(len(stack.layers) - 1, -1, -1):
            layer = stack.layers[number]
            last, norms, added = number + 1 == len(stack.layers), layer.norms, layer.grads
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


class _Sums:
    """The shares of all norms' gradients as the kernels' programs leave them, summed together at the end."""

    def __init__(self, stack: Stack, like: Tensor) -> None:
        ops, kind, layers = stack.ops, stack.layers[0].kind, len(stack.layers)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.norms = like.new_empty((2 * layers + 1, 2, ops.PROGRAMS, like.shape[1]), dtype=dtype)
        heads = (layers, kind.heads + kind.kv_heads, ops.HEAD_PROGRAMS, kind.width)
        self.of_heads = like.new_empty(heads, dtype=dtype)
        self.into: list[tuple[Tensor, ...]] = []
        self.layers: list[Layer] = []

    def norm(self, *into: Tensor) -> Tensor:
        """Where a kernel leaves its shares of the gradients that go `into` one norm or two."""
        self.into.append(into)
        return self.norms[len(self.into) - 1]

    def heads(self, layer: Layer) -> Tensor:
        """The same for a layer's norms of queries and keys."""
        self.layers.append(layer)
        return self.of_heads[len(self.layers) - 1]

    def add(self, fresh: bool) -> None:
        """Adds all to where they go, or puts them there."""
        norms, heads = self.norms.sum(2).unbind(), self.of_heads.sum(2)
        pairs = [pair for into, found in zip(self.into, norms, strict=True) for pair in zip(into, found, strict=False)]
        asked = self.layers[0].kind.heads
        for name, part in (("q", heads[:, :asked].sum(1)), ("k", heads[:, asked:].sum(1))):
            pairs += [(layer.grads[name], found) for layer, found in zip(self.layers, part.unbind(), strict=True)]
        move = torch._foreach_copy_ if fresh else torch._foreach_add_
        move([total for total, _ in pairs], [found for _, found in pairs])


def _values(qkv: Tensor, kind: Attention) -> Tensor:
    """The values (T, G, D) in a product's (T, (A + 2G) D)."""
    return qkv.view(len(qkv), -1, kind.width)[:, kind.heads + kind.kv_heads :]


def _spread(grad: Tensor, positions: Tensor, length: int) -> Tensor:
    """The gradient of an index_select: (T, H), 0 where nothing was selected. Filled-up positions bring zeros."""
    return grad.new_zeros((length, grad.shape[1])).index_add_(0, positions, grad)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices that lie one behind the other as one; raises ValueError where they do not."""
    first, rows = parts[0], sum(len(part) for part in parts)
    at = first.data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.shape[1] != first.shape[1]:
            raise ValueError("the parts of a product do not lie one behind the other")
        at += part.numel() * part.element_size()
    return torch.as_strided(first, (rows, first.shape[1]), (first.shape[1], 1))


def _fits(model: PreTrainedModel, grads: dict[int, Tensor], dtype: torch.dtype) -> bool:
    """Whether these are Gemma 3's text layers as this file writes them, with all of their weights trained."""
    body = cast(Any, unwrap(model).base_model)
    if type(body) is not Gemma3TextModel or not all(type(layer) is Gemma3DecoderLayer for layer in body.layers):
        return False
    config = body.config
    whole = all(id(p) in grads for p in body.parameters())
    bare = not config.attention_bias and not config.attention_dropout and config.attn_logit_softcapping is None
    causal = not getattr(config, "use_bidirectional_attention", False)
    products = [m for layer in body.layers for part in (layer.self_attn, layer.mlp) for m in _products(part)]
    linear = all(type(m) is nn.Linear and m.weight.numel() % ALIGNED == 0 for m in products)
    powers = (config.head_dim, config.num_attention_heads // config.num_key_value_heads)
    sizes = model.device.type == "cpu" or (
        dtype == torch.bfloat16 and all(n & (n - 1) == 0 for n in powers) and 32 <= config.head_dim <= 256
    )
    return whole and bare and causal and linear and sizes and config.hidden_activation == "gelu_pytorch_tanh"


def _products(module: Any) -> list[Any]:
    return [child for name, child in module.named_children() if name.endswith("_proj")]
