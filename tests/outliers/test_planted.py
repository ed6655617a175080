"""A model with Gemma 3's outliers planted (gains above 1 600, a stream beyond 65504): what fails and what is said."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.data.chat_template import encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.load import load_model
from tasks.engine.weights.effective import effective_weights
from tasks.engine.weights.rescale import rescaled_weights, write_model
from tasks.gguf import GgufConfig
from tasks.gguf.run import convert
from tasks.outliers import OutlierConfig
from tasks.outliers.activations import LAYER
from tasks.outliers.run import find_outliers
from tests.merge.test_merge import pico_rows
from tests.planted import plant
from tests.rows import write_rows

STUDENT = Path("deployments/quickstart/student")
CONFIG = OutlierConfig(calibration_rows=8, measured_rows=6, sample_values=16_384)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dataset")
    write_rows(directory / "calibration.jsonl", pico_rows(8))
    write_rows(directory / "test.jsonl", pico_rows(6))
    return directory


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(STUDENT, tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="module")
def audit(planted: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage on the quickstart's student base and on the same with the pathology."""
    out = tmp_path_factory.mktemp("audit")
    models = {"base": ModelDir(STUDENT), "planted": ModelDir(planted)}
    find_outliers(CONFIG, models, out, Job(out.with_name("work")), dataset)
    return out


@pytest.fixture(scope="module")
def verdicts(audit: Path) -> dict:
    return json.loads((audit / "verdict.json").read_text())["models"]


def test_planting_raises_gains_and_stream_and_leaves_the_function(audit: Path, verdicts: dict) -> None:
    report = json.loads((audit / "weights.json").read_text())["models"]
    gains = {name: max(t["gain"]["max"] for t in tensors if "gain" in t) for name, tensors in report.items()}
    assert gains["planted"] > 1600 and gains["base"] < 20
    peaks = {
        name: summary["stream_peak"]
        for name, summary in json.loads((audit / "activations.json").read_text())["models"].items()
    }
    assert peaks["planted"] > 65504 and peaks["planted"] == pytest.approx(1024 * peaks["base"], rel=1e-3)
    assert verdicts["planted"]["outcomes"]["rescaled float32"]["mean_kl"] < 1e-8
    assert verdicts["planted"]["inherited"]["base"] == "base" and verdicts["planted"]["inherited"]["amplified"]
    layer = json.loads((audit / "activations.json").read_text())["models"]["planted"]["layers"][3]
    peak = max(layer["middle"]["value"], layer["output"]["value"])
    assert layer["float16_headroom"] == pytest.approx(65504 / peak) and layer["float8_headroom"] < 1e-2


def test_float16_overflows_in_the_layer_that_was_predicted(audit: Path, verdicts: dict, planted: Path) -> None:
    fp16 = verdicts["planted"]["targets"]["fp16"]
    assert (fp16["predicted"], fp16["verdict"]) == ("unsafe", "unsafe")
    assert verdicts["planted"]["outcomes"]["float16"]["not_finite"] > 0
    assert verdicts["base"]["targets"]["fp16"]["verdict"] == "safe"
    layers = json.loads((audit / "activations.json").read_text())["models"]["planted"]["layers"]
    predicted = next(
        layer["layer"] for layer in layers if max(layer["middle"]["value"], layer["output"]["value"]) > 65504
    )
    assert first_not_finite(planted, torch.float16) == predicted > 0
    assert first_not_finite(planted, torch.bfloat16) is None
    assert verdicts["planted"]["outcomes"]["bfloat16"]["mean_kl"] < 1e-2
    assert verdicts["planted"]["targets"]["bf16"]["verdict"] == "safe"


def first_not_finite(model: Path, dtype: torch.dtype) -> int | None:
    """The first layer whose output has a NaN or infinity on the calibration rows' text."""
    loaded = load_model(ModelDir(model), "float32").to(dtype)
    tokenizer = load_tokenizer(ModelDir(model))
    broken: list[int] = []
    for name, module in loaded.named_modules():
        if match := LAYER.search(name):
            number = int(match[1])
            module.register_forward_hook(
                lambda _, __, output, number=number: broken.append(number) if not output.isfinite().all() else None
            )
    for row in pico_rows(8):
        text = tokenizer.apply_chat_template([message.model_dump() for message in row.messages], tokenize=False)
        with torch.inference_mode():
            loaded(torch.tensor([tokenizer(str(text)).input_ids]))
    return min(broken, default=None)


def test_the_rescale_cures_float16_and_clipping_pays_for_it(verdicts: dict) -> None:
    outcomes = verdicts["planted"]["outcomes"]
    assert verdicts["planted"]["rescale"] <= 2**-2
    assert outcomes["rescaled float16"]["not_finite"] == 0
    assert outcomes["rescaled float16"]["mean_kl"] < 1e-4
    assert outcomes["clipped float32"]["mean_kl"] > 100 * outcomes["rescaled float16"]["mean_kl"]


def test_awq_fold_breaks_the_model_where_it_divides_w(verdicts: dict) -> None:
    outcomes = verdicts["planted"]["outcomes"]
    assert outcomes["awq fold (1+w)/s-1"]["mean_kl"] < 1e-6
    assert outcomes["awq fold w/s"]["mean_kl"] > 0.5
    assert "(1 + w)/s - 1" in verdicts["planted"]["targets"]["awq"]["do"][0]


def test_the_other_targets(verdicts: dict) -> None:
    targets = verdicts["planted"]["targets"]
    assert targets["gguf_cpu"]["verdict"] == "safe"
    assert targets["gguf_fp16"]["verdict"] == "risky" and targets["gguf_fp16"]["k"] == verdicts["planted"]["rescale"]
    assert "bfloat16" in targets["gptq"]["do"][0]
    assert verdicts["base"]["targets"]["gptq"]["verdict"] == "safe"


def test_tied_planted_model_breaks_in_bfloat16_by_its_storage(dataset: Path, tmp_path: Path) -> None:
    """The final norm's gains, 1024 times smaller, are stored as gain - 1: bfloat16 rounds them to nothing."""
    tied = plant(STUDENT, tmp_path / "tied", untie=False)
    (tmp_path / "out").mkdir()
    find_outliers(CONFIG, {"tied": ModelDir(tied)}, tmp_path / "out", Job(tmp_path / "work"), dataset)
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())["models"]["tied"]
    assert verdict["targets"]["bf16"]["verdict"] == "unsafe"
    assert "model.norm.weight loses" in verdict["targets"]["bf16"]["because"][0]
    assert (
        verdict["outcomes"]["bfloat16"]["mean_kl"] > 0.1 and verdict["outcomes"]["rescaled float32"]["mean_kl"] < 1e-6
    )


def test_gguf_of_the_planted_model_has_its_function(planted: Path, dataset: Path, audit: Path, tmp_path: Path) -> None:
    """llama.cpp keeps norms and activations in float32; the importance matrix that was written on the way is taken."""
    config, job = GgufConfig(kind="Q6_K", proof_rows=6, min_top1=0.5), Job(tmp_path / "work")
    (tmp_path / "out").mkdir()
    report = convert(
        config=config, model=ModelDir(planted), dataset=dataset, out=tmp_path / "out", job=job, outliers=audit
    )
    assert report.metrics["mean_kl"] < 0.02
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["quantize.imatrix.entries_count"].contents() == 42


def test_channels_and_stream_equal_the_model_s(audit: Path) -> None:
    """The second layer's query input, recomputed from the stream before it; and the stream's peak in every layer."""
    model, tokenizer = load_model(ModelDir(STUDENT), "float32"), load_tokenizer(ModelDir(STUDENT))
    squares, largest, tokens, peaks = torch.zeros(160).double(), torch.zeros(160), 0, [0.0] * 6
    for row in pico_rows(8):
        with torch.no_grad():
            ids = torch.tensor([encode(tokenizer, row).input_ids])
            states = model(ids, output_hidden_states=True).hidden_states
            x = model.model.layers[1].input_layernorm(states[1])[0]
        squares += x.double().square().sum(0)
        largest, tokens = torch.maximum(largest, x.abs().amax(0)), tokens + len(x)
        peaks[:5] = [max(peak, float(state.abs().max())) for peak, state in zip(peaks, states[1:6], strict=False)]
    saved = load_file(audit / "activations-base.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    assert torch.allclose(saved[f"{name}.mean_square"].double(), squares / tokens, rtol=1e-4)
    assert torch.allclose(saved[f"{name}.max"], largest, rtol=1e-4)
    layers = json.loads((audit / "activations.json").read_text())["models"]["base"]["layers"]
    assert [layer["output"]["value"] for layer in layers[:5]] == pytest.approx(peaks[:5], rel=1e-4)
    assert all(0 < layer["sink_mass"] < 1 for layer in layers)


def test_the_remedy_on_disk_is_the_remedy_in_memory(planted: Path, verdicts: dict, tmp_path: Path) -> None:
    k = verdicts["planted"]["rescale"]
    write_model(rescaled_weights(effective_weights(ModelDir(planted)), planted, k), ModelDir(planted), tmp_path)
    assert first_not_finite(tmp_path, torch.float16) is None
