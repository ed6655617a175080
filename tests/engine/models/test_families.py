"""Families of models: one object decides loading, norms, the memory plan and much else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tasks.core.cache import _imported_sources
from tasks.core.config import StageConfig
from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.distill.teacher_cache import TeacherCacheConfig
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.memory.model_sizes import sizes_of
from tasks.engine.models import families, family_registry
from tasks.engine.models.dtypes import training_precision
from tasks.engine.models.family import GENERIC, PRE_NORM_WRITERS, ChatTemplate, Family
from tasks.engine.models.float16 import keep_residual_in_float32
from tasks.engine.models.load import load_model
from tasks.engine.models.tensor_names import gain_offset
from tasks.engine.models.trainable import trainable_model
from tasks.engine.runtimes.ggml_names import tensor_names
from tasks.engine.training.throughput import token_cost
from tasks.engine.weights.rescale import rescaling_factors
from tasks.ingest import IngestConfig
from tests.pico import pico_tokenizer

NORM = "model.layers.0.input_layernorm.weight"
DUMMY = Family(
    name="dummy",
    model_types=("dummy",),
    norms_are_gain_minus_1=True,
    residual_writers=PRE_NORM_WRITERS,
    towers=("layers.1.self_attn",),
    never_adapted=("v_proj",),
    never_4bit=("lm_head", "k_proj"),
    trains_in_float16=False,
    logit_softcap="cap_on_logits",
    score_softcap="cap_on_scores",
    chat_template=ChatTemplate("dummy", "<start_of_turn>", "{{ messages[0]['content'] }}"),
    residual_streams="streams",
    per_layer_width="layer_width",
    gate_sparsity="sparsity",
    handwritten_layers=True,
    gguf_architectures={"dummy": "llama"},
    gguf_global_layer_period=2,
    gguf_fixed_settings={"layer_width": 256},
)


class DummyConfig(LlamaConfig):
    """Llama under a name that no family lists."""

    model_type = "dummy"


class DummyForCausalLM(LlamaForCausalLM):
    """Its model."""

    config_class = DummyConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    """A pico Llama of the model type `dummy`."""
    AutoConfig.register("dummy", DummyConfig, exist_ok=True)
    AutoModelForCausalLM.register(DummyConfig, DummyForCausalLM, exist_ok=True)
    directory = pico_tokenizer(tmp_path_factory.mktemp("dummy"))
    config = DummyConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, cap_on_logits=7.0, cap_on_scores=9.0, streams=3, layer_width=64, sparsity=[0.5, 0.0],
        layer_types=["full_attention", "full_attention"], tie_word_embeddings=True,
    )  # fmt: skip
    DummyForCausalLM(config).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text()) | {"architectures": None}
    (directory / "config.json").write_text(json.dumps(settings))
    return ModelDir(directory)


@pytest.fixture
def dummy(base: ModelDir, monkeypatch: pytest.MonkeyPatch) -> ModelDir:
    """The same model, with its family in the table."""
    monkeypatch.setattr(family_registry, "FAMILIES", [*family_registry.FAMILIES, DUMMY])
    return base


def four_bit_modules(model: torch.nn.Module) -> set[str]:
    """Last names of modules in 4 bits, those of layer 1's attention with its number."""
    names = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    return {name.rpartition(".")[2] for name in names} | {"layer 1" for name in names if "layers.1.self_attn" in name}


def test_a_model_of_no_family_is_generic(base: ModelDir) -> None:
    assert family_registry.family_of("dummy") is family_registry.family_in(base.base) is GENERIC
    assert gain_offset(base.base, NORM) == 0.0
    model = load_model(base, "float32", "cpu", four_bit=True)
    assert four_bit_modules(model) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "layer 1"
    }  # fmt: skip
    keep_residual_in_float32(model)
    with pytest.raises(BadConfig, match="write into the residual stream is not known, only of gemma, gemma2"):
        rescaling_factors([NORM], base.base, 0.5)


def test_one_object_decides_loading_norms_and_training(dummy: ModelDir) -> None:
    assert gain_offset(dummy.base, NORM) == 1.0 and gain_offset(dummy.base, "vision_tower.norm.weight") == 0.0
    model = load_model(dummy, "float32", "cpu", four_bit=True)
    assert four_bit_modules(model) == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert model.config._attn_implementation == "eager"
    adapted = trainable_model(TrainingConfig(rank=2), "lora", dummy, "cpu")
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trained and not any("v_proj" in name or "layers.1.self_attn" in name for name in trained)
    full = trainable_model(TrainingConfig(), "full", dummy, "cpu")
    assert not any(p.requires_grad for name, p in full.named_parameters() if "layers.1.self_attn" in name)
    with pytest.raises(BadConfig, match="set precision=float32"):
        keep_residual_in_float32(model)


def test_one_object_decides_precision_memory_and_cost(dummy: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert training_precision("auto", dummy.base, "cuda") == "float32"
    sizes = sizes_of(dummy, TrainingConfig(rank=2), "qlora")
    assert (sizes.streams, sizes.per_layer, sizes.sparse_layers, sizes.handwritten) == (3, 64, 1, True)
    attention, mlp = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 64
    assert sizes.quantizable == 2 * mlp + attention - 16 * 32  # of layer 0's attention all but k_proj
    assert token_cost(load_model(dummy, "float32", "cpu")).layers == 6 * (2 * mlp + attention)
    monkeypatch.setattr(family_registry, "FAMILIES", family_registry.FAMILIES[:-1])
    assert token_cost(load_model(dummy, "float32", "cpu")).layers == 6 * 2 * (mlp + attention)


def test_one_object_decides_template_rescale_and_gguf(dummy: ModelDir) -> None:
    assert load_tokenizer(dummy, "dummy").chat_template == "{{ messages[0]['content'] }}"
    with pytest.raises(BadConfig, match="chat_template='other' is none of model, gemma, dummy"):
        load_tokenizer(dummy, "other")
    names = ["model.layers.0.self_attn.o_proj.weight", NORM, "model.embed_tokens.weight"]
    assert set(rescaling_factors(names, dummy.base, 0.5)) == {names[0], names[2]}
    assert tensor_names(["model.layers.0.self_attn.q_proj"], "dummy", 2) == {
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q.weight"
    }
    assert DUMMY.unlike_llama_cpp(DummyConfig(layer_width=64, layer_types=["full_attention"] * 2)) == [
        "layer_width=64, which llama.cpp takes as 256",
        "layer_types, of which llama.cpp takes every 2nd as full_attention",
    ]


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from tasks.engine.models.family import Family\nFAMILY = Family(name='new', model_types=({kind!r},))\n"
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    (tmp_path / "new_family.py").write_text(text.format(kind="new"))
    assert [family.name for family in family_registry.discover(families) if "new" in family.model_types] == ["new"]
    (tmp_path / "second_llama.py").write_text(text.format(kind="llama"))
    with pytest.raises(ValueError, match="two families list one model type: .*llama, llama"):
        family_registry.discover(families)


def test_a_family_s_code_is_part_of_cache_keys() -> None:
    assert "tasks.engine.models.families.gemma3n" in _imported_sources("tasks.teacher.run")


@pytest.mark.parametrize("config", [TrainingConfig, IngestConfig, TeacherCacheConfig])
def test_configs_offer_the_families_chat_templates(config: type[StageConfig]) -> None:
    names = {family.chat_template.name for family in family_registry.FAMILIES if family.chat_template}
    assert set(get_args(config.model_fields["chat_template"].annotation)) == {"model", *names}


def test_families_need_no_torch() -> None:
    code = (
        "import sys; from tasks.engine.models.family_registry import family_of; "
        "assert family_of('gemma3').gguf_global_layer_period == 6; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
