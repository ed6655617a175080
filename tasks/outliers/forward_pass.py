"""The activation half of the stage: a model observed on calibration rows, summed up, and tried on held-out ones."""

from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.rows import read_rows
from tasks.engine.compare.agreement import held_out
from tasks.engine.data.chat_template import encode
from tasks.engine.models.load import load_tokenizer
from tasks.engine.models.text_only import load_text
from tasks.outliers import OutlierConfig
from tasks.outliers.activations import observe
from tasks.outliers.imatrix import write_imatrix
from tasks.outliers.layer_statistics import Activations, Channels, Layer, Peak
from tasks.outliers.peaks import FLOAT8_MAX, FLOAT16_MAX, rescale_needed
from tasks.outliers.simulate import Outcome, simulate

Numbers = dict[str, Any]


class Observed(NamedTuple):
    """What a model's activations say: as JSON, as they are, and what trials on held-out rows came to."""

    summary: Numbers
    seen: Activations
    outcomes: dict[str, Outcome]


def observe_model(
    config: OutlierConfig, name: str, model: ModelDir, dataset: Path, out: Path, focus: bool, job: Job
) -> Observed:
    """Runs one model over the rows; the focus gets `imatrix.gguf`. An adapter is merged in memory first."""
    tried = config.measure == "all" or (focus and config.measure == "focus")
    device = "cpu" if job.rung else None  # an out-of-memory error before: slower, but there is room
    loaded = load_text(model, "float32" if tried else "auto", device)
    if isinstance(loaded, PeftModel):
        loaded = loaded.merge_and_unload()
    tokenizer = load_tokenizer(model)
    rows, source = calibration(config, tokenizer, dataset)
    seen = observe(loaded, rows, job, name)
    summary = summarize(seen, tokenizer) | {"source": source}
    save_file(channel_tensors(seen), out / f"activations-{name}.safetensors")
    if focus:
        text = loaded.config.get_text_config()
        written = write_imatrix(out / "imatrix.gguf", seen, loaded.config.model_type, text.num_hidden_layers, source)
        job.log(f"imatrix.gguf: {len(written)} matrices of {name} on {seen.rows} rows, {seen.tokens} tokens")
    outcomes: dict[str, Outcome] = {}
    if tried:
        examples = [encode(tokenizer, row) for row in held_out(dataset, config.measured_rows)]
        k = rescale_needed(summary, config.margin)
        outcomes = simulate(loaded, examples, seen, model.base, k, config.clip_percentile, job)
    return Observed(summary, seen, outcomes)


def calibration(
    config: OutlierConfig, tokenizer: PreTrainedTokenizerBase, dataset: Path
) -> tuple[list[list[int]], str]:
    """Token ids of calibration rows, evenly spread over the file, and the file's name."""
    file = next((one for one in ("calibration.jsonl", "train.jsonl") if (dataset / one).is_file()), None)
    found = list(read_rows(dataset / file)) if file else []
    if not found or file is None:
        raise BadData(f"{dataset} has no rows in calibration.jsonl or train.jsonl: activations need some")
    count = min(len(found), config.calibration_rows)
    chosen = [found[i * len(found) // count] for i in range(count)]
    return [encode(tokenizer, row).input_ids[: config.max_length] for row in chosen], file


def summarize(seen: Activations, tokenizer: PreTrainedTokenizerBase) -> Numbers:
    """Everything but the single channels, as JSON."""

    def place(peak: Peak) -> Numbers:
        text = tokenizer.decode([peak.token])
        return {"value": peak.value, "position": peak.position, "token": text, "channel": peak.channel}

    return {
        "rows": seen.rows,
        "tokens": seen.tokens,
        "not_finite": seen.not_finite,
        "stream_peak": seen.stream_peak,
        "embedding": place(seen.embedding),
        "layers": [
            {
                "layer": number,
                "middle": place(layer.middle),
                "output": place(layer.output),
                **_headroom(layer),
                "sink_mass": layer.sink_mass,
                "sink_norm": layer.sink_norm,
            }
            for number, layer in sorted(seen.layers.items())
        ],
        "norms": seen.norms,
        "linears": {name: _channels(channels) for name, channels in seen.linears.items()},
    }


def channel_tensors(seen: Activations) -> Any:
    """Per-channel maxima and mean squares of every linear layer's input, float32 [in], by `<layer>.max` and so on."""
    found = {}
    for name, channels in seen.linears.items():
        found[f"{name}.max"] = channels.maxima.contiguous()
        found[f"{name}.mean_square"] = channels.mean_squares.float().contiguous()
    return found


def _headroom(layer: Layer) -> dict[str, float]:
    """How many times its peak each small float could still hold; below 1 it cannot."""
    peak = max(layer.middle.value, layer.output.value, 1e-30)
    return {"float16_headroom": FLOAT16_MAX / peak, "float8_headroom": FLOAT8_MAX / peak}


def _channels(channels: Channels) -> Numbers:
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
