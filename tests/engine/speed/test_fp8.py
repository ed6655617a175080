"""Products in 8 bits on the CPU: the same numbers as on a card, multiplied in float32. On a card: tests marked gpu."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tasks.core.errors import BadConfig
from tasks.engine.speed.compile import configure_layers
from tasks.engine.speed.fp8.matmul import (
    fill_lora,
    padded_rank,
    quantize_rows,
    quantize_weight,
    quantize_with_lora,
    scaled_matmul,
)
from tasks.engine.speed.fused_lora.fused_layers import FusedMLP, fuse_adapters
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import _check_fp8
from tests.engine.speed.test_fused_lora import outcome

pytestmark = pytest.mark.filterwarnings("ignore:You have passed exclude_modules")

SMALL = dict(
    vocab_size=99, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, head_dim=16,
)  # fmt: skip
MODELS = {
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=8)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
}


def adapted(name: str):
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name](), LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")).train()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def relative_error(values, expected) -> float:
    return float((values.double() - expected.double()).norm() / expected.double().norm())


def test_rows_are_quantized_to_four_bits_and_their_maximum_exactly():
    torch.manual_seed(0)
    x = torch.randn(40, 48) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0
    small, scales = quantize_rows(x)
    back = small.float() * scales
    assert bool((small.float().abs().amax(1)[4:] == 448).all())
    assert bool(((back - x).abs() <= x.abs() / 16 + scales * 2**-10).all())
    assert not back[3].any()


@pytest.mark.parametrize("members", [1, 2])
def test_the_lora_part_of_a_product_is_about_as_exact_as_bfloat16(members):
    """Against the same product with a LoRA matrix of 0."""
    torch.manual_seed(0)
    weight, x, grad = torch.randn(96, 64), torch.randn(7, 64), torch.randn(7, 96)
    lora, low_rank_x = 0.2 * torch.randn(96, 6), torch.randn(7, 6 * members)
    block = torch.block_diag(*lora.chunk(members))
    parts = quantize_weight(weight, 6 * members)
    fill_lora(parts, lora, members, lora.abs().max())
    product = scaled_matmul(*quantize_with_lora(x, low_rank_x), parts[0], parts[1], torch.float32)
    assert relative_error(product, x @ weight.T + low_rank_x @ block.T) < 0.05
    lora_columns = padded_rank(6 * members)
    product_tall = scaled_matmul(*quantize_rows(grad), parts[2], parts[3], torch.float32)
    assert relative_error(product_tall[:, :64], grad @ weight) < 0.05
    exact = (quantize_rows(grad)[0].float() * quantize_rows(grad)[1]) @ block
    high, low = (product_tall[:, start : start + 6 * members] for start in (64, 64 + lora_columns))
    assert relative_error(high + low, exact) < 4e-3
    empty = quantize_weight(weight, 6 * members)
    fill_lora(empty, torch.zeros_like(lora), members, lora.new_zeros(()))
    product_without = scaled_matmul(*quantize_with_lora(x, low_rank_x), empty[0], empty[1], torch.float32)
    assert relative_error(product - product_without, low_rank_x @ block.T) < 8e-3


@pytest.mark.parametrize("save_gate_up", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_mlp_in_8_bits_has_nearly_peft_s_loss_and_gradients(name, save_gate_up):
    model = adapted(name)
    expected, names = outcome(model), [name for name, _ in model.named_parameters()]
    groups = fuse_adapters(model, save_gate_up=save_gate_up, fp8=True)
    assert sum(group.fp8 for group in groups) == 4
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
    assert [name for name, _ in model.named_parameters()] == names
    loss, gradients = outcome(model)
    assert abs(float(loss - expected[0])) < 0.02 * float(expected[0])
    errors = {name: relative_error(value, expected[1][name]) for name, value in gradients.items()}
    assert max(errors.values()) < 0.25, max(errors, key=errors.get)
    assert sum(errors.values()) / len(errors) < 0.12
    weight = model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    assert weight.shape == (128, 384)
    assert bool(weight.isnan().all())  # whoever multiplied it would see


def test_unsupported_widths_stay_in_their_precision():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SMALL | {"intermediate_size": 204}, sliding_window=8)
    model = get_peft_model(Gemma3ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    groups = fuse_adapters(model, fp8=True)
    assert groups
    assert not any(group.fp8 for group in groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a card")
def test_the_stage_refuses_fp8_on_a_device_without_it():
    with pytest.raises(BadConfig, match="8-bit"):
        _check_fp8(FineTuneConfig(fp8=True, precision="bfloat16"))


@pytest.mark.parametrize(
    ("settings", "reason"), [({"method": "qlora"}, "method=lora"), ({"use_dora": True}, "use_dora")]
)
def test_the_config_refuses_fp8_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        FineTuneConfig(fp8=True, precision="bfloat16", **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("save_gate_up", [False, True])
def test_the_kernels_have_the_float64_gradients_of_a_layer_of_real_size(fp8, save_gate_up):
    """Gemma-3-1B's MLP, 4224 tokens: more than a chunk, adapters away from 0."""
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no 8-bit products")
    torch.manual_seed(0)
    shape = dict(hidden_size=1152, intermediate_size=6912, num_hidden_layers=1, vocab_size=32, num_attention_heads=4,
                 num_key_value_heads=1, head_dim=256)  # fmt: skip
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape)).to("cuda", torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules=["gate_proj", "up_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    mlp = model.base_model.model.model.layers[0].mlp
    x, grad = (torch.randn(1, 4224, 1152, device="cuda") for _ in range(2))
    exact = {name: parameter.data.double() for name, parameter in mlp.named_parameters()}
    trained = {name: value.requires_grad_() for name, value in exact.items() if "lora" in name}

    def adapted_by_hand(name, x):
        a, b = exact[f"{name}.lora_A.default.weight"], exact[f"{name}.lora_B.default.weight"]
        return x @ exact[f"{name}.base_layer.weight"].T + (x @ a.T) @ b.T

    x64 = x.bfloat16().double().requires_grad_()
    gate = torch.nn.functional.gelu(adapted_by_hand("gate_proj", x64), approximate="tanh")
    expected_y = adapted_by_hand("down_proj", gate * adapted_by_hand("up_proj", x64))
    expected = torch.autograd.grad(expected_y, [x64, *trained.values()], grad.bfloat16().double())
    fuse_adapters(model, save_gate_up=save_gate_up, fp8=fp8)
    model.train()
    mlp = model.base_model.model.model.layers[0].mlp
    assert mlp.fp8 == fp8
    x_bf16 = x.bfloat16().requires_grad_()
    for hook in model.base_model.model.model._forward_pre_hooks.values():
        hook(None, ())
    y = mlp(x_bf16)
    y.backward(grad.bfloat16())
    parameters = dict(mlp.named_parameters())
    errors = {"y": relative_error(y, expected_y), "x": relative_error(x_bf16.grad, expected[0])}
    errors |= {
        name: relative_error(parameters[name].grad, value) for name, value in zip(trained, expected[1:], strict=True)
    }
    print({name: f"{value:.1e}" for name, value in errors.items()})
    assert max(errors.values()) < (8e-2 if fp8 else 1.5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_layers_with_fp8_have_the_same_gradients():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no 8-bit products")
    model = adapted("gemma3").to("cuda", torch.bfloat16)
    fuse_adapters(model, fp8=True)
    loss, gradients = outcome(model)
    configure_layers(model, recompute=False, compiled=True, warn=pytest.fail)
    compiled_loss, compiled_gradients = outcome(model)
    assert abs(float(compiled_loss - loss)) < 0.02 * float(loss)
    errors = {name: relative_error(value, gradients[name]) for name, value in compiled_gradients.items()}
    assert max(errors.values()) < 0.2, {name: f"{value:.2f}" for name, value in errors.items()}
