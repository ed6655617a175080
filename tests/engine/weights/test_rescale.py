"""The residual stream rescaled: the same function at another size, for each architecture that it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.engine.models.tensor_names import is_norm
from tasks.engine.weights.effective import effective_tensors, effective_weights
from tasks.engine.weights.rescale import clipped_weights, rescaled_weights, rescaling_factors, write_model
from tests.engine.weights.test_effective import adapter_of
from tests.pico import pico_model

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-10, pad_token_id=0, bos_token_id=2, eos_token_id=1,
)  # fmt: skip
IDS = torch.tensor([[2, *range(5, 40)]])


@torch.no_grad()
def random_model(config: PretrainedConfig, directory: Path) -> Path:
    """A random model whose norms are not all alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if is_norm(name, tuple(parameter.shape)):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def run(directory: Path) -> tuple[torch.Tensor, list[float]]:
    """Logits, and the stream's peak behind the embedding and each layer but the last (which the final norm hides)."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    output = model(IDS, output_hidden_states=True, use_cache=False)
    return output.logits, [float(states.abs().max()) for states in output.hidden_states[:-1]]


@pytest.mark.parametrize("k", [2.0**-6, 2.0**12])
@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**SIZES, tie_word_embeddings=True),
        Gemma3TextConfig(**SIZES, tie_word_embeddings=False),
        Gemma2Config(**SIZES),
        LlamaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        Qwen3Config(**SIZES, tie_word_embeddings=True),
    ],
    ids=["gemma3", "gemma3-untied", "gemma2", "llama", "llama-tied", "qwen3"],
)
def test_the_function_stays_and_the_stream_is_k_times_as_large(
    config: PretrainedConfig, k: float, tmp_path: Path
) -> None:
    base, out = ModelDir(random_model(config, tmp_path / "base")), tmp_path / "out"
    write_model(rescaled_weights(effective_weights(base), base.base, k), base, out)
    (before, peaks), (after, scaled) = run(base.base), run(out)
    assert before.std() > 0.01
    assert (before - after).abs().max() < 2e-3 * before.abs().max()  # the epsilon is all that differs
    assert scaled == pytest.approx([k * peak for peak in peaks], rel=1e-3)


def test_norms_become_float32_since_a_small_gain_is_lost_in_bfloat16(tmp_path: Path) -> None:
    """Gemma stores gain - 1: at k = 1/1024 every gain lies nearer to 0 than bfloat16's step of 1/256 near -1."""
    base = ModelDir(pico_model(tmp_path / "base"))
    write_model(rescaled_weights(effective_weights(base), base.base, 2.0**-10), base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    norm = tensors["model.layers.0.post_attention_layernorm.weight"]
    assert norm.dtype == torch.float32 and torch.equal(norm + 1, torch.full((64,), 2.0**-10))
    assert (norm.bfloat16().double() + 1 == 0).all()
    assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16  # nothing changed there
    embedding = dict(effective_tensors(base))["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding * 2.0**-10)


def test_an_adapter_is_merged_before_rescaling_and_rounded_at_the_end(tmp_path: Path) -> None:
    base = pico_model(tmp_path / "base")
    model = ModelDir(base, adapter_of(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"]))
    scaled = {weight.name: weight.rows() for weight in rescaled_weights(effective_weights(model), base, 0.5)}
    for name, tensor in effective_tensors(model):
        factor = 0.5 if name.endswith("embed_tokens.weight") else 1.0
        if not is_norm(name, tuple(tensor.shape)):
            assert torch.equal(scaled[name], tensor * factor), name


def test_clipping_limits_each_norm_and_changes_the_function(tmp_path: Path) -> None:
    base = ModelDir(random_model(Gemma3TextConfig(**SIZES), tmp_path / "base"))
    write_model(clipped_weights(effective_weights(base), base.base, 90.0), base, tmp_path / "out")
    before, after = dict(effective_tensors(base)), dict(effective_tensors(ModelDir(tmp_path / "out")))
    for name, tensor in before.items():
        if is_norm(name, tuple(tensor.shape)):
            limit = (tensor.double() + 1).abs().quantile(0.9)
            assert torch.allclose((after[name].double() + 1).abs().max(), limit)
        else:
            assert torch.equal(tensor, after[name])
    assert (run(base.base)[0] - run(tmp_path / "out")[0]).abs().max() > 1e-2 * run(base.base)[0].abs().max()


def test_unknown_families_and_factors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n_text"}))
    with pytest.raises(BadConfig, match="'gemma3n_text' write into the residual stream is not known"):
        rescaling_factors(["model.norm.weight"], tmp_path, 0.5)
    with pytest.raises(ValueError, match=r"k=0.3 is no power of two.*take 0\.25"):
        rescaling_factors(["model.norm.weight"], tmp_path, 0.3)


def test_the_command_writes_a_model_directory(tmp_path: Path) -> None:
    base = pico_model(tmp_path / "base")
    command = [sys.executable, "-m", "tasks.engine.weights.rescale", str(base), str(tmp_path / "out"), "--k", "0.25"]
    subprocess.run(command, check=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in base.iterdir()}
    assert torch.equal(run(base)[0].argmax(-1), run(tmp_path / "out")[0].argmax(-1))
