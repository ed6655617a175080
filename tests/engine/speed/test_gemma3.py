"""Gemma 3's layers as written out here against transformers' own under autograd; the kernels against the formulas."""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.data.collator import collate
from tasks.engine.data.sequence_packing import Packing, pack
from tasks.engine.memory.activations import activations
from tasks.engine.memory.model_sizes import count
from tasks.engine.memory.workload import load_of
from tasks.engine.models.lm_head import hidden_states
from tasks.engine.speed.gemma3 import Stack, reference_ops
from tasks.engine.speed.gemma3.attention_shapes import Attention, Rows
from tasks.engine.speed.packing_support import make_packable

LENGTHS = [5, 23, 9, 31, 14]


def gemma3(**other) -> Gemma3ForCausalLM:
    sizes = dict(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, num_hidden_layers=3, sliding_window=8, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(sizes | other)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
    return model


def rows() -> list[tuple[int, Example]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 99, (n,), generator=generator).tolist() for n in LENGTHS]
    return [(row, Example(own, [IGNORE] * (len(own) // 2) + own[len(own) // 2 :])) for row, own in enumerate(ids)]


def gradients(model, dtype=torch.float32) -> dict[int, torch.Tensor]:
    flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=dtype, device=model.device)
    parts = flat.split([p.numel() for p in model.parameters()])
    return {id(p): part.view(p.shape) for p, part in zip(model.parameters(), parts, strict=True)}


@pytest.mark.parametrize("packed", [True, False])
def test_hidden_states_and_every_gradient_are_autograds(packed):
    """Local and global layers, grouped heads, rows shorter and longer than the window; filler rows behind them."""
    model = gemma3()
    make_packable(model, torch.float32)
    batch = pack(rows(), Packing([list(range(5))], (96,), 7, 31)) if packed else collate(rows())
    other = copy.deepcopy(model)
    want = hidden_states(other, batch)
    probe = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (want * probe).sum().backward()
    grads = gradients(model)
    stack = Stack.of(model, grads, torch.float32)
    stack.refresh()
    embedded = model.model.embed_tokens(batch["input_ids"])
    got = stack(batch, embedded)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (got * probe).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        added = ours.grad if ours.grad is not None else grads[id(ours)]  # the embedding's comes by autograd
        error = (added - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-5, (name, float(error))


def test_positions_that_were_filled_up_bring_nothing():
    model = gemma3()
    make_packable(model, torch.float32)
    batch = pack(rows(), Packing([list(range(5))], (), 5, 31))
    found = []
    for more in (0, 6):
        grads = gradients(model)
        stack = Stack.of(model, grads, torch.float32)
        stack.refresh()
        longer = {**batch, "positions": torch.cat([batch["positions"], torch.zeros(more, dtype=torch.long)])}
        hidden = stack(longer, model.model.embed_tokens(batch["input_ids"]))
        hidden[: len(batch["positions"])].square().sum().backward()
        found.append(torch.cat([grad.flatten() for grad in grads.values()]))
    torch.testing.assert_close(found[1], found[0])


def test_the_layers_keep_for_their_backward_what_the_memory_plan_counts():
    model, kept = gemma3(), {}
    stack = Stack.of(model, gradients(model), torch.bfloat16)
    batch = collate(rows())
    tokens = batch["input_ids"].numel()
    batch["positions"] = torch.arange(tokens)  # the last layer's MLP works on the labelled alone, which is not counted

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes if tensor.is_floating_point() else 0
        return tensor

    embedded = model.model.embed_tokens(batch["input_ids"]).detach().bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stack(batch, embedded)
    config = TrainingConfig(precision="bfloat16")
    counted, _ = activations(count(model.config, config, "full"), load_of(config, "full", tokens), 2)
    assert sum(kept.values()) == counted + embedded.nbytes


def test_other_models_keep_their_layers():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                                         num_hidden_layers=1))  # fmt: skip
    assert Stack.of(llama, gradients(llama), torch.float32) is None
    model = gemma3()
    part = {key: grad for key, grad in gradients(model).items() if key != id(model.model.layers[0].mlp.up_proj.weight)}
    assert Stack.of(model, part, torch.float32) is None
    capped = gemma3(attn_logit_softcapping=30.0)
    assert Stack.of(capped, gradients(capped), torch.float32) is None


def operations(device, dtype):
    """Each operation's name and arguments, made anew at every call: some work in place."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, heads, kv_heads, dim = 77, 40, 4, 2, 32
    borders = [0, 5, 39, 40, 60, 77, 77]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(borders, borders[1:], strict=False)])
    angles = torch.rand(34, dim // 2, generator=generator) * 6
    tables = dict.fromkeys((True, False), (angles.cos().to(device), angles.sin().to(device)))
    packed = Rows(positions.to(device), torch.tensor(borders, dtype=torch.int32, device=device), 34, tables)

    def randn(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator).to(device, kind)

    x, added, dn, dx = (randn(tokens, width) for _ in range(4))
    gain, weight = randn(width, kind=torch.float32), randn(width, kind=torch.float32)
    yield "norm", (x, weight, 1e-6)
    yield "add_norm", (x, added, gain, weight, 1e-6)
    yield "add_norm_backward", (dx.clone(), dn, x, added, gain, weight, 1e-6, False)
    yield "add_norm_backward", (None, dn, x, added, gain, weight, 1e-6, True)
    yield "add_norm_backward", (dx.clone(), dn, x, None, None, weight, 1e-6, False)
    gate_up, dh = randn(tokens, 2 * width), randn(tokens, width)
    yield "gated", (gate_up,)
    yield "gated_backward", (gate_up, dh)
    for window in (0, 9):
        kind = Attention(heads, kv_heads, dim, dim**-0.5, 1e-6, window, True)
        qkv = randn(tokens, (heads + 2 * kv_heads) * dim)
        q_weight, k_weight = randn(dim, kind=torch.float32), randn(dim, kind=torch.float32)
        yield "rotate", (qkv, q_weight, k_weight, packed, kind)
        q, k = randn(tokens, heads, dim), randn(tokens, kv_heads, dim)
        v = qkv.view(tokens, -1, dim)[:, heads + kv_heads :]
        yield "attend", (q, k, v, packed, kind)
        yield "attend_backward", (randn(tokens, heads * dim), q, k, v, packed, kind)
        yield "rotate_backward", (randn(tokens, heads, dim), randn(tokens, kv_heads, dim), qkv, q_weight, k_weight,
                                  packed, kind)  # fmt: skip


def run(ops, name, arguments) -> list[torch.Tensor]:
    """Everything that an operation gives or changes."""
    held = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    if name in ("add_norm_backward", "rotate_backward"):
        first = held[2]
        exact = torch.promote_types(first.dtype, torch.float32)
        if name == "rotate_backward":
            shares = first.new_zeros((6, ops.HEAD_PROGRAMS, 32), dtype=exact)
            ops.rotate_backward(*held, shares)
            return [first, shares.sum(1)]
        shares = first.new_zeros((2, ops.PROGRAMS, first.shape[1]), dtype=exact)
        got = ops.add_norm_backward(*held[:-1], shares, held[-1])
        return [*(part for part in got if part is not None), shares[: 2 if got[1] is not None else 1].sum(1)]
    if name == "attend_backward":  # its forward first
        do, q, k, v, packed, kind = held
        out, known = ops.attend(q, k, v, packed, kind)
        return [*ops.attend_backward(do, q, k, v, out, known, packed, kind), v]
    got = getattr(ops, name)(*held)
    got = [got] if isinstance(got, torch.Tensor) else [part for part in got if part is not None]
    return got[:1] if name == "attend" else got


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_are_the_formulas():
    from tasks.engine.speed.gemma3 import kernels

    for name, arguments in operations("cuda", torch.bfloat16):
        exact = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in arguments]
        for got, want in zip(run(kernels, name, arguments), run(reference_ops, name, exact), strict=True):
            error = float((got.double() - want).norm() / want.norm())
            assert error < 1e-2, f"{name}: {error}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adamw_is_torchs_and_leaves_the_copies():
    from tasks.engine.speed.gemma3.fused_adamw import AdamW

    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(64, 1000), (7,), (4096,)]
    ours = [torch.randn(s, generator=generator, device="cuda").requires_grad_() for s in sizes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    copies = {id(p): torch.zeros_like(p, dtype=torch.bfloat16) for p in ours}
    factor, steps = torch.full((), 0.25, device="cuda"), []
    groups = [[{"params": some[:2], "weight_decay": 0.1}, {"params": some[2:]}] for some in (ours, theirs)]
    adamw = AdamW(groups[0], 1e-2, copies, factor, lambda: steps.append(1))
    torchs = torch.optim.AdamW(groups[1], lr=1e-2, weight_decay=0, fused=True)
    for number in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            q.grad = p.grad * factor
        broken = torch.tensor(float(number == 3), device="cuda")
        adamw.found_inf = torchs.found_inf = broken
        adamw.step()
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert torch.equal(copies[id(p)], p.detach().bfloat16())
        assert float(adamw.state[p]["step"]) == float(torchs.state[q]["step"]) == 5
    assert len(steps) == 6
