"""The merge stage on a pico Gemma-3: what is written, that it says what the adapter said, and when it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row
from tasks.engine.compare.agreement import Agreement
from tasks.engine.compare.agreement import test_rows as rows_held_out  # pytest collects test_*
from tasks.engine.models.text_only import load_text_model
from tasks.engine.weights.effective import effective_tensors
from tasks.engine.weights.safetensors_reader import stored_tensors
from tasks.gguf import GgufConfig
from tasks.gguf.run import convert
from tasks.merge import MergeConfig
from tasks.merge.run import check_inventory, merge
from tests.engine.weights.test_effective import adapter_of, peft_merge
from tests.gguf.architectures import gemma3n
from tests.pico import pico_model
from tests.rows import write_rows

# A random model's logits lie so close together that rounding to bfloat16 changes the first of them now and then.
LOOSE = {"min_top1": 0.7, "gate_rows": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    directory = tmp_path_factory.mktemp("merge")
    base = pico_model(directory / "base")
    return ModelDir(base, adapter_of(base, directory / "adapter"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    write_rows(directory / "test.jsonl", pico_rows(12))
    return directory


def pico_rows(count: int) -> list[Row]:
    return [
        Row(
            messages=[
                Message(role="user", content=f"Close audit {i} for the north hall."),
                Message(role="assistant", content=f'{{"intent": "close_audit", "entities": {{"audit": "{i}"}}}}'),
            ]
        )
        for i in range(count)
    ]


def test_the_command_merges(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(MergeConfig(**LOOSE).model_dump_json())
    command = [sys.executable, "-m", "tasks.merge.run", str(tmp_path / "config.json"), "--model", str(model)]
    ran = subprocess.run([*command, "--dataset", str(dataset), "--out", str(tmp_path / "out")], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["facts"]["mean_kl"] < 0.01
    assert report["facts"]["changed_tensors"] == 14
    written = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in written
    for name, tensor in effective_tensors(model):
        assert torch.equal(written[name], tensor)
    for name in ["tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"]:
        assert (out / name).read_bytes() == (model.base / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    assert not [file for file in out.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


def test_shards_have_an_index_and_load(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    merge(MergeConfig(shard_bytes=100_000, **LOOSE), model, dataset, tmp_path, Job(tmp_path / "work"))
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 110_000 for shard in shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, tensor in effective_tensors(model):
        assert torch.equal(loaded[name], tensor)


def test_without_an_adapter_it_is_a_copy(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    report = merge(MergeConfig(), ModelDir(model.base), dataset, tmp_path, Job(tmp_path / "work"))
    assert report.warnings
    original = load_file(model.base / "model.safetensors")
    assert all(torch.equal(tensor, original[name]) for name, tensor in effective_tensors(ModelDir(tmp_path)))


def test_out_of_budget_fails_with_the_numbers(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    config = MergeConfig(max_mean_kl=1e-12, min_top1=0.1)
    with pytest.raises(GateFailed, match=r"mean KL \d.*at most 1e-12.*top-1 agreement"):
        merge(config, model, dataset, tmp_path, Job(tmp_path / "work"))


def test_weight_scales_the_adapter_s_change(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    """W + weight (W_adapter - W), as peft runs it; DoRA, which rescales rows, is refused."""
    out = tmp_path / "out"
    out.mkdir()
    report = merge(MergeConfig(weight=0.5, **LOOSE), model, dataset, out, Job(tmp_path / "work"))
    assert report.metrics["mean_kl"] < 0.01
    base, written = load_file(model.base / "model.safetensors"), load_file(out / "model.safetensors")
    assert model.adapter is not None
    exact = peft_merge(model.base, model.adapter)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        original = base[name].float()
        expected = original + 0.5 * (exact[name] - original)
        torch.testing.assert_close(written[name].float(), expected, rtol=2**-7, atol=1e-6)
    dora = ModelDir(model.base, adapter_of(model.base, tmp_path / "dora", use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(BadConfig, match="DoRA adapter: .* cannot be scaled"):
        merge(MergeConfig(weight=0.5), dora, dataset, out, Job(tmp_path / "work"))


def test_a_base_in_four_bits_becomes_a_16_bit_model(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    """Each matrix is what bitsandbytes reads there plus the adapter, rounded once; the rest is as it was."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    assert model.adapter is not None
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = AutoModelForCausalLM.from_pretrained(model.base, quantization_config=nf4, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model.base).save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    four_bit = ModelDir(tmp_path / "base", model.adapter)
    report = merge(MergeConfig(**LOOSE), four_bit, dataset, out, Job(tmp_path / "work"))
    assert report.metrics["mean_kl"] < 0.01  # against bitsandbytes' own layers with peft's adapter
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    written, base = load_file(out / "model.safetensors"), load_file(model.base / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in written.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert torch.equal(written["model.norm.weight"], base["model.norm.weight"])
    merged, original = peft_merge(model.base, model.adapter), base["model.layers.1.mlp.down_proj.weight"].float()
    weight = packed.model.layers[1].mlp.down_proj.weight
    state = weight.quant_state
    state.dtype = torch.float32
    read = bitsandbytes.functional.dequantize_4bit(weight.data, state)
    delta = merged["model.layers.1.mlp.down_proj.weight"] - original
    expected = (read + delta).bfloat16()
    assert (written["model.layers.1.mlp.down_proj.weight"] != expected).float().mean() < 1e-2  # an ulp at a tie


def test_gemma_3n_is_merged_in_full_and_converts_to_gguf(dataset: Path, tmp_path: Path) -> None:
    """The whole checkpoint is merged, towers and per-layer embeddings too; what text makes of it is compared, in the
    gate and in llama.cpp, by the text half alone: the tower's class needs timm and torchvision."""
    base = gemma3n(tmp_path / "base", without=0, ffn=2048)
    text = gemma3n(tmp_path / "text", conditional=False, without=0, ffn=2048)
    adapter = adapter_of(text, tmp_path / "adapter")
    exact = peft_merge(text, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    from safetensors.torch import save_file

    renamed = {
        name.replace(".model.model.", ".model.model.language_model."): tensor for name, tensor in tensors.items()
    }
    save_file(renamed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    out, job = tmp_path / "out", Job(tmp_path / "work")
    out.mkdir()
    report = merge(MergeConfig(**LOOSE | {"min_top1": 0.3}), ModelDir(base, adapter), dataset, out, job)
    assert report.facts["changed_tensors"] == 6 * 7 and 0 < report.facts["mean_kl"] < 0.01
    written, original = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    for name in ("model.language_model.embed_tokens_per_layer.weight", "model.vision_tower.stem.weight"):
        assert torch.equal(written[name], original[name])
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Gemma3nForConditionalGeneration"]
    for name in ("layers.3.self_attn.q_proj", "layers.5.mlp.down_proj"):
        tensor = written[f"model.language_model.{name}.weight"]
        torch.testing.assert_close(tensor.float(), exact[f"model.{name}.weight"], rtol=2**-7, atol=1e-6)
    unmerged = load_text_model(ModelDir(base, adapter), "float32")  # the gate saw the adapter, not only the base
    ids = torch.tensor([[2, *range(5, 40)]])
    with torch.inference_mode():
        changed = (unmerged(ids).logits - load_text_model(ModelDir(base), "float32")(ids).logits).abs().max()
    assert changed > 0.1
    (tmp_path / "gguf").mkdir()
    config = GgufConfig(kind="F32", proof_rows=4, min_top1=0.9)
    report = convert(config, ModelDir(out), tmp_path / "gguf", job, dataset)
    assert report.metrics["mean_kl"] < 1e-4 and report.metrics["not_finite"] == 0
    assert "per_layer_token_embd.weight" in {row["name"] for row in report.details["tensors"]}
    save_file(renamed | {"base_model.model.model.vision_tower.x.lora_A.weight": torch.ones(1, 1)},
              adapter / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(BadConfig, match="85 tensors, of which 84 belong to the text model"):
        load_text_model(ModelDir(base, adapter))


@pytest.mark.parametrize("remedy", ["rescale", "clip"])
def test_a_remedy_is_applied_and_its_cost_measured(remedy: str, model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    """The rescale leaves the function alone; clipping the norms at their median does not, and the gate says so."""
    config = MergeConfig(remedy=remedy, clip_percentile=51, **LOOSE)
    if remedy == "clip":
        base = tmp_path / "base"
        shutil.copytree(model.base, base)
        tensors = load_file(base / "model.safetensors")
        noise = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if tensor.dim() == 1:
                tensors[name] = (3 * torch.randn(tensor.shape, generator=noise)).bfloat16()
        from safetensors.torch import save_file

        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(GateFailed, match=r"mean KL \d"):
            merge(config, ModelDir(base, model.adapter), dataset, tmp_path, Job(tmp_path / "work"))
        return
    report = merge(config, model, dataset, tmp_path, Job(tmp_path / "work"))
    assert report.metrics["mean_kl"] < 0.01
    plain = dict(effective_tensors(model))["model.embed_tokens.weight"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"], plain / 32)


def test_inventory_names_a_missing_or_recast_tensor(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(model.base / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(GateFailed, match=r"lacks \['model.norm.weight'\]"):
        check_inventory(model.base, tmp_path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, tmp_path / "model.safetensors")
    with pytest.raises(GateFailed, match="model.norm.weight was torch.bfloat16"):
        check_inventory(model.base, tmp_path)
    save_file(tensors | {"lm_head.weight": tensors["model.norm.weight"].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(GateFailed, match="lm_head.weight"):
        check_inventory(model.base, tmp_path)
    assert stored_tensors(model.base).keys() == tensors.keys()


def test_agreement_is_the_textbook_kl() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]), torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1]])
    agreement = Agreement()
    agreement.add(p.log(), q.log() + 3)  # logits are known up to a constant
    expected = (p * (p / q).log()).sum() / 2
    assert agreement.mean_kl == pytest.approx(float(expected), rel=1e-5)
    assert agreement.top1 == 0.5
    agreement.add(p[:1].log(), torch.tensor([[float("nan"), 1.0, 1.0]]))
    with pytest.raises(GateFailed, match="1 tokens with NaN"):
        agreement.require("it", max_mean_kl=9, min_top1=0)


def test_held_out_rows_are_spread(dataset: Path) -> None:
    rows = list(rows_held_out(dataset, 4))
    assert [row.messages[0].content.split()[2] for row in rows] == ["0", "3", "6", "9"]
    assert len(rows_held_out(dataset, 100)) == 12
