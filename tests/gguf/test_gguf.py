"""The GGUF stage with llama.cpp's real converter, quantizer and runtime, on pico Gemma-3 models.

Six layers: llama.cpp takes every sixth Gemma-3 layer for a global one, and aborts on a model that has none.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import write_rows
from tasks.engine.llama import LlamaInput, llama_logits, silenced
from tasks.gguf import GgufConfig
from tasks.gguf.hf import convert_hf
from tasks.gguf.metadata import read_origin
from tasks.gguf.proof import prove
from tasks.gguf.quantize import plan, sentence
from tasks.gguf.run import convert
from tests.merge.test_merge import pico_rows
from tests.pico import pico_model

# A random model's logits lie close together: quantization moves which comes first, so only the KL is held tightly.
LOOSE = {"min_top1": 0.3, "proof_rows": 4}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    write_rows(directory / "test.jsonl", pico_rows(8))
    (directory / "provenance.json").write_text('{"commit": "abc", "inputs": {"files": {"name": "' + 64 * "a" + '"}}}')
    return directory


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model(tmp_path_factory.mktemp("gguf") / "narrow", hidden=64, layers=6)


@pytest.fixture(scope="module")
def bf16(narrow: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's command with kind BF16: a GGUF that the other kinds are quantized from."""
    directory = tmp_path_factory.mktemp("bf16")
    (directory / "config.json").write_text(GgufConfig(kind="BF16", **LOOSE).model_dump_json())
    command = [sys.executable, "-m", "tasks.gguf.run", str(directory / "config.json"), "--model", str(narrow)]
    ran = subprocess.run([*command, "--dataset", str(dataset), "--out", str(directory / "out")], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"llama" not in ran.stdout + ran.stderr  # its messages are in the log, not on the terminal
    return directory / "out"


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def test_bf16_is_the_model(bf16: Path) -> None:
    report = json.loads((bf16 / "report.json").read_text())
    assert report["facts"]["mean_kl"] < 1e-4
    assert report["facts"]["bytes"] == (bf16 / "model.gguf").stat().st_size
    found = types(bf16 / "model.gguf")
    assert found["blk.0.ffn_up.weight"] == "BF16"
    assert found["blk.0.attn_norm.weight"] == "F32"
    special = gguf.GGUFReader(bf16 / "model.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert special[4] == gguf.TokenType.USER_DEFINED  # <start_of_turn>, which transformers 5 leaves out of its config


def test_metadata_says_where_it_came_from(bf16: Path) -> None:
    origin = read_origin(bf16 / "model.gguf")
    assert json.loads(origin["stillhouse.config"])["kind"] == "BF16"
    assert json.loads(origin["stillhouse.dataset"])["inputs"]["files"]["name"] == 64 * "a"  # the whole lineage
    assert "transformers" in json.loads(origin["stillhouse.libraries"])
    assert "stillhouse.commit" in origin


@pytest.mark.parametrize(("kind", "max_kl"), [("Q8_0", 0.001), ("Q4_K_M", 0.05), ("Q4_0", 0.05)])
def test_quantized_from_the_bf16(
    kind: str, max_kl: float, narrow: Path, bf16: Path, dataset: Path, tmp_path: Path
) -> None:
    job, out = Job(tmp_path / "work"), tmp_path / "out"
    out.mkdir()
    config = GgufConfig(kind=kind, **LOOSE)
    report = convert(config, ModelDir(narrow), dataset, out, job, source=bf16)
    assert report.metrics["mean_kl"] < max_kl
    assert not report.warnings  # planned is what was found
    found = types(out / "model.gguf")
    if kind == "Q4_K_M":  # rows of 64 and 128: q4_K becomes q5_0, q6_K becomes q8_0
        assert {found["blk.0.attn_q.weight"], found["token_embd.weight"]} == {"Q5_0", "Q8_0"}
        assert report.facts["fell_back"] == 6 * 7 + 1
        assert "43 tensors fall back: their rows (64, 128 values)" in report.details["plan"]
        assert "43 tensors fall back" in (job.work / "events.jsonl").read_text()
    else:
        assert found["blk.0.attn_q.weight"] == kind
        assert report.facts["fell_back"] == 0
    assert json.loads(read_origin(out / "model.gguf")["stillhouse.config"])["kind"] == kind
    rows = json.loads((out / "report" / "plan.json").read_text())["tensors"]
    assert {row["name"]: row["found"] for row in rows} == found
    assert all(row["planned"] == row["found"] for row in rows)


def test_rows_of_256_keep_the_k_quants(dataset: Path, tmp_path: Path) -> None:
    model = pico_model(
        tmp_path / "wide", hidden=256, layers=6, intermediate_size=256, head_dim=128, query_pre_attn_scalar=128
    )
    out = tmp_path / "out"
    out.mkdir()
    report = convert(GgufConfig(kind="Q4_K_M", **LOOSE), ModelDir(model), dataset, out, Job(tmp_path / "work"))
    assert report.facts["fell_back"] == 0
    assert set(report.details["types"]) == {"F32", "Q4_K", "Q6_K"}
    assert not report.warnings
    assert report.metrics["mean_kl"] < 0.2


def test_a_broken_file_does_not_pass(narrow: Path, bf16: Path, dataset: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copy(bf16 / "model.gguf", tmp_path))
    config = GgufConfig(kind="BF16", min_top1=0.01, proof_rows=2)
    reader = gguf.GGUFReader(broken, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    tensor.data[:] = np.roll(tensor.data, 1, axis=0)
    reader.data.flush()
    with pytest.raises(GateFailed, match=r"BF16 GGUF does not agree .* mean KL \d"):
        prove(config, broken, narrow, dataset, Job(tmp_path / "work"))
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[:] = np.nan
    reader.data.flush()
    with pytest.raises(GateFailed, match=r"[1-9]\d* tokens with NaN"):
        prove(config, broken, narrow, dataset, Job(tmp_path / "work"))
    broken.write_bytes(broken.read_bytes()[:-5000])
    with pytest.raises(GateFailed, match=r"could not run model.gguf: .*"):
        prove(config, broken, narrow, dataset, Job(tmp_path / "work"))


def test_other_token_ids_do_not_pass(narrow: Path, bf16: Path, dataset: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copy(bf16 / "model.gguf", tmp_path))
    reader = gguf.GGUFReader(broken, "r+")
    field = reader.fields["tokenizer.ggml.token_type"]
    field.parts[field.data[4]][0] = gguf.TokenType.NORMAL  # <start_of_turn> as plain text
    reader.data.flush()
    with pytest.raises(GateFailed, match=r"tokenizes 2 of 2 conversations otherwise .* at token 1"):
        prove(GgufConfig(kind="BF16", proof_rows=2), broken, narrow, dataset, Job(tmp_path / "work"))


def test_the_converter_says_why_it_refuses(narrow: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(narrow, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(BadConfig, match=r"refused .*NoSuchForCausalLM"):
        convert_hf(model, "BF16", "pico", tmp_path / "x.gguf", Job(tmp_path / "work"))


def test_inputs_that_do_not_fit(narrow: Path, dataset: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "work")
    with pytest.raises(BadConfig, match="run the merge stage first"):
        convert(GgufConfig(), ModelDir(narrow, narrow), dataset, tmp_path, job)
    with pytest.raises(BadConfig, match=r"holds no model.gguf"):
        convert(GgufConfig(), ModelDir(narrow), dataset, tmp_path, job, source=tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(BadConfig, match=r"could not quantize model.gguf to Q8_0: .+"):
        convert(GgufConfig(), ModelDir(narrow), dataset, tmp_path, job, source=tmp_path)


def test_the_plan_writes_nothing(bf16: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "work")
    planned = plan(bf16 / "model.gguf", "Q6_K", job)
    assert {tensor.target for tensor in planned} == {"F32", "Q8_0"}
    assert sentence(planned, "Q6_K").startswith("Q6_K: 37 F32, 43 Q8_0; 43 tensors fall back")
    assert not list(job.work.glob("*.gguf"))


def test_logits_are_read_per_row(bf16: Path, tmp_path: Path) -> None:
    """The same ids give the same logits whatever row came before: nothing is left in llama.cpp's cache."""
    rows = [LlamaInput("Close audit", [2, 9, 300, 301], 2), LlamaInput("", [2, 77], 1)]
    first, second, again = llama_logits(bf16 / "model.gguf", [*rows, rows[0]], tmp_path / "log")
    assert first.logits.shape == (2, 401)
    assert second.logits.shape == (1, 401)
    np.testing.assert_array_equal(first.logits, again.logits)


def test_silenced_catches_what_c_prints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with silenced(tmp_path / "log"):
        subprocess.run(["echo", "from below"], check=True)
    subprocess.run(["echo", "afterwards"], check=True)
    assert (tmp_path / "log").read_text() == "from below\n"
    assert capfd.readouterr().out == "afterwards\n"
