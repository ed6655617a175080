"""Gemma 3's hand-written layers against transformers' own under autograd, and the kernels against the formulas."""

import copy

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.data.collator import collate
from tasks.engine.data.sequence_packing import Packing, collate_packed
from tasks.engine.memory.activations import activations
from tasks.engine.memory.model_sizes import count_sizes
from tasks.engine.memory.workload import workload_of
from tasks.engine.models.lm_head import hidden_states
from tasks.engine.speed.gemma3 import Gemma3Decoder, reference_ops
from tasks.engine.speed.gemma3.attention_shapes import AttentionShape, PackedRows
from tasks.engine.speed.packing_support import enable_packing

LENGTHS = [5, 23, 9, 31, 14]


def gemma3(**settings) -> Gemma3ForCausalLM:
    sizes = dict(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=64, num_hidden_layers=3, sliding_window=8, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(sizes | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
    return model


def rows() -> list[tuple[int, Example]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 99, (n,), generator=generator).tolist() for n in LENGTHS]
    return [
        (row, Example(token_ids, [IGNORE] * (len(token_ids) // 2) + token_ids[len(token_ids) // 2 :]))
        for row, token_ids in enumerate(ids)
    ]


def gradients(model, dtype=torch.float32) -> dict[int, torch.Tensor]:
    flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=dtype, device=model.device)
    parts = flat.split([p.numel() for p in model.parameters()])
    return {id(p): part.view(p.shape) for p, part in zip(model.parameters(), parts, strict=True)}


@pytest.mark.parametrize("packed", [True, False])
def test_hidden_states_and_every_gradient_are_autograds(packed):
    """Local and global layers, grouped heads, rows shorter and longer than the window; filler rows behind them."""
    model = gemma3()
    enable_packing(model, torch.float32)
    batch = collate_packed(rows(), Packing([list(range(5))], (96,), 7, 31)) if packed else collate(rows())
    reference = copy.deepcopy(model)
    expected = hidden_states(reference, batch)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * probe).sum().backward()
    grads = gradients(model)
    decoder = Gemma3Decoder.of(model, grads, torch.float32)
    decoder.refresh()
    embedded = model.model.embed_tokens(batch["input_ids"])
    hidden = decoder(batch, embedded)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    (hidden * probe).sum().backward()
    for (name, parameter), reference_parameter in zip(model.named_parameters(), reference.parameters(), strict=True):
        grad = (
            parameter.grad if parameter.grad is not None else grads[id(parameter)]
        )  # the embedding's comes by autograd
        error = (grad - reference_parameter.grad).norm() / reference_parameter.grad.norm()
        assert error < 2e-5, (name, float(error))


def test_padded_positions_add_no_gradient():
    model = gemma3()
    enable_packing(model, torch.float32)
    batch = collate_packed(rows(), Packing([list(range(5))], (), 5, 31))
    gradients_by_padding = []
    for padding in (0, 6):
        grads = gradients(model)
        decoder = Gemma3Decoder.of(model, grads, torch.float32)
        decoder.refresh()
        padded = {**batch, "positions": torch.cat([batch["positions"], torch.zeros(padding, dtype=torch.long)])}
        hidden = decoder(padded, model.model.embed_tokens(batch["input_ids"]))
        hidden[: len(batch["positions"])].square().sum().backward()
        gradients_by_padding.append(torch.cat([grad.flatten() for grad in grads.values()]))
    torch.testing.assert_close(gradients_by_padding[1], gradients_by_padding[0])


def test_saved_activations_are_those_of_the_memory_plan():
    model, bytes_by_address = gemma3(), {}
    decoder = Gemma3Decoder.of(model, gradients(model), torch.bfloat16)
    batch = collate(rows())
    tokens = batch["input_ids"].numel()
    batch["positions"] = torch.arange(tokens)  # the last layer's MLP works on the labelled alone, which is not counted

    def record(tensor: torch.Tensor) -> torch.Tensor:
        bytes_by_address[tensor.data_ptr()] = tensor.nbytes if tensor.is_floating_point() else 0
        return tensor

    embedded = model.model.embed_tokens(batch["input_ids"]).detach().bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        decoder(batch, embedded)
    config = TrainingConfig(precision="bfloat16")
    counted, _ = activations(count_sizes(model.config, config, "full"), workload_of(config, "full", tokens), 2)
    assert sum(bytes_by_address.values()) == counted + embedded.nbytes


def test_other_models_keep_their_layers():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4,
                                         num_hidden_layers=1))  # fmt: skip
    assert Gemma3Decoder.of(llama, gradients(llama), torch.float32) is None
    model = gemma3()
    part = {key: grad for key, grad in gradients(model).items() if key != id(model.model.layers[0].mlp.up_proj.weight)}
    assert Gemma3Decoder.of(model, part, torch.float32) is None
    capped = gemma3(attn_logit_softcapping=30.0)
    assert Gemma3Decoder.of(capped, gradients(capped), torch.float32) is None


def operations(device, dtype):
    """Each operation's name and fresh arguments: some operations work in place."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, heads, kv_heads, dim = 77, 40, 4, 2, 32
    borders = [0, 5, 39, 40, 60, 77, 77]
    positions = torch.cat([torch.arange(b - a) for a, b in zip(borders, borders[1:], strict=False)])
    angles = torch.rand(34, dim // 2, generator=generator) * 6
    tables = dict.fromkeys((True, False), (angles.cos().to(device), angles.sin().to(device)))
    packed = PackedRows(positions.to(device), torch.tensor(borders, dtype=torch.int32, device=device), 34, tables)

    def randn(*sizes, dtype=dtype):
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    x, added, dn, dx = (randn(tokens, width) for _ in range(4))
    gain, weight = randn(width, dtype=torch.float32), randn(width, dtype=torch.float32)
    yield "norm", (x, weight, 1e-6)
    yield "add_norm", (x, added, gain, weight, 1e-6)
    yield "add_norm_backward", (dx.clone(), dn, x, added, gain, weight, 1e-6, False)
    yield "add_norm_backward", (None, dn, x, added, gain, weight, 1e-6, True)
    yield "add_norm_backward", (dx.clone(), dn, x, None, None, weight, 1e-6, False)
    gate_up, dh = randn(tokens, 2 * width), randn(tokens, width)
    yield "gated_gelu", (gate_up,)
    yield "gated_gelu_backward", (gate_up, dh)
    for window in (0, 9):
        shape = AttentionShape(heads, kv_heads, dim, dim**-0.5, 1e-6, window, True)
        qkv = randn(tokens, (heads + 2 * kv_heads) * dim)
        q_weight, k_weight = randn(dim, dtype=torch.float32), randn(dim, dtype=torch.float32)
        yield "norm_rotate", (qkv, q_weight, k_weight, packed, shape)
        q, k = randn(tokens, heads, dim), randn(tokens, kv_heads, dim)
        v = qkv.view(tokens, -1, dim)[:, heads + kv_heads :]
        yield "attend", (q, k, v, packed, shape)
        yield "attend_backward", (randn(tokens, heads * dim), q, k, v, packed, shape)
        yield "norm_rotate_backward", (randn(tokens, heads, dim), randn(tokens, kv_heads, dim), qkv, q_weight, k_weight,
                                  packed, shape)  # fmt: skip


def run(ops, name, arguments) -> list[torch.Tensor]:
    """All results of an operation, arguments that it changes included."""
    inputs = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    if name in ("add_norm_backward", "norm_rotate_backward"):
        x = inputs[2]
        exact = torch.promote_types(x.dtype, torch.float32)
        if name == "norm_rotate_backward":
            partials = x.new_zeros((6, ops.HEAD_PROGRAMS, 32), dtype=exact)
            ops.norm_rotate_backward(*inputs, partials)
            return [x, partials.sum(1)]
        partials = x.new_zeros((2, ops.PROGRAMS, x.shape[1]), dtype=exact)
        results = ops.add_norm_backward(*inputs[:-1], partials, inputs[-1])
        return [*(part for part in results if part is not None), partials[: 2 if results[1] is not None else 1].sum(1)]
    if name == "attend_backward":  # its forward first
        d_out, q, k, v, packed, shape = inputs
        out, lse = ops.attend(q, k, v, packed, shape)
        return [*ops.attend_backward(d_out, q, k, v, out, lse, packed, shape), v]
    results = getattr(ops, name)(*inputs)
    results = [results] if isinstance(results, torch.Tensor) else [part for part in results if part is not None]
    return results[:1] if name == "attend" else results


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_are_the_formulas():
    from tasks.engine.speed.gemma3 import kernels

    for name, arguments in operations("cuda", torch.bfloat16):
        exact = [a.double() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in arguments]
        for result, expected in zip(run(kernels, name, arguments), run(reference_ops, name, exact), strict=True):
            error = float((result.double() - expected).norm() / expected.norm())
            assert error < 1e-2, f"{name}: {error}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adamw_is_torchs_and_leaves_the_copies():
    from tasks.engine.speed.gemma3.fused_adamw import AdamW

    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(64, 1000), (7,), (4096,)]
    parameters = [torch.randn(s, generator=generator, device="cuda").requires_grad_() for s in sizes]
    references = [p.detach().clone().requires_grad_() for p in parameters]
    copies = {id(p): torch.zeros_like(p, dtype=torch.bfloat16) for p in parameters}
    factor, steps = torch.full((), 0.25, device="cuda"), []
    groups = [[{"params": group[:2], "weight_decay": 0.1}, {"params": group[2:]}] for group in (parameters, references)]
    adamw = AdamW(groups[0], 1e-2, copies, factor, lambda: steps.append(1))
    reference = torch.optim.AdamW(groups[1], lr=1e-2, weight_decay=0, fused=True)
    for number in range(6):
        for p, q in zip(parameters, references, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            q.grad = p.grad * factor
        found_inf = torch.tensor(float(number == 3), device="cuda")
        adamw.found_inf = reference.found_inf = found_inf
        adamw.step()
        reference.step()
    for p, q in zip(parameters, references, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert torch.equal(copies[id(p)], p.detach().bfloat16())
        assert float(adamw.state[p]["step"]) == float(reference.state[q]["step"]) == 5
    assert len(steps) == 6
