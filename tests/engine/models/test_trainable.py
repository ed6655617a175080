import json
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import collate
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.models.lm_head import check_head, head_of, hidden_states
from tasks.engine.models.load import load_model
from tasks.engine.models.load_adapter import ignored_settings
from tasks.engine.models.save_trained import save_trained
from tasks.engine.models.trainable import trainable_model


def test_a_multimodal_checkpoint_loads_its_towers_and_trains_its_text(with_tower):
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


def test_gemma_3n_in_four_bits_has_altup_and_head_in_16_and_trains(gemma3n):
    model = trainable_model(TrainingConfig(rank=2), "qlora", ModelDir(gemma3n), "cpu")
    four_bit = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert any("q_proj" in name for name in four_bit)
    assert not any("altup" in name or "lm_head" in name for name in four_bit)
    assert head_of(model).softcap == 30.0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not any("altup" in name for name in trained)
    model.train()
    ids = list(range(5, 25))
    batch = collate([(0, Example(ids, ids))])
    cross_entropy(hidden_states(model, batch), head_of(model), batch["labels"]).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


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


def test_a_saved_adapter_has_no_machine_paths_and_loads_again(base, tmp_path):
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
    reloaded = load_model(ModelDir(base, tmp_path), "float32", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=ids).logits, expected)


def test_a_full_model_is_saved_with_the_base_s_dtype_config_and_tied_embedding(base, tmp_path):
    model = trainable_model(TrainingConfig(), "full", ModelDir(base), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_trained(model, "full", ModelDir(base), "model", tmp_path)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (tmp_path / "tokenizer.model").is_file() and (tmp_path / "chat_template.jinja").is_file()


def test_target_modules_can_be_a_regular_expression(base):
    config = TrainingConfig(rank=2, target_modules=r".*layers\.1\..*\.(q_proj|up_proj)")
    model = trainable_model(config, "lora", ModelDir(base), "cpu")
    trained = {name.split("base_model.model.model.")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == {"layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"}
    with pytest.raises(ValidationError, match="neither `all-linear` nor a regular expression"):
        TrainingConfig(target_modules="(q_proj")


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_an_earlier_adapter_is_trained_from_its_weights(base, tmp_path, method):
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
        logits = model(input_ids=ids).logits
        before = load_model(ModelDir(base), "float32", "cpu")(input_ids=ids).logits
        expected = load_model(adapted, "float32", "cpu")(input_ids=ids).logits
    near = 0.3 if method == "qlora" else 1e-3  # NF4 rounds the base
    assert float((logits - expected).abs().mean()) < near * float((before - expected).abs().mean())
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert all("lora_" in name for name in trained) == (method != "full")
    assert ignored_settings(config, adapted) == [
        "rank=16 is not used: the earlier adapter has rank=2",
        "use_rslora=False is not used: the earlier adapter has use_rslora=True",
    ]


def test_a_four_bit_checkpoint_is_trained_as_stored(base, tmp_path):
    four_bit = load_model(ModelDir(base), "float32", "cpu", four_bit=True)
    four_bit.save_pretrained(tmp_path)
    shutil.copy(base / "tokenizer.json", tmp_path)
    config, ids = TrainingConfig(rank=2), torch.arange(5, 25)[None]
    for method in ("lora", "qlora"):
        model = trainable_model(config, method, ModelDir(tmp_path), "cpu")
        assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
        with torch.no_grad():
            torch.testing.assert_close(
                model(input_ids=ids).logits, four_bit(input_ids=ids).logits, rtol=1e-4, atol=1e-4
            )
    with pytest.raises(BadConfig, match="set method=qlora"):
        trainable_model(config, "full", ModelDir(tmp_path), "cpu")
    other = json.loads((tmp_path / "config.json").read_text())
    other["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(BadConfig, match="quantized by gptq"):
        trainable_model(config, "full", ModelDir(tmp_path), "cpu")
