"""Activation half of the audit: runs a model on calibration rows, summarizes it, and tries it on held-out rows."""

from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import read_rows
from tasks.engine.compare.agreement import test_rows
from tasks.engine.data.chat_template import encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.text_only import load_text_model
from tasks.outliers import OutlierConfig
from tasks.outliers.activation_statistics import ActivationStatistics, ChannelStatistics, LayerStatistics, Peak
from tasks.outliers.activations import observe
from tasks.outliers.imatrix import write_imatrix
from tasks.outliers.peaks import FLOAT8_MAX, FLOAT16_MAX, rescale_factor
from tasks.outliers.simulate import Outcome, simulate

Numbers = dict[str, Any]


class ModelActivations(NamedTuple):
    """A model's activations as JSON and as tensors, and the outcomes of trials on held-out rows by name."""

    summary: Numbers
    statistics: ActivationStatistics
    trials: dict[str, Outcome]


def observe_model(
    config: OutlierConfig, name: str, model: ModelDir, dataset: Path, out: Path, focus: bool, job: Job
) -> ModelActivations:
    """Runs one model over the rows, an adapter merged in memory; for the focus writes `imatrix.gguf`."""
    with_trials = config.measure == "all" or (focus and config.measure == "focus")
    device = "cpu" if job.memory_level else None  # after an out-of-memory error
    loaded = load_text_model(model, "float32" if with_trials else "auto", device)
    if isinstance(loaded, PeftModel):
        loaded = loaded.merge_and_unload()
    tokenizer = load_tokenizer(model)
    rows, source = calibration_rows(config, tokenizer, dataset)
    statistics = observe(loaded, rows, job, name)
    summary = summarize(statistics, tokenizer) | {"source": source}
    save_file(channel_tensors(statistics), out / f"activations-{name}.safetensors")
    if focus:
        text = loaded.config.get_text_config()
        layers, path = text.num_hidden_layers, out / "imatrix.gguf"
        matrices = write_imatrix(path, statistics, loaded.config.model_type, layers, source)
        job.log(f"imatrix.gguf: {len(matrices)} matrices of {name}, {statistics.rows} rows, {statistics.tokens} tokens")
    trials: dict[str, Outcome] = {}
    if with_trials:
        examples = [encode(tokenizer, row) for row in test_rows(dataset, config.measured_rows)]
        k = rescale_factor(summary, config.margin)
        trials = simulate(loaded, examples, statistics, model.base, k, config.clip_percentile, job)
    return ModelActivations(summary, statistics, trials)


def calibration_rows(
    config: OutlierConfig, tokenizer: PreTrainedTokenizerBase, dataset: Path
) -> tuple[list[list[int]], str]:
    """Token ids of rows evenly spread over the calibration file, and that file's name."""
    files = ("calibration.jsonl", "train.jsonl")
    file = next((name for name in files if (dataset / name).is_file()), None)
    rows = list(read_rows(dataset / file)) if file else []
    if not rows or file is None:
        raise BadData(f"{dataset} has no rows in calibration.jsonl or train.jsonl: activations need some")
    count = min(len(rows), config.calibration_rows)
    spread = [rows[i * len(rows) // count] for i in range(count)]
    return [encode(tokenizer, row).input_ids[: config.max_length] for row in spread], file


def summarize(statistics: ActivationStatistics, tokenizer: PreTrainedTokenizerBase) -> Numbers:
    """Everything but the single channels, as JSON."""

    def peak_json(peak: Peak) -> Numbers:
        text = tokenizer.decode([peak.token])
        return {"value": peak.value, "position": peak.position, "token": text, "channel": peak.channel}

    return {
        "rows": statistics.rows,
        "tokens": statistics.tokens,
        "not_finite": statistics.not_finite,
        "stream_peak": statistics.stream_peak,
        "embedding": peak_json(statistics.embedding),
        "layers": [
            {
                "layer": number,
                "middle": peak_json(layer.middle),
                "output": peak_json(layer.output),
                **_headroom(layer),
                "sink_mass": layer.sink_mass,
                "sink_norm": layer.sink_norm,
            }
            for number, layer in sorted(statistics.layers.items())
        ],
        "norms": statistics.norms,
        "linears": {name: _linear_json(channels) for name, channels in statistics.linears.items()},
    }


def channel_tensors(statistics: ActivationStatistics) -> Any:
    """Per-channel maxima and mean squares of every linear layer's input, float32 [in], by `<layer>.max` and so on."""
    tensors = {}
    for name, channels in statistics.linears.items():
        tensors[f"{name}.max"] = channels.maxima.contiguous()
        tensors[f"{name}.mean_square"] = channels.mean_squares.float().contiguous()
    return tensors


def _headroom(layer: LayerStatistics) -> dict[str, float]:
    """The largest number of each small float over the layer's peak; below 1 the peak overflows."""
    peak = max(layer.middle.value, layer.output.value, 1e-30)
    return {"float16_headroom": FLOAT16_MAX / peak, "float8_headroom": FLOAT8_MAX / peak}


def _linear_json(channels: ChannelStatistics) -> Numbers:
    peak, rms = float(channels.maxima.max()), channels.mean_squares.sqrt()
    step, order = peak / 127, channels.maxima.argsort(descending=True)[:5]
    return {
        "input_peak": peak,
        "output_peak": channels.output_peak,
        "median_rms": float(rms.median()),
        "lost_channels": float((rms < step / 2).double().mean()),  # one int8 scale rounds most of them to zero
        "token_step_error": (channels.token_peaks / max(1, channels.tokens) / 127**2 / 12) ** 0.5
        / max(1e-30, float(channels.mean_squares.mean().sqrt())),
        "worst_channels": [{"channel": int(i), "max": float(channels.maxima[i]), "rms": float(rms[i])} for i in order],
    }
