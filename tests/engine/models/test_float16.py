"""A model whose residual stream passes float16's largest number trains in float16 all the same."""

import pytest
import torch

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.collator import collate, to_device
from tasks.engine.models.float16 import keep_residual_in_float32
from tasks.engine.models.lm_head import hidden_states
from tasks.engine.models.load import load_model
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training.loss_scaling import GROW_AFTER, START, LossScale
from tasks.engine.training.train import train
from tests.engine.training.test_loop import rows, sigterm, training_spec  # noqa: F401
from tests.pico import pico_model
from tests.planted import plant

K = 2.0**14


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The same function as the pico model, its residual stream 16384 times as large."""
    plain = pico_model(tmp_path_factory.mktemp("plain"), hidden=32)
    return ModelDir(plant(plain, tmp_path_factory.mktemp("planted"), K, untie=False))


def test_a_float32_residual_stream_does_not_overflow(rows, tmp_path):  # noqa: F811
    plain = pico_model(tmp_path / "plain", hidden=32)  # at 65536 what a norm puts out passes 65504 by itself
    base = ModelDir(plant(plain, tmp_path / "planted", 2.0**16, untie=False))
    batch = to_device(collate(list(enumerate(rows[:4]))), torch.device("cpu"))
    exact = load_model(base, "float32", "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        plain = hidden_states(load_model(base, "float32", "cpu").to(torch.float16), batch)
        hidden = hidden_states(load_model(base, "float16", "cpu"), batch)
    with torch.no_grad():
        expected = hidden_states(exact, batch)
        unguarded = hidden_states(load_model(base, "float16", "cpu"), batch)  # without autocast, as the teacher runs
    assert not bool(plain.isfinite().all())
    scale = float(expected.abs().max())
    assert float((hidden - expected).abs().max()) < 1e-2 * scale
    assert float((unguarded.float() - expected).abs().max()) < 1e-2 * scale


@pytest.mark.parametrize("method, dora", [("lora", True), ("qlora", False), ("full", False)])
def test_training_in_float16_gives_the_losses_of_float32(base, rows, tmp_path, method, dora):  # noqa: F811
    settings = dict(dropout=0, use_dora=dora, max_steps=6, learning_rate=1e-3)
    losses = {}
    for precision in ("float32", "float16"):
        _, history = train(
            training_spec(base, rows, tmp_path / precision, method=method, precision=precision, **settings)
        )
        losses[precision] = history.steps["loss"]
        assert all(norm > 0 for norm in history.steps["grad_norm"])
    assert losses["float16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert losses["float16"][-1] < losses["float16"][0]


def test_dtypes_of_the_parts(base):
    model = load_model(base, "float16", "cpu")
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    norms = {name for name in kinds if name.endswith("layernorm.weight") or name == "model.norm.weight"}
    assert {kinds[name] for name in norms} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "_proj" in name or "embed" in name} == {torch.float16}
    adapted = trainable_model(TrainingConfig(rank=2, precision="float16"), "lora", base, "cpu")
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}


def test_gemma_3n_is_refused_with_the_way_out():
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    with torch.device("meta"):
        model = Gemma3nForCausalLM(Gemma3nTextConfig(num_hidden_layers=5, num_kv_shared_layers=0, layer_types=None))
    with pytest.raises(BadConfig, match="precision=float32, or use a card with bfloat16"):
        keep_residual_in_float32(model)


def test_the_loss_scale_falls_at_an_overflow_and_rises_later():
    scale = LossScale(used=True)
    assert scale.overflowed(2.0, float("inf")) and scale.factor == START / 2
    assert not scale.overflowed(float("nan"), float("nan")), "a loss that is not finite is no overflow"
    for _ in range(GROW_AFTER):
        assert not scale.overflowed(2.0, 1.0)
    assert scale.factor == START
    restored = LossScale(used=True)
    restored.restore(scale.state())
    assert restored.state() == scale.state()
    while scale.factor >= 1:
        last = scale.overflowed(2.0, float("nan"))
    assert not last, "below 1 it is the model that diverged"
    assert not LossScale(used=False).overflowed(2.0, float("nan"))


def test_an_overflowing_step_is_skipped(base, rows, tmp_path):  # noqa: F811
    def overflow(call, hidden, _):
        return (hidden.sum() * 0).abs().sqrt() if call == 3 else None  # step 2: value 0, gradient NaN

    _, history = train(
        training_spec(base, rows, tmp_path, at_hidden=overflow, precision="float16", max_steps=4, dropout=0)
    )
    assert history.steps["grad_norm"][1] == 0 and history.steps["grad_norm"][2] > 0
    assert len(history) == 4
