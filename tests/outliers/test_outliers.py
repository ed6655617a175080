"""The audit's numbers against numpy, gguf-py and transformers' norms, and its report on a model with a large gain."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.models.family_registry import family_of
from tasks.engine.models.tensor_names import gain_offset, is_norm, layer_index, name_in_layer
from tasks.engine.runtimes.ggml import round_trip, to_type
from tasks.engine.weights.effective import Weight
from tasks.engine.weights.safetensors_reader import stored_tensors
from tasks.outliers import OutlierConfig
from tasks.outliers.formats import NF4, actual_type, errors
from tasks.outliers.inheritance import bases
from tasks.outliers.run import find_outliers
from tasks.outliers.tensor_statistics import describe, gain, rounding, sample
from tests.engine.weights.test_effective import adapter_of
from tests.pico import pico_model

PLANTED = "model.layers.1.post_feedforward_layernorm.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model with a gain of 1656 in its second layer."""
    directory = pico_model(tmp_path_factory.mktemp("outliers") / "base", layers=3)
    tensors = load_file(directory / "model.safetensors")
    tensors[PLANTED][5] = 1655.0  # stored as gain - 1; bfloat16 rounds it to 1656
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def weight_of(tensor: torch.Tensor, directory: Path) -> Weight:
    save_file({"w": tensor}, directory / "model.safetensors")
    return Weight("w", stored_tensors(directory)["w"], tensor.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_numpys(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(300, 64).mul(0.02).to(dtype)
    tensor[17, 40] = 3.5
    numbers = describe(weight_of(tensor, tmp_path), sigmas=6, sample_values=10**6)
    values = tensor.double().numpy().reshape(-1)
    loose = 4e-3 if dtype == torch.float32 else 1e-9
    centred = values - values.mean()
    assert numbers["mean_abs"] == pytest.approx(np.abs(values).mean(), rel=loose)
    assert numbers["std"] == pytest.approx(values.std(), rel=loose)
    assert numbers["kurtosis"] == pytest.approx((centred**4).mean() / values.var() ** 2, rel=2 * loose)
    assert numbers["p99"] == pytest.approx(np.quantile(np.abs(values), 0.99, method="inverted_cdf"), rel=loose)
    assert numbers["p999"] == pytest.approx(np.quantile(np.abs(values), 0.999, method="inverted_cdf"), rel=loose)
    assert numbers["beyond_sigmas"] == (np.abs(centred) > 6 * values.std()).sum() == 1
    assert numbers["max"] == 3.5
    assert numbers["float16_headroom"] == pytest.approx(65504 / 3.5)
    assert (numbers["worst_row"]["index"], numbers["worst_column"]["index"]) == (17, 40)
    assert numbers["worst_column"]["over_median"] > 20


def test_not_finite_values_are_only_counted(tmp_path: Path) -> None:
    tensor = torch.ones(4, 32)
    tensor[0, 0], tensor[1, 1], tensor[2, 2] = float("nan"), float("inf"), -float("inf")
    numbers = describe(weight_of(tensor, tmp_path), sigmas=6, sample_values=0)
    assert (numbers["nan"], numbers["inf"], numbers["numbers"], numbers["max"]) == (1, 2, 128, 1.0)
    assert numbers["mean"] == 1.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_ggmls_round_trips_are_gguf_pys(scale: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 256) * scale * torch.rand(50, 1).exp()
    rows[3] = 0
    for kind in ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"):
        quant = gguf.GGMLQuantizationType[kind]
        packed = packed_by_ggml(kind, rows)
        back = gguf.quants.dequantize(packed, quant).reshape(rows.shape)  # K-quants it can only read
        assert np.array_equal(round_trip(kind, rows.numpy()), back)
        if kind in ("Q8_0", "Q4_0"):
            assert np.array_equal(packed, gguf.quants.quantize(rows.numpy(), quant).reshape(-1))


def packed_by_ggml(kind: str, rows: torch.Tensor) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return to_type(rows.numpy(), kind).reshape(-1, rows.shape[1] // block * size).reshape(-1)


def test_the_other_formats_by_their_definitions() -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, 128)
    relative = errors(rows)
    assert set(relative) == {"q8_0", "q4_0", "q4_k", "q6_k", "nf4", "int8"}
    steps = rows.abs().amax(1, keepdim=True) / 127
    expected = ((rows / steps).round() * steps - rows).square().mean().sqrt() / rows.square().mean().sqrt()
    assert relative["int8"] == pytest.approx(float(expected), rel=1e-5)
    blocks = rows.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = NF4[(blocks / scale)[..., None].sub(NF4).abs().argmin(-1)] * scale
    expected = (nearest - blocks).square().mean().sqrt() / rows.square().mean().sqrt()
    assert relative["nf4"] == pytest.approx(float(expected), rel=1e-5)
    assert relative["q8_0"] < relative["int8"] < relative["q4_k"] < relative["q4_0"] < 0.1
    assert (
        actual_type("Q4_K", 128) == "Q5_0"
        and actual_type("Q6_K", 640) == "Q8_0"
        and actual_type("Q4_K", 2048) == "Q4_K"
    )
    assert "q4_0" not in errors(torch.randn(64, 40)) and "int8" in errors(torch.randn(64, 40))


def test_importance_weighs_channels() -> None:
    """The error in a channel whose inputs are zero does not count."""
    torch.manual_seed(0)
    rows, importance = torch.randn(64, 128), torch.ones(128)
    rows[:, 0] *= 100
    importance[0] = 0
    back = torch.from_numpy(round_trip("Q4_0", rows.numpy()))
    noise, energy = (back - rows)[:, 1:].square().mean(), rows[:, 1:].square().mean()
    assert errors(rows, importance)["q4_0"] == pytest.approx(float((noise / energy).sqrt()), rel=1e-4)


def test_the_sample_is_spread_over_the_rows(tmp_path: Path) -> None:
    tensor = torch.arange(1000.0).repeat(32, 1).T.contiguous()
    column = sample(weight_of(tensor, tmp_path), 32 * 200)[:, 0]
    assert len(column) == 200 and column[0] == 0 and column[-1] == 999 and column.diff().max() < 120
    assert torch.equal(sample(weight_of(tensor, tmp_path), 10**9), tensor)


@pytest.mark.parametrize(
    ("model_type", "norm"),
    [
        ("gemma", transformers.models.gemma.modeling_gemma.GemmaRMSNorm),
        ("gemma2", transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm),
        ("gemma3_text", transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm),
        ("gemma3n_text", transformers.models.gemma3n.modeling_gemma3n.Gemma3nRMSNorm),
        ("llama", transformers.models.llama.modeling_llama.LlamaRMSNorm),
        ("qwen3", transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm),
        ("qwen3_next", transformers.models.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNorm),
    ],
)
def test_gain_offset_equals_transformers(model_type: str, norm: type[torch.nn.Module]) -> None:
    module = norm(4)
    torch.nn.init.zeros_(module.weight)
    passes = bool(module(torch.ones(1, 4)).abs().max() > 0.5)  # with w = 0 only 1 + w lets anything through
    assert family_of(model_type).gain_offset("model.norm.weight") == float(passes)


def test_norms_by_name_and_gain(base: Path) -> None:
    assert is_norm(PLANTED, (64,)) and not is_norm("model.layers.0.mlp.up_proj.weight", (64, 64))
    assert (layer_index(PLANTED), name_in_layer(PLANTED)) == (1, "post_feedforward_layernorm")
    assert gain_offset(base, PLANTED) and not gain_offset(base, "vision_tower.encoder.layers.0.layer_norm1.weight")
    assert gain(torch.tensor([-3.0, 0.5]), offset=1.0)["max"] == 2.0
    assert gain(torch.tensor([-3.0, 0.5]), offset=0.0)["max"] == 3.0
    assert rounding(torch.tensor([-0.999]), offset=1.0)["bfloat16"] == pytest.approx(1.0, rel=1e-3)  # a gain lost
    assert rounding(torch.tensor([0.001]), offset=0.0)["bfloat16"] < 0.004


def test_report_compares_an_adapter_with_its_base(base: Path, tmp_path: Path) -> None:
    student = ModelDir(base, adapter_of(base, tmp_path / "adapter"))
    out = tmp_path / "out"
    out.mkdir()
    report = find_outliers(OutlierConfig(), {"base": ModelDir(base), "student": student}, out, Job(tmp_path / "work"))
    assert report.metrics["student_largest_gain"] == 1657.0  # 1656 in bfloat16, and Gemma's one
    sentences = "\n".join(report.details["verdict"])
    assert f"student's largest norm gain 1657.0 ({PLANTED}) is its base's (unchanged); norms are vectors" in sentences
    assert "student changed 21 of 41 tensors and inherited 20 from its base" in sentences
    assert "student did not amplify the outliers of its base base: largest norm gain 1657 to 1657 (+0.0%)" in sentences
    assert report.details["table"][0]["tensor"] == PLANTED
    assert set(report.details["table"][0]) == {"model", "tensor", "max", "p999", "mean", "kurtosis"}
    everything = json.loads((out / "weights.json").read_text())["models"]
    assert len(everything["base"]) == len(everything["student"]) == 41
    page = (out / "report" / "outliers.md").read_text()
    assert PLANTED in page and "norms.png" in page
    assert all((out / "report" / f"{name}.png").stat().st_size > 10_000 for name in ("norms", "tensors", "gains"))
    verdicts = json.loads((out / "verdict.json").read_text())
    assert (verdicts["format"], verdicts["focus"]) == (1, "student")
    words = {target: entry["verdict"] for target, entry in verdicts["models"]["student"]["targets"].items()}
    assert words["fp16"] == words["gptq"] == words["int8_activations"] == "unknown"  # no dataset: nothing flowed
    assert words["bf16"] == words["gguf_cpu"] == "safe"
    assert all(row["verdict"] != "unknown" or "give a dataset" in row["because"] for row in report.details["targets"])


def test_report_compares_a_full_fine_tune_with_its_base(base: Path, tmp_path: Path) -> None:
    """A full fine-tune has no adapter: its base is the model named before it with the same tensors."""
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors[PLANTED] *= 2
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tuned / "model.safetensors")
    models = {"base": ModelDir(base), "tuned": ModelDir(tuned)}
    assert bases(models) == {"tuned": ModelDir(base)}
    (tmp_path / "out").mkdir()
    report = find_outliers(OutlierConfig(), models, tmp_path / "out", Job(tmp_path / "work"))
    sentences = "\n".join(report.details["verdict"])
    assert f"tuned's largest norm gain 3313.0 ({PLANTED}) was 1657.0 in its base (+99.9%)" in sentences
    assert "tuned changed 2 of 41 tensors and inherited 39" in sentences
    grown = json.loads((tmp_path / "out" / "verdict.json").read_text())["models"]["tuned"]["inherited"]
    assert grown["amplified"] and grown["ratios"]["largest_gain"] == pytest.approx(3313 / 1657)
    assert "tuned amplified the outliers of its base base: largest norm gain 1657 to 3313 (+99.9%)" in sentences
    assert report.warnings == ["tuned has NaN in 1 tensors (model.layers.0.mlp.up_proj.weight first): do not use it"]


def test_the_command_streams(tmp_path: Path) -> None:
    """A 400 MB tensor is read in far less memory than its size."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    save_file(
        {"model.embed_tokens.weight": torch.zeros(400_000, 512, dtype=torch.bfloat16)}, model / "model.safetensors"
    )
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "tasks.outliers.run", str(tmp_path / "config.json"), "--models", f"it={model}"]
    measure = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    measure += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    empty = [sys.executable, "-c", "import torch, matplotlib.pyplot"]
    peaks = [
        int(subprocess.run([sys.executable, "-c", measure, *run], capture_output=True, text=True, check=True).stdout)
        for run in (empty, [*command, "--out", str(tmp_path / "out")])
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]["it_largest_weight"] == 0
    assert peaks[1] - peaks[0] < 150_000  # kB beyond the imports
