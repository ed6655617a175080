import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tasks.engine.data.chat_template import IGNORE, Example
from tasks.engine.data.collator import collate
from tasks.engine.data.sampler import row_order
from tasks.engine.data.sequence_packing import collate_packed, pack_first_fit, pack_steps
from tasks.engine.models.lm_head import hidden_states
from tasks.engine.speed.packed_attention import use_packed_attention
from tasks.engine.speed.packing_support import enable_packing

SMALL = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
GLOBAL_AND_LOCAL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
MODELS = {
    "gemma3": (
        Gemma3ForCausalLM,
        lambda: Gemma3TextConfig(
            **SMALL, num_hidden_layers=2, sliding_window=8, layer_types=GLOBAL_AND_LOCAL[:2], query_pre_attn_scalar=8
        ),
    ),
    "gemma3n": (
        Gemma3nForCausalLM,
        lambda: Gemma3nTextConfig(
            **SMALL, num_hidden_layers=4, sliding_window=8, layer_types=GLOBAL_AND_LOCAL, num_kv_shared_layers=2,
            hidden_size_per_layer_input=4, vocab_size_per_layer_input=99, laurel_rank=2, altup_num_inputs=2,
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        ),
    ),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SMALL, num_hidden_layers=2)),
    "qwen3": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(
            **SMALL, num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
    ),
}  # fmt: skip
LENGTHS = [5, 23, 9, 2, 14, 31, 7]


def example(length: int, seed: int) -> Example:
    ids = torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Example(ids, [IGNORE] * (length // 3) + ids[length // 3 :])


def tiny(name: str):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config()).double().train()
    for parameter in model.parameters():  # norms begin as the identity, a head of some families as zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        hidden = hidden_states(model, batch)
        logits = model.get_output_embeddings()(hidden)
        total += torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shapes", [0, 1], ids=["as long as its rows", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_give_the_loss_and_gradients_of_single_rows(name, shapes):
    model = tiny(name)
    rows = [example(length, i) for i, length in enumerate(LENGTHS)]
    want, want_gradients = loss_and_gradients(model, [collate([(i, row)]) for i, row in enumerate(rows)])
    packing = pack_steps(LENGTHS, range(7), 7, 7, shapes, 64)
    batch = collate_packed([(i, rows[i]) for i in packing.micro_batches[0]], packing)
    assert batch["input_ids"].shape == (1, 128 if shapes else sum(LENGTHS))
    use_packed_attention(model, torch.float64)
    got, gradients = loss_and_gradients(model, [batch])
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    assert gradients.keys() == want_gradients.keys()
    for parameter, value in gradients.items():
        torch.testing.assert_close(
            value, want_gradients[parameter], rtol=1e-4, atol=1e-6, msg=parameter
        )  # norms are float32
    # rows that are padded go through the same attention
    padded, _ = loss_and_gradients(model, [collate(list(enumerate(rows)))])
    torch.testing.assert_close(padded, want, rtol=1e-7, atol=0)


def test_steps_have_their_rows_and_micro_batches_static_shapes():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (300,), generator=generator).tolist()
    order = row_order(lengths, 32, 20, seed=1)
    packing = pack_steps(lengths, order, 32, 8, shapes=2, multiple=64)
    assert len(packing.micro_batches) == 20 * 4
    for step in range(20):
        dealt = [row for rows in packing.micro_batches[4 * step : 4 * step + 4] for row in rows]
        assert sorted(dealt) == sorted(order[32 * step : 32 * step + 32])
    batches = [collate_packed([(r, example(lengths[r], r)) for r in rows], packing) for rows in packing.micro_batches]
    assert {batch["input_ids"].shape[1] for batch in batches} <= set(packing.static_lengths)
    assert len({batch["cu_seqlens"].shape for batch in batches}) == 1
    assert {int(batch["cu_seqlens"][-1]) for batch in batches} <= set(packing.static_lengths)
    assert all(int(batch["cu_seqlens"].diff().max()) <= batch["longest"] == max(lengths) for batch in batches)
    waste = 1 - sum(batch["tokens"] for batch in batches) / sum(batch["input_ids"].numel() for batch in batches)
    assert waste < 0.15


def test_first_fit_packs_every_row_once():
    lengths = [10, 60, 35, 20, 50, 5, 64]
    packing = pack_first_fit(lengths, 64)
    assert sorted(row for rows in packing.micro_batches for row in rows) == list(range(7))
    assert len(packing.micro_batches) == 4  # 244 tokens: 64, 60, 50 + 10, 35 + 20 + 5
    assert all(sum(lengths[row] for row in rows) <= 64 for rows in packing.micro_batches)


def test_packed_attention_is_enabled_where_it_is_exact():
    assert enable_packing(tiny("gemma3"), torch.float32) is None
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_hidden_layers=1, attn_logit_softcapping=50.0))
    before = capped.config._attn_implementation
    reason = enable_packing(capped, torch.float32)
    assert "Gemma2ForCausalLM cannot be packed" in reason and "softcap" in reason
    assert capped.config._attn_implementation == before
    sizes = {name: value for name, value in SMALL.items() if name != "head_dim"}
    kinds = ["conv", "full_attention"]
    recurrent = Lfm2ForCausalLM(
        Lfm2Config(**sizes, num_hidden_layers=2, layer_types=kinds, block_auto_adjust_ff_dim=False)
    )
    for parameter in recurrent.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert "see each other" in enable_packing(recurrent, torch.float32)


def test_unsupported_options_of_packed_attention_are_refused():
    model = tiny("llama")
    use_packed_attention(model, torch.float64)
    with pytest.raises(ValueError, match="takes no mask"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="set use_cache=False"):
        first = model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True)
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=first.past_key_values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 64])
def test_the_flash_kernel_equals_single_rows(window):
    torch.manual_seed(0)
    lengths = [5, 200, 64, 1, 130]
    query = torch.randn(1, 4, 400, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.randn(1, 1, 400, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    borders = torch.tensor([0, 5, 205, 269, 270, 400, 400], device="cuda", dtype=torch.int32)
    outcomes = []
    for kind in ("packed_varlen", "packed_padded"):
        attend = AttentionInterface()[kind]
        where = dict(sliding_window=window, scaling=0.06, cu_seq_lens_q=borders, max_length_q=max(lengths))
        out, _ = attend(torch.nn.Identity(), query, key, value, None, **where)
        gradients = torch.autograd.grad(out.float().square().sum(), (query, key, value))
        outcomes.append((out, *gradients))
    for got, want in zip(*outcomes, strict=True):
        assert float((got - want).float().norm() / want.float().norm()) < 1e-2
