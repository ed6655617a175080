import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.core.errors import BadConfig, Corrupted
from tasks.core.refs import ModelDir
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models import load
from tasks.engine.models.dtypes import pick_dtype, training_precision
from tasks.engine.models.load import load_model
from tasks.engine.models.quantized_loading import nf4_options


def test_precision_follows_the_device():
    assert pick_dtype("auto", "cpu") == torch.float32
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16
    assert training_precision("auto", Path("nowhere"), "cpu") == "float32"
    with pytest.raises(BadConfig, match="none of auto, bfloat16, float16, float32"):
        pick_dtype("int8", "cpu")


def test_a_missing_file_is_named(base, tmp_path):
    with pytest.raises(BadConfig, match="is not a directory"):
        load_model(ModelDir(tmp_path / "nowhere"))
    for name, content in [("config.json", "architecture"), ("model.safetensors", "weights")]:
        broken = shutil.copytree(base, tmp_path / name)
        (broken / name).unlink()
        with pytest.raises(BadConfig, match=content):
            load_model(ModelDir(broken))
    with pytest.raises(BadConfig, match="tokenizer_config.json"):
        load_tokenizer(ModelDir(tmp_path))
    with pytest.raises(BadConfig, match="adapter_model.safetensors"):
        load_model(ModelDir(base, tmp_path))


def test_a_missing_tensor_is_corrupted(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Corrupted, match=r"layers\.1\.mlp\.up_proj"):
        load_model(ModelDir(broken), "float32", "cpu")


def test_an_unknown_architecture_is_named(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma9ForCausalLM"]}))
    with pytest.raises(BadConfig, match="Gemma9ForCausalLM"):
        load_model(ModelDir(other), "float32", "cpu")


def test_four_bits_are_nf4_quantized_twice_and_multiply_in_the_run_s_precision(base, tmp_path):
    for precision in ("bfloat16", "float32"):
        model = load_model(ModelDir(base), precision, "cpu", four_bit=True)
        layer = model.model.layers[0].mlp.up_proj
        assert (layer.weight.quant_type, layer.weight.compress_statistics) == ("nf4", True)
        assert layer.weight.quant_state.nested and layer.compute_dtype == pick_dtype(precision, "cpu")
    model.save_pretrained(tmp_path)  # written for float32, trained in bfloat16
    assert load_model(ModelDir(tmp_path), "bfloat16", "cpu").model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_no_pickle_is_read_instead_of_safetensors(base, tmp_path):
    """Neither a whole model's nor, beside some safetensors, the tensors that those lack."""
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(tensors, broken / "pytorch_model.bin")
    with pytest.raises(BadConfig, match=r"\*.safetensors \(the weights\) is missing"):
        load_model(ModelDir(broken), "float32", "cpu")
    save_file({"other": torch.zeros(1)}, broken / "consolidated.safetensors")
    with pytest.raises((BadConfig, OSError), match="safetensors"):
        load_model(ModelDir(broken), "float32", "cpu")


def test_four_bit_modules_that_break_are_caught(monkeypatch, gemma3n):
    def parents_skipped(family, compute):  # naming the parent does not protect its children
        options = nf4_options(family, compute)
        options.llm_int8_skip_modules = ["altup", "lm_head"]
        return options

    monkeypatch.setattr(load, "nf4_options", parents_skipped)
    with pytest.raises(BadConfig, match="altup.* was quantized to 4 bits"):
        load_model(ModelDir(gemma3n), "float32", "cpu", four_bit=True)
