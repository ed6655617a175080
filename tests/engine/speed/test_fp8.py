"""Products in 8 bits on the CPU: the same numbers as on a card, multiplied in float32. On a card: tests marked gpu."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.speed.compile import run_layers
from tasks.engine.speed.fp8.matmul import fill, padded, product, quantize, quantize_rows, quantize_weight
from tasks.engine.speed.fused_lora.fused_layers import FusedMLP, fuse_adapters
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
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


def away(ours, want) -> float:
    return float((ours.double() - want.double()).norm() / want.double().norm())


def test_a_row_s_largest_value_is_kept_and_the_others_to_four_bits():
    torch.manual_seed(0)
    x = torch.randn(40, 48) * torch.logspace(-6, 6, 40)[:, None]
    x[3] = 0
    small, scales = quantize_rows(x)
    back = small.float() * scales
    assert bool((small.float().abs().amax(1)[4:] == 448).all())
    assert bool(((back - x).abs() <= x.abs() / 16 + scales * 2**-10).all())
    assert not back[3].any()


@pytest.mark.parametrize("members", [1, 2])
def test_a_product_takes_its_low_rank_along_about_as_exactly_as_bfloat16(members):
    """Where the weight is 0 the low rank is all there is to see."""
    torch.manual_seed(0)
    weight, x, grad = torch.randn(96, 64), torch.randn(7, 64), torch.randn(7, 96)
    low, given = 0.2 * torch.randn(96, 6), torch.randn(7, 6 * members)
    block = torch.block_diag(*low.chunk(members))
    parts = quantize_weight(weight, 6 * members)
    fill(parts, low, members, low.abs().max())
    got = product(*quantize(x, given), parts[0], parts[1], torch.float32)
    assert away(got, x @ weight.T + given @ block.T) < 0.05
    room = padded(6 * members)
    both = product(*quantize_rows(grad), parts[2], parts[3], torch.float32)
    assert away(both[:, :64], grad @ weight) < 0.05
    exact = (quantize_rows(grad)[0].float() * quantize_rows(grad)[1]) @ block
    assert away(both[:, 64 : 64 + 6 * members] + both[:, 64 + room : 64 + room + 6 * members], exact) < 4e-3
    alone = quantize_weight(weight, 6 * members)
    fill(alone, torch.zeros_like(low), members, low.new_zeros(()))
    without = product(*quantize(x, given), alone[0], alone[1], torch.float32)
    assert away(got - without, given @ block.T) < 8e-3


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_an_mlp_in_8_bits_has_nearly_peft_s_loss_and_gradients(name, keep):
    model = adapted(name)
    want, names = outcome(model), [name for name, _ in model.named_parameters()]
    groups = fuse_adapters(model, keep=keep, fp8=True)
    assert sum(group.fp8 for group in groups) == 4
    assert sum(isinstance(module, FusedMLP) for module in model.modules()) == 2
    assert [name for name, _ in model.named_parameters()] == names
    loss, gradients = outcome(model)
    assert abs(float(loss - want[0])) < 0.02 * float(want[0])
    far = {name: away(value, want[1][name]) for name, value in gradients.items()}
    assert max(far.values()) < 0.25, max(far, key=far.get)
    assert sum(far.values()) / len(far) < 0.12
    weight = model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    assert weight.shape == (128, 384)
    assert bool(weight.isnan().all())  # whoever multiplied it would see


def test_what_does_not_fit_stays_in_its_own_precision():
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SMALL | {"intermediate_size": 204}, sliding_window=8)
    model = get_peft_model(Gemma3ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    groups = fuse_adapters(model, fp8=True)
    assert groups
    assert not any(group.fp8 for group in groups)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a card")
@pytest.mark.parametrize(
    ("settings", "reason"), [({}, "8-bit"), ({"method": "qlora"}, "method=lora"), ({"use_dora": True}, "use_dora")]
)
def test_the_stage_refuses_it_where_it_cannot_be_and_says_why(tmp_path, settings, reason):
    config = FineTuneConfig(fp8=True, precision="bfloat16", **settings)
    with pytest.raises(BadConfig, match=reason):
        fine_tune(config, ModelDir(tmp_path), tmp_path, tmp_path, Job(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_kernels_have_the_float64_gradients_of_a_layer_of_real_size(fp8, keep):
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
    want_y = adapted_by_hand("down_proj", gate * adapted_by_hand("up_proj", x64))
    want = torch.autograd.grad(want_y, [x64, *trained.values()], grad.bfloat16().double())
    fuse_adapters(model, keep=keep, fp8=fp8)
    model.train()
    mlp = model.base_model.model.model.layers[0].mlp
    assert mlp.fp8 == fp8
    own = x.bfloat16().requires_grad_()
    for hook in model.base_model.model.model._forward_pre_hooks.values():
        hook(None, ())
    y = mlp(own)
    y.backward(grad.bfloat16())
    parameters = dict(mlp.named_parameters())
    far = {"y": away(y, want_y), "x": away(own.grad, want[0])}
    far |= {name: away(parameters[name].grad, value) for name, value in zip(trained, want[1:], strict=True)}
    print({name: f"{value:.1e}" for name, value in far.items()})
    assert max(far.values()) < (8e-2 if fp8 else 1.5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_layers_take_them():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the card has no 8-bit products")
    model = adapted("gemma3").to("cuda", torch.bfloat16)
    fuse_adapters(model, fp8=True)
    loss, gradients = outcome(model)
    run_layers(model, recompute=False, compiled=True, warn=pytest.fail)
    got, ours = outcome(model)
    assert abs(float(got - loss)) < 0.02 * float(loss)
    far = {name: away(value, gradients[name]) for name, value in ours.items()}
    assert max(far.values()) < 0.2, {name: f"{value:.2f}" for name, value in far.items()}
