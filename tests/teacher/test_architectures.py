"""Every architecture that the docs name, as a pico model: trained, saved, merged, and still what it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3nConfig,
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.family import TOWERS
from tasks.engine.models.lm_head import unwrap
from tasks.engine.models.load import load_model
from tasks.engine.models.trainable import trainable_model
from tasks.merge import MergeConfig
from tasks.merge.run import merge
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
from tests.engine.rows import example_dataset
from tests.pico import pico_tokenizer

SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
KINDS = ["sliding_attention", "full_attention"]


class Tower(PreTrainedModel):
    """Stands where Gemma 3n has a vision tower from timm, which needs a torchvision that CPU torch has not."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Linear(4, config.hidden_size)
        self.post_init()


@pytest.fixture
def a_tower_without_timm(monkeypatch):
    monkeypatch.setitem(AutoModel._model_mapping._extra_content, Gemma3nVisionConfig, Tower)


def gemma3(text):
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def gemma3n(text, towers=False):
    own = dict(
        vocab_size_per_layer_input=text["vocab_size"], hidden_size_per_layer_input=8, laurel_rank=4, layer_types=KINDS,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.5, 0.0],
    )  # fmt: skip
    if not towers:
        return Gemma3nForCausalLM(Gemma3nTextConfig(**text, **own))
    first = text["vocab_size"] - 2
    vision = dict(hidden_size=16, vocab_offset=first, vocab_size=1)
    audio = dict(
        hidden_size=32, conf_num_hidden_layers=1, conf_num_attention_heads=2, vocab_offset=first + 1, vocab_size=1
    )
    config = Gemma3nConfig(text_config={**text, **own}, vision_config=vision, audio_config=audio)
    return Gemma3nForConditionalGeneration(config)


MODELS = {
    "gemma2": lambda text: Gemma2ForCausalLM(Gemma2Config(**text, attn_logit_softcapping=1.0)),
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "gemma3n-towers": lambda text: gemma3n(text, towers=True),
    "llama": lambda text: LlamaForCausalLM(LlamaConfig(**text, tie_word_embeddings=False)),
    "qwen3": lambda text: Qwen3ForCausalLM(Qwen3Config(**text, tie_word_embeddings=True)),
}


def saved_model(name, directory) -> ModelDir:
    pico_tokenizer(directory)
    torch.manual_seed(0)
    MODELS[name](SIZES | {"vocab_size": len(AutoTokenizer.from_pretrained(directory)) + 2}).to(
        torch.bfloat16
    ).save_pretrained(directory)
    return ModelDir(directory)


def kinds(tensors):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.usefixtures("a_tower_without_timm")
@pytest.mark.parametrize("name", MODELS)
def test_it_learns_in_four_bits_and_whole_and_keeps_its_class_and_its_towers(name, tmp_path):
    base, dataset = saved_model(name, tmp_path / "base"), example_dataset(tmp_path / "dataset")
    shutil.copy(dataset / "validation.jsonl", dataset / "test.jsonl")
    architecture = json.loads((base.base / "config.json").read_text())["architectures"][0]
    before = load_file(base.base / "model.safetensors")
    settings = dict(rank=4, learning_rate=1e-2, batch_size=8, micro_batch_size=4, max_steps=8)
    for method in ("qlora", "full"):
        out = tmp_path / method
        out.mkdir()
        report = fine_tune(FineTuneConfig(**settings, method=method), base, dataset, out, Job(tmp_path / f"{method}-w"))
        events = map(json.loads, (tmp_path / f"{method}-w" / "events.jsonl").read_text().splitlines())
        losses = [event["values"]["loss"] for event in events if "grad_norm" in event.get("values", {})]
        assert losses[-1] < losses[0] - 0.1 and report.facts["steps"] == 8
    (tmp_path / "merged").mkdir()
    loose = MergeConfig(max_mean_kl=0.1, min_top1=0)
    merged = merge(loose, ModelDir(base.base, tmp_path / "qlora"), dataset, tmp_path / "merged", Job(tmp_path / "w"))
    assert merged.facts["changed_tensors"] >= 2 * 7 and merged.facts["mean_kl"] > 0
    for directory in (tmp_path / "full", tmp_path / "merged"):
        assert type(load_model(ModelDir(directory), "float32", "cpu")).__name__ == architecture
        after = load_file(directory / "model.safetensors")
        assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
            n: (t.shape, t.dtype) for n, t in before.items()
        }
        frozen = [name for name in before if any(tower in name for tower in TOWERS)]
        assert all(torch.equal(after[name], before[name]) for name in frozen)
        assert bool(frozen) == (name in ("gemma3", "gemma3n-towers"))


@pytest.mark.usefixtures("a_tower_without_timm")
@pytest.mark.parametrize("name", ["gemma3", "gemma3n", "gemma3n-towers"])
@pytest.mark.parametrize("target_modules", ["all-linear", ".*_proj"])
def test_towers_altup_and_head_are_neither_packed_nor_adapted(name, target_modules, tmp_path):
    base = saved_model(name, tmp_path)
    model = trainable_model(TrainingConfig(rank=2, target_modules=target_modules), "qlora", base, "cpu")
    assert type(unwrap(model)).__name__ == type(load_model(base, "float32", "cpu")).__name__
    never = (*TOWERS, "altup", "lm_head")
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for names in (packed, trained):
        assert len(names) >= 2 * 7 and not any(part in name for name in names for part in never)


def test_capped_attention_scores_are_capped(tmp_path):
    """transformers' default attention leaves Gemma 2's cap out without a word."""
    base = saved_model("gemma2", tmp_path)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        model = load_model(base, "float32", "cpu")
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        states = model.state_dict()
        expected = {}
        for kind in ("eager", "sdpa"):
            other = Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=kind).eval()
            other.load_state_dict(states)
            expected[kind] = other(input_ids=ids).logits
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected["eager"])
    assert float((got - expected["sdpa"]).abs().max()) > 0.1
