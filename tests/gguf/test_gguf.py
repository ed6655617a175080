"""The GGUF stage with llama.cpp's real converter, quantizer and runtime, on pico Gemma-3 models.

Six layers: llama.cpp takes every sixth Gemma-3 layer for a global one, and aborts on a model that has none.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.runtimes.llama_logits import LlamaInput, llama_logits
from tasks.gguf import GgufConfig
from tasks.gguf.conversion_plan import make_plan
from tasks.gguf.convert import open_conversion
from tasks.gguf.kind_choice import candidate_plans
from tasks.gguf.metadata import read_provenance
from tasks.gguf.proof import Proof
from tasks.gguf.run import _check_written, convert
from tests.gguf.architectures import gemma3_float32
from tests.gguf.conftest import LOOSE


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def test_bf16_is_the_model(bf16: Path) -> None:
    report = json.loads((bf16 / "report.json").read_text())
    assert report["facts"]["mean_kl"] < 1e-4
    assert report["facts"]["bytes"] == (bf16 / "model.gguf").stat().st_size
    assert report["details"]["proof"]["prompts"] == 4  # llama.cpp's chat template makes the same prompts
    assert "<start_of_turn>model" in (bf16 / "Modelfile").read_text()
    assert "--jinja --ctx-size 2048" in (bf16 / "serve.sh").read_text()
    assert "On 4 held-out rows llama.cpp" in (bf16 / "README.md").read_text()
    tensor_types = types(bf16 / "model.gguf")
    assert tensor_types["blk.0.ffn_up.weight"] == "BF16"
    assert tensor_types["blk.0.attn_norm.weight"] == "F32"
    special = gguf.GGUFReader(bf16 / "model.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert special[4] == gguf.TokenType.USER_DEFINED  # <start_of_turn>, which transformers 5 leaves out of its config


def test_metadata_has_the_provenance(bf16: Path) -> None:
    origin = read_provenance(bf16 / "model.gguf")
    assert json.loads(origin["stillhouse.config"])["kind"] == "BF16"
    assert json.loads(origin["stillhouse.dataset"])["inputs"]["files"]["name"] == 64 * "a"  # the whole lineage
    assert "transformers" in json.loads(origin["stillhouse.libraries"])
    assert "stillhouse.commit" in origin


def test_quantized_as_planned(narrow: Path, dataset: Path, tmp_path: Path) -> None:
    """Rows of 64 and 128 values: Q4_K becomes Q5_0, Q6_K becomes Q8_0, as the plan and its page say."""
    job, out = Job(tmp_path / "work"), tmp_path / "out"
    out.mkdir()
    config = GgufConfig(kind="Q4_K_M", name="another name", **LOOSE)
    report = convert(config, ModelDir(narrow), out, job, dataset)
    assert report.metrics["mean_kl"] < 0.05
    assert not report.warnings
    tensor_types = types(out / "model.gguf")
    assert {tensor_types["blk.0.attn_q.weight"], tensor_types["token_embd.weight"]} == {"Q5_0", "Q8_0"}
    assert report.facts["fell_back"] == 6 * 7
    assert "42 tensors fall back (Q4_K becomes Q5_0, Q6_K becomes Q8_0)" in report.details["plan"]
    assert "42 tensors fall back" in (job.work / "events.jsonl").read_text()
    page = (out / "report" / "plan.md").read_text()
    assert r"| blk.\*.attn_v.weight | 2, 5 | 64 x 32 | BF16 | Q6_K | **Q8_0** | 2176 |" in page
    assert f"| Q4_K_M | 0.2 | {(out / 'model.gguf').stat().st_size // 10**5}" in page  # and every other kind
    assert json.loads(read_provenance(out / "model.gguf")["stillhouse.config"])["kind"] == "Q4_K_M"
    reader = gguf.GGUFReader(out / "model.gguf")
    assert reader.fields["general.name"].contents() == "another name"
    rows = json.loads((out / "report" / "plan.json").read_text())
    assert {row["name"]: row["type"] for row in rows["tensors"]} == tensor_types
    assert rows["bytes"] == (out / "model.gguf").stat().st_size


def test_a_float32_model_on_the_grid_is_unchanged_bit_for_bit(dataset: Path, tmp_path: Path) -> None:
    """Weights that Q4_0 (and, in the embedding, Q8_0) has exactly are the same after conversion, to the last bit."""
    from safetensors.torch import load_file, save_file

    from tasks.engine.runtimes.ggml_blocks import dequantize, quantize

    model = gemma3_float32(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = dequantize(*quantize(tensor, "Q8_0" if "embed" in name else "Q4_0"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    config = GgufConfig(kind="Q4_0", max_mean_kl=1e-4, **LOOSE)
    convert(config, ModelDir(model), out, Job(tmp_path / "work"), dataset)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    for name, module in (("token_embd", "embed_tokens"), ("blk.3.ffn_down", "layers.3.mlp.down_proj")):
        values = gguf.dequantize(read[f"{name}.weight"].data, read[f"{name}.weight"].tensor_type)
        np.testing.assert_array_equal(values, tensors[f"model.{module}.weight"].numpy())
    norm = read["blk.3.attn_norm.weight"].data
    np.testing.assert_array_equal(norm, tensors["model.layers.3.input_layernorm.weight"].numpy() + np.float32(1))


def test_budgets_choose_the_kind(bf16: Path, tmp_path: Path) -> None:
    """A size that is kept before anything is written; the best kind for a size, and an order of trial for a quality."""
    sizes = GgufConfig(kind="auto", budget_mb=0.24, max_mean_kl=None)
    quality = GgufConfig(kind="auto", max_mean_kl=0.0002, min_top1=0.3)
    with open_conversion(bf16 / "model.gguf", "pico", Job(tmp_path / "work")) as conversion:
        with pytest.raises(BadConfig, match=r"no file fits budget_mb=0.01: Q8_0 would have 0\.\d MB"):
            candidate_plans(GgufConfig(kind="Q8_0", budget_mb=0.01), conversion.layout, {}, None)
        (best,) = candidate_plans(sizes, conversion.layout, {}, None)
        assert best.kind == "Q5_K_M"  # Q6_K and Q8_0 have 0.28 MB
        assert best.bytes <= 240_000
        order = candidate_plans(quality, conversion.layout, {}, None)
        assert [plan.bytes for plan in order] == sorted(plan.bytes for plan in order)
    with pytest.raises(ValueError, match="auto needs a budget"):
        GgufConfig(kind="auto")


def test_auto_chooses_the_smallest_file_of_sufficient_quality(narrow: Path, tmp_path: Path) -> None:
    """Kinds are written and proven from the smallest up; single tensors and the embedding are what the config says."""
    config = GgufConfig(
        kind="auto", max_mean_kl=0.0004, min_top1=0.3, embedding_type="Q8_0",
        overrides={r"blk\.0\..*ffn": "Q5_1", "blk.2.attn_v": "Q6_K"},
    )  # fmt: skip
    report = convert(config, ModelDir(narrow), tmp_path, Job(tmp_path / "work"))
    assert report.metrics["mean_kl"] <= 0.0004
    assert report.facts["format"] not in ("Q3_K_S", "BF16")
    assert "next is" in (tmp_path / "work" / "events.jsonl").read_text()  # smaller ones were tried and proven worse
    tensor_types = types(tmp_path / "model.gguf")
    assert (tensor_types["token_embd.weight"], tensor_types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q5_1")
    assert tensor_types["blk.2.attn_v.weight"] == "Q8_0"  # 64 is no multiple of 256
    assert any("built-in texts" in warning for warning in report.warnings)  # no dataset was given


def broken_copy(bf16: Path, directory: Path) -> tuple[Path, gguf.GGUFReader]:
    file = Path(shutil.copy(bf16 / "model.gguf", directory))
    return file, gguf.GGUFReader(file, "r+")


def test_a_file_that_is_not_as_planned_does_not_pass(bf16: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with open_conversion(bf16 / "model.gguf", "pico", Job(tmp_path)) as conversion:
        plan, other = (make_plan(conversion.layout, conversion.layout.options(kind)) for kind in ("Q8_0", "Q4_0"))
        conversion.write(plan, file)
    _check_written(plan, file)
    with pytest.raises(GateFailed, match="types are not the plan's"):
        _check_written(other, file)
    file.write_bytes(file.read_bytes()[:-32])
    with pytest.raises(GateFailed, match=f"has {plan.bytes - 32} bytes, planned were {plan.bytes}"):
        _check_written(plan, file)


def test_a_broken_file_does_not_pass(narrow: Path, bf16: Path, dataset: Path, tmp_path: Path) -> None:
    broken, reader = broken_copy(bf16, tmp_path)
    proof = Proof(GgufConfig(kind="BF16", proof_rows=2), narrow, dataset, Job(tmp_path / "work"))
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    tensor.data[:] = np.roll(tensor.data, 1, axis=0)
    reader.data.flush()
    with pytest.raises(GateFailed, match=r"BF16 GGUF does not agree .* mean KL \d"):
        proof(broken).require("the BF16 GGUF", 0.01, 0.01)
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[:] = np.nan
    reader.data.flush()
    with pytest.raises(GateFailed, match=r"[1-9]\d* tokens with NaN"):
        proof(broken).require("the BF16 GGUF", 0.01, 0.01)
    broken.write_bytes(broken.read_bytes()[:-5000])
    with pytest.raises(GateFailed, match=r"could not run model.gguf: .*"):
        proof(broken)


def test_other_token_ids_do_not_pass(narrow: Path, bf16: Path, dataset: Path, tmp_path: Path) -> None:
    proof = Proof(GgufConfig(kind="BF16", proof_rows=2), narrow, dataset, Job(tmp_path / "work"))
    broken, reader = broken_copy(bf16, tmp_path)
    field = reader.fields["tokenizer.ggml.token_type"]
    field.parts[field.data[4]][0] = gguf.TokenType.NORMAL  # <start_of_turn> as plain text
    reader.data.flush()
    with pytest.raises(GateFailed, match=r"tokenizes 2 of 2 conversations otherwise .* at token 1"):
        proof(broken)
    broken, reader = broken_copy(bf16, tmp_path)
    template = reader.fields["tokenizer.chat_template"]
    text = template.parts[template.data[0]]
    text[:] = np.frombuffer(bytes(text).replace(b"<end_of_turn>\n", b"<end_of_turn> "), np.uint8)
    reader.data.flush()
    with pytest.raises(GateFailed, match=r"chat template makes another prompt of row 0 .* at token \d"):
        proof(broken)


def test_inputs_that_do_not_fit(narrow: Path, dataset: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "work")
    with pytest.raises(BadConfig, match="run the merge stage first"):
        convert(GgufConfig(), ModelDir(narrow, narrow), tmp_path, job, dataset)
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with (
        pytest.raises(BadConfig, match=r"could not be converted: .* is no GGUF"),
        open_conversion(tmp_path / "model.gguf", "pico", job),
    ):
        pass
    unknown = shutil.copytree(narrow, tmp_path / "unknown")
    config = json.loads((narrow / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(BadConfig, match=r"NoSuchForCausalLM"), open_conversion(unknown, "pico", job):
        pass


def test_logits_are_read_per_row(bf16: Path, tmp_path: Path) -> None:
    """The same ids give the same logits whatever row came before: nothing is left in llama.cpp's cache."""
    rows = [LlamaInput("Close audit", [2, 9, 300, 301], 2), LlamaInput("", [2, 77], 1)]
    first, second, repeated = llama_logits(bf16 / "model.gguf", [*rows, rows[0]], tmp_path / "log")
    assert first.logits.shape == (2, 401)
    assert second.logits.shape == (1, 401)
    np.testing.assert_array_equal(first.logits, repeated.logits)
