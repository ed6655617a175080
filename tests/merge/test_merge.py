"""The merge stage on a pico Gemma-3: what is written, that it says what the adapter said, and when it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import Message, Row, write_rows
from tasks.engine.agreement import Agreement, held_out
from tasks.engine.stored import stored_tensors
from tasks.engine.weights import stream
from tasks.merge import MergeConfig
from tasks.merge.run import check_inventory, merge
from tests.engine.test_weights import adapter_of
from tests.pico import pico_model

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
    for name, tensor in stream(model):
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
    for name, tensor in stream(model):
        assert torch.equal(loaded[name], tensor)


def test_without_an_adapter_it_is_a_copy(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    report = merge(MergeConfig(), ModelDir(model.base), dataset, tmp_path, Job(tmp_path / "work"))
    assert report.warnings
    original = load_file(model.base / "model.safetensors")
    assert all(torch.equal(tensor, original[name]) for name, tensor in stream(ModelDir(tmp_path)))


def test_out_of_budget_fails_with_the_numbers(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
    config = MergeConfig(max_mean_kl=1e-12, min_top1=0.1)
    with pytest.raises(GateFailed, match=r"mean KL \d.*at most 1e-12.*top-1 agreement"):
        merge(config, model, dataset, tmp_path, Job(tmp_path / "work"))


def test_a_missing_or_recast_tensor_is_found(model: ModelDir, dataset: Path, tmp_path: Path) -> None:
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
        agreement.gate("it", max_mean_kl=9, min_top1=0)


def test_held_out_rows_are_spread(dataset: Path) -> None:
    rows = list(held_out(dataset, 4))
    assert [row.messages[0].content.split()[2] for row in rows] == ["0", "3", "6", "9"]
    assert len(held_out(dataset, 100)) == 12
