import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
)

from tasks.core.errors import BadConfig, Corrupted
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import collate
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.models import load
from tasks.engine.models.dtypes import pick_dtype, training_precision
from tasks.engine.models.lm_head import check_head, head_of, hidden_states
from tasks.engine.models.load import load_model
from tasks.engine.models.load_adapter import ignored_settings
from tasks.engine.models.save_trained import save_trained
from tasks.engine.models.trainable import trainable_model
from tests.pico import pico_model

TEXT = dict(
    vocab_size=420, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pico_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def with_tower(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma3")
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_index=419)
    Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma3n")
    config = Gemma3nTextConfig(
        **TEXT, vocab_size_per_layer_input=420, hidden_size_per_layer_input=256, laurel_rank=4, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    Gemma3nForCausalLM(config).save_pretrained(directory)
    return directory


def test_precision_follows_the_device():
    assert pick_dtype("auto", "cpu") == torch.float32
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16
    assert training_precision("auto", Path("nowhere"), "cpu") == "float32"
    with pytest.raises(BadConfig, match="none of auto, bfloat16, float16, float32"):
        pick_dtype("int8", "cpu")


def test_what_is_missing_in_a_model_directory_is_named(base, tmp_path):
    with pytest.raises(BadConfig, match="is not a directory"):
        load_model(ModelDir(tmp_path / "nowhere"))
    for name, what in [("config.json", "architecture"), ("model.safetensors", "weights")]:
        broken = shutil.copytree(base, tmp_path / name)
        (broken / name).unlink()
        with pytest.raises(BadConfig, match=what):
            load_model(ModelDir(broken))
    with pytest.raises(BadConfig, match="tokenizer_config.json"):
        load_tokenizer(ModelDir(tmp_path))
    with pytest.raises(BadConfig, match="adapter_model.safetensors"):
        load_model(ModelDir(base, tmp_path))


def test_a_missing_tensor_is_not_made_up(base, tmp_path):
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


def test_a_multimodal_checkpoint_keeps_its_towers_and_trains_its_text(with_tower):
    base = ModelDir(with_tower)
    model = load_model(base, "float32", "cpu")
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    stored = load_file(with_tower / "model.safetensors")
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in stored.values())
    check_head(model)
    adapted = trainable_model(TrainingConfig(rank=2), "lora", base, "cpu")
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and not any("vision_tower" in name or "projector" in name for name in trained)
    full = trainable_model(TrainingConfig(), "full", base, "cpu")
    assert not any(p.requires_grad for name, p in full.named_parameters() if "vision_tower" in name)


def test_four_bits_are_nf4_quantized_twice_and_multiply_in_the_run_s_precision(base, tmp_path):
    for precision in ("bfloat16", "float32"):
        model = load_model(ModelDir(base), precision, "cpu", four_bit=True)
        layer = model.model.layers[0].mlp.up_proj
        assert (layer.weight.quant_type, layer.weight.compress_statistics) == ("nf4", True)
        assert layer.weight.quant_state.nested and layer.compute_dtype == pick_dtype(precision, "cpu")
    model.save_pretrained(tmp_path)  # written for float32, trained in bfloat16
    assert load_model(ModelDir(tmp_path), "bfloat16", "cpu").model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_no_pickle_is_read_in_place_of_safetensors(base, tmp_path):
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


def test_gemma_3n_in_four_bits_keeps_altup_and_head_and_trains(gemma3n):
    model = trainable_model(TrainingConfig(rank=2), "qlora", ModelDir(gemma3n), "cpu")
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert any("q_proj" in name for name in packed)
    assert not any("altup" in name or "lm_head" in name for name in packed)
    assert head_of(model).softcap == 30.0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("altup" in name for name in trained)
    model.train()
    ids = list(range(5, 25))
    batch = collate([(0, Example(ids, ids))])
    cross_entropy(hidden_states(model, batch), head_of(model), batch["labels"]).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_four_bit_modules_that_break_are_caught(monkeypatch, gemma3n):
    quantization = load._nf4

    def looks_right(compute):  # naming the parent does not protect its children
        config = quantization(compute)
        config.llm_int8_skip_modules = ["altup", "lm_head"]
        return config

    monkeypatch.setattr(load, "_nf4", looks_right)
    with pytest.raises(BadConfig, match="altup.* was quantized to 4 bits"):
        load_model(ModelDir(gemma3n), "float32", "cpu", four_bit=True)


def test_an_adapter_on_the_head_is_refused(base):
    config = TrainingConfig(rank=2, target_modules=["lm_head", "q_proj"])
    with pytest.raises(BadConfig, match="head carries an adapter"):
        trainable_model(config, "lora", ModelDir(base), "cpu")
    with pytest.raises(BadConfig, match="target_modules"):
        trainable_model(TrainingConfig(target_modules=["no_such"]), "lora", ModelDir(base), "cpu")
    with pytest.raises(BadConfig, match="'v_prj' fits nothing that is adapted. There are down_proj, gate_proj, k_proj"):
        trainable_model(TrainingConfig(target_modules=["q_proj", "v_prj"]), "lora", ModelDir(base), "cpu")
    with pytest.raises(BadConfig, match="the embedding is the head as well"):
        trainable_model(TrainingConfig(target_modules=["embed_tokens", "q_proj"]), "lora", ModelDir(base), "cpu")


def test_an_adapter_is_written_without_machine_paths_and_read_back(base, tmp_path):
    model = trainable_model(TrainingConfig(rank=2, use_rslora=True, use_dora=True), "lora", ModelDir(base), "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    save_trained(model, "lora", ModelDir(base), "model", tmp_path)
    assert str(base) not in "".join(path.read_text() for path in tmp_path.glob("adapter*.json"))
    again = load_model(ModelDir(base, tmp_path), "float32", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_a_whole_model_keeps_dtype_config_and_tied_embedding(base, tmp_path):
    model = trainable_model(TrainingConfig(), "full", ModelDir(base), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_trained(model, "full", ModelDir(base), "model", tmp_path)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "tokenizer.model").is_file() and (tmp_path / "chat_template.jinja").is_file()


def test_modules_are_chosen_by_a_regular_expression_and_a_bad_one_is_refused(base):
    config = TrainingConfig(rank=2, target_modules=r".*layers\.1\..*\.(q_proj|up_proj)")
    model = trainable_model(config, "lora", ModelDir(base), "cpu")
    trained = {name.split("base_model.model.model.")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == {"layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}
    with pytest.raises(ValidationError, match="neither `all-linear` nor a regular expression"):
        TrainingConfig(target_modules="(q_proj")


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_an_earlier_adapter_is_trained_on_from_where_it_was(base, tmp_path, method):
    earlier = trainable_model(TrainingConfig(rank=2, use_rslora=True), "lora", ModelDir(base), "cpu")
    with torch.no_grad():
        for name, parameter in earlier.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    save_trained(earlier, "lora", ModelDir(base), "model", tmp_path)
    adapted, ids = ModelDir(base, tmp_path), torch.arange(5, 25)[None]
    config = TrainingConfig(rank=16, alpha=32, use_rslora=False)
    model = trainable_model(config, method, adapted, "cpu")
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        before = load_model(ModelDir(base), "float32", "cpu")(input_ids=ids).logits
        expected = load_model(adapted, "float32", "cpu")(input_ids=ids).logits
    near = 0.3 if method == "qlora" else 1e-3  # NF4 rounds the base
    assert float((ours - expected).abs().mean()) < near * float((before - expected).abs().mean())
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert all("lora_" in name for name in trained) == (method != "full")
    assert ignored_settings(config, adapted) == [
        "rank=16 is not used: the earlier adapter has rank=2",
        "use_rslora=False is not used: the earlier adapter has use_rslora=True",
    ]


def test_a_checkpoint_in_four_bits_on_disk_is_trained_as_it_is(base, tmp_path):
    packed = load_model(ModelDir(base), "float32", "cpu", four_bit=True)
    packed.save_pretrained(tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    config, ids = TrainingConfig(rank=2), torch.arange(5, 25)[None]
    for method in ("lora", "qlora"):
        model = trainable_model(config, method, ModelDir(tmp_path), "cpu")
        assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, packed(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadConfig, match="set method=qlora"):
        trainable_model(config, "full", ModelDir(tmp_path), "cpu")
    other = json.loads((tmp_path / "config.json").read_text())
    other["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(BadConfig, match="quantized by gptq"):
        trainable_model(config, "full", ModelDir(tmp_path), "cpu")
