import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.trainable import trainable_model
from tasks.engine.speed.compile import configure_layers
from tasks.engine.speed.fused_lora.fused_layers import FusedAttention, FusedMLP, fuse_adapters
from tasks.engine.speed.fused_lora.group import LoraGroup, refresh_adapters
from tasks.engine.speed.fused_lora.linear import lora_linear
from tasks.engine.speed.fused_lora.nf4_dequantize import dequantize_nf4
from tasks.engine.speed.packing_support import enable_packing
from tests.pico import pico_model

pytestmark = pytest.mark.filterwarnings("ignore:You have passed exclude_modules", "ignore:`lora_bias=True`")

SMALL = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]
MODELS = {
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8, layer_types=KINDS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),  # q, k and v with a bias
    "gemma3n": lambda: Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **SMALL | {"intermediate_size": [48, 48]}, head_dim=8, sliding_window=8, layer_types=KINDS,
            num_kv_shared_layers=0, hidden_size_per_layer_input=4, vocab_size_per_layer_input=99, laurel_rank=2,
            altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.5],
        )
    ),
}  # fmt: skip


def adapted(name: str, **lora):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    settings = dict(r=4, lora_alpha=12, target_modules="all-linear", exclude_modules=".*altup.*")
    model = get_peft_model(model, LoraConfig(**settings | lora), autocast_adapter_dtype=False).train()
    for parameter in model.parameters():  # B begins as zeros, norms as the identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def outcome(model):
    model.zero_grad()
    ids = torch.randint(3, 99, (3, 17), generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def count(model, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("gemma3", {}),
        ("gemma3", {"use_rslora": True, "r": 7}),
        ("gemma3", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {}),
        ("llama", {"rank_pattern": {"k_proj": 2}}),
        ("qwen2", {}),
        ("gemma3n", {}),
    ],
)
def test_a_fused_model_has_peft_s_loss_gradients_and_names(name, lora):
    model = adapted(name, **lora)
    expected = outcome(model)
    names = [name for name, _ in model.named_parameters()]
    assert fuse_adapters(model)
    loss, gradients = outcome(model)
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(loss, expected[0], rtol=1e-7, atol=0)
    for parameter, value in gradients.items():
        torch.testing.assert_close(value, expected[1][parameter], rtol=1e-4, atol=1e-7, msg=parameter)  # norms: float32
    all_layers = not lora.keys() & {"target_modules", "rank_pattern"}
    if name == "gemma3n":  # one of its two MLPs drops activations; its attention is not ours
        assert (count(model, FusedMLP), count(model, FusedAttention)) == (1, 0)
    else:
        assert count(model, FusedAttention) == (2 if all_layers else 0)
    # an optimizer's step is seen by the next forward
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data -= 0.1 * parameter.grad
    assert float(outcome(model)[0]) < float(loss)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_adapters_other_than_plain_lora_stay_pefts(lora):
    assert fuse_adapters(adapted("llama", **lora)) == []


@pytest.mark.parametrize("rows", [True, False], ids=["by rows", "by columns"])
def test_gradients_of_the_product_itself_in_float64(rows):
    torch.manual_seed(0)
    sizes, inputs = ([5], 9) if rows else ([6, 7], 4)
    layers = torch.nn.ModuleList(torch.nn.Linear(inputs, size, bias=False) for size in sizes).double()
    model = get_peft_model(
        layers, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"]), autocast_adapter_dtype=False
    )
    members = [model.base_model.model[i] for i in range(len(sizes))]
    group = LoraGroup(members)
    refresh_adapters([group])
    assert group.by_columns != rows
    a, b = group.adapters()

    def product(x, *adapters):
        n = len(sizes)
        with torch.no_grad():
            for parameter, adapter in zip([*a, *b], adapters, strict=True):
                parameter.copy_(adapter)
            refresh_adapters([group])
        extended, lora_a, lora_b = group.extended.clone(), group.lora_a.clone(), group.lora_b.clone()
        return lora_linear(x, extended, [], lora_a, lora_b, adapters[:n], adapters[n:], sizes, group.scales)[0]

    x = torch.randn(8, inputs, dtype=torch.float64, requires_grad=True)
    adapters = [torch.randn_like(part).requires_grad_() for part in (*a, *b)]
    assert torch.autograd.gradcheck(product, (x, *adapters))
    refreshed = (group.extended, [], group.lora_a, group.lora_b, a, b, sizes, group.scales)
    torch.library.opcheck(lora_linear, (x, *refreshed), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rank", [3, 4, 8])
def test_output_and_gradient_rows_are_aligned_to_16_bytes(rank):
    """Attention's kernels assume it of gradients: torch's cuDNN path crashed on rows of 68 values."""
    model = get_peft_model(MODELS["llama"](), LoraConfig(r=rank, target_modules="all-linear")).bfloat16().train()
    fuse_adapters(model)
    attention, mlp = (getattr(model.base_model.model.model.layers[0], name) for name in ("self_attn", "mlp"))
    for module, width in ((attention.output, 32), (mlp, 32)):
        x = torch.randn(1, 17, width, dtype=torch.bfloat16, requires_grad=True)
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        for tensor in (y, grad):
            assert tensor.stride(-1) == 1 and tensor.stride(-2) % 8 == 0, tensor.stride()


def test_nf4_weights_are_dequantized_as_by_bitsandbytes():
    torch.manual_seed(0)
    weight = torch.randn(300, 128)
    values, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = (values, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    wide = torch.full((300, 140), 7.0)
    dequantize_nf4(parts, wide[:, :128])
    torch.testing.assert_close(wide[:, :128], bnb.dequantize_4bit(values, state), rtol=0, atol=0)
    assert bool((wide[:, 128:] == 7).all())


def test_a_qlora_model_fused_has_peft_s_gradients(tmp_path):
    base = ModelDir(pico_model(tmp_path, hidden=128))
    model = trainable_model(TrainingConfig(rank=4, precision="float32"), "qlora", base, "cpu").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss, gradients = outcome(model)
    assert count(model, FusedMLP) == 0
    groups = fuse_adapters(model)
    assert all(group.quantized for group in groups) and count(model, FusedMLP) == count(model, FusedAttention) == 2
    fused_loss, fused_gradients = outcome(model)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0)
    for name, value in fused_gradients.items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(640, 1152), (6912, 1152), (1152, 6912), (300, 96)])
def test_the_nf4_kernel_dequantizes_as_bitsandbytes(shape):
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    values, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = (values, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    wide = torch.full((shape[0], shape[1] + 32), 7.0, device="cuda", dtype=torch.bfloat16)
    dequantize_nf4(parts, wide[:, : shape[1]])
    expected = bnb.dequantize_4bit(values, state)
    torch.testing.assert_close(wide[:, : shape[1]], expected, rtol=2**-7, atol=0)  # a few are rounded the other way
    assert float((wide[:, : shape[1]] != expected).float().mean()) < 1e-4
    assert bool((wide[:, shape[1] :] == 7).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_have_peft_s_gradients(tmp_path, method, recompute):
    base = ModelDir(pico_model(tmp_path, hidden=256, layers=3, sliding_window=16))
    model = trainable_model(TrainingConfig(rank=8, precision="bfloat16"), method, base, "cuda").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.autocast("cuda", torch.bfloat16):
        loss, gradients = outcome(model)
        assert enable_packing(model, torch.bfloat16) is None
        assert fuse_adapters(model)
        configure_layers(model, recompute, compiled=True, warn=pytest.fail)
        compiled_loss, compiled_gradients = outcome(model)
    torch.testing.assert_close(compiled_loss, loss, rtol=2e-3, atol=0)
    for name, value in compiled_gradients.items():
        assert float((value - gradients[name]).norm() / gradients[name].norm()) < 5e-2, name
