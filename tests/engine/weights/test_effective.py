"""The streamed merge equals peft's, for every kind of adapter that it takes; what it cannot take it names."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.core.errors import BadConfig, Corrupted
from tasks.core.refs import ModelDir
from tasks.engine.weights.effective import effective_tensors, effective_weights
from tasks.engine.weights.nf4 import combine_four_bit
from tasks.engine.weights.safetensors_reader import stored_tensors
from tasks.engine.weights.safetensors_writer import write_safetensors
from tests.pico import pico_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico Gemma-3 in float32, so that a merge can be compared tightly."""
    directory = pico_model(tmp_path_factory.mktemp("weights") / "base")
    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(directory)
    return directory


def adapter_of(base: Path, directory: Path, **options: object) -> Path:
    """A random adapter none of whose tensors is zero, as peft saves it."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": ALL_LINEAR} | options)),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 1 + 0.1 * torch.randn_like(parameter) if "magnitude" in name else torch.randn_like(parameter)
                parameter.mul_(noise) if "magnitude" in name else parameter.add_(0.1 * noise)
    model.save_pretrained(directory)
    return directory


def peft_merge(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return model.merge_and_unload(safe_merge=True).state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 40}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["norm"]},
    ],
    ids=["lora", "rslora", "dora", "patterns", "embedding", "modules_to_save"],
)
def test_equals_peft(base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    merged = peft_merge(base, adapter)
    changed = 0
    original = dict(effective_tensors(ModelDir(base)))
    for name, tensor in effective_tensors(ModelDir(base, adapter)):
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, original[name])
    assert changed >= 2
    assert set(original) == set(load_file(base / "model.safetensors"))  # tied: no lm_head in either
    assert "lm_head.weight" not in original


def test_chunks_are_the_rows(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "down_proj"])
    for weight in effective_weights(ModelDir(base, adapter)):
        pieces = list(weight.chunks(chunk_bytes=1000))
        torch.testing.assert_close(torch.cat(pieces), weight.rows(), rtol=1e-6, atol=1e-7)
        if weight.transform is not None:
            assert len(pieces) > 1


def test_merged_weights_are_rounded_to_the_base_s_dtype(tmp_path: Path) -> None:
    base = pico_model(tmp_path / "base")  # bfloat16
    adapter = adapter_of(base, tmp_path / "adapter")
    exact = peft_merge(base, adapter)
    for name, tensor in effective_tensors(ModelDir(base, adapter)):
        assert tensor.dtype == torch.bfloat16
        # A result within an ulp of float32 of two bfloat16 neighbours may go to either.
        assert (tensor != exact[name].bfloat16()).float().mean() < 1e-3


def test_a_written_file_is_read_by_safetensors(base: Path, tmp_path: Path) -> None:
    everything = list(effective_weights(ModelDir(base)))
    write_safetensors(tmp_path / "model.safetensors", everything, {"format": "pt"})
    written = load_file(tmp_path / "model.safetensors")
    for name, tensor in effective_tensors(ModelDir(base)):
        assert torch.equal(written.pop(name), tensor)
    assert not written


@pytest.mark.parametrize("name", ["model.layers.7.self_attn.q_proj.lora_A.weight", "lm_head.lora_A.weight"])
def test_an_unmatched_tensor_is_named(base: Path, tmp_path: Path, name: str) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(tensors | {f"base_model.model.{name}": torch.ones(4, 64)}, adapter / "adapter_model.safetensors")
    with pytest.raises(BadConfig, match=name.replace(".", r"\.")):
        list(effective_weights(ModelDir(base, adapter)))


@pytest.mark.parametrize("option", [{"fan_in_fan_out": True}, {"peft_type": "IA3"}, {"init_lora_weights": "pissa"}])
def test_unmergeable_adapters_are_refused(base: Path, tmp_path: Path, option: dict[str, object]) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | option))
    with pytest.raises(BadConfig, match=str(list(option.values())[0] if "peft_type" in option else list(option)[0])):
        list(effective_weights(ModelDir(base, adapter)))


def test_a_base_of_another_width_is_named(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    with pytest.raises(
        BadConfig, match=r"layers\.0\.\w+\.\w+_proj.weight is \[\d+, \d+\] in the base and \[\d+, \d+\] in the adapter"
    ):
        list(effective_weights(ModelDir(pico_model(tmp_path / "wide", hidden=96), adapter)))


def test_a_cut_file_is_corrupted(base: Path, tmp_path: Path) -> None:
    complete = (base / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(complete[:-100])
    with pytest.raises(Corrupted, match="cut off"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_rows_equal_bitsandbytes(kind: str, nested: bool, tmp_path: Path) -> None:
    """Blocks of 64 that begin and end within rows of 40; any rows, read alone."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    values = torch.randn(1000, 40)
    packed, state = quantize_4bit(values.bfloat16(), quant_type=kind, compress_statistics=nested, blocksize=64)
    parts = {f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({"w": packed, "b": torch.zeros(3), **parts}, tmp_path / "model.safetensors")
    tensors = combine_four_bit(stored_tensors(tmp_path))
    assert list(tensors) == ["b", "w"]
    assert (tensors["w"].shape, tensors["w"].dtype) == ((1000, 40), torch.bfloat16)
    state.dtype = torch.float32
    expected = dequantize_4bit(packed, state)
    assert torch.equal(tensors["w"].rows(), expected)
    for start, stop in [(0, 1), (1, 4), (7, 8), (990, 1000), (3, 900)]:
        assert torch.equal(tensors["w"].rows(start, stop), expected[start:stop])
