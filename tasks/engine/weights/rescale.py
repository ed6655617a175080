"""Makes activations small enough for float16: an exact rescale of the residual stream, or clipping of norms' gains.

python -m tasks.engine.weights.rescale MODEL OUT --k 0.03125        # or: --clip 99

RMSNorm ignores the scale of its input, so the whole residual stream can be multiplied by k: the embedding and
whatever writes into the stream times k, and the final norm by 1/k where the head is tied to the embedding. The function
stays (up to RMSNorm's epsilon; the idea: huggingface/transformers#37226). Clipping changes it (arXiv 2601.22966).
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.engine.models.family_registry import family_of, model_types
from tasks.engine.models.tensor_names import gain_offset, is_norm
from tasks.engine.weights.adapter_delta import RowTransform
from tasks.engine.weights.effective import Weight, effective_weights
from tasks.engine.weights.safetensors_writer import write_safetensors


class Rescaling(NamedTuple):
    """Multiplies a tensor's effective values by `factor`; `gain_offset` is 1 for a norm stored as gain - 1, else 0."""

    factor: float
    gain_offset: float = 0.0

    def __call__(self, values: Tensor) -> Tensor:
        """Float32 in, float32 out. (w + 1) f - 1, in float64 since it cancels near a gain of 0."""
        if self.gain_offset:
            return ((values.double() + self.gain_offset) * self.factor - self.gain_offset).float()
        return values * self.factor


def rescaled_weights(tensors: Iterable[Weight], base: Path, k: float) -> list[Weight]:
    """The weights of a model whose residual stream is `k` times as large and whose function is the same.

    Norms that change are float32 from here on: Gemma stores gain - 1, and a small gain is lost to rounding near -1.
    Raises BadConfig for a family whose writers of the stream are not known, ValueError for a k that is no power of two.
    """
    tensors = list(tensors)
    factors = rescaling_factors([weight.name for weight in tensors], base, k)
    return [_rescaled(weight, factors[weight.name]) if weight.name in factors else weight for weight in tensors]


def clipped_weights(tensors: Iterable[Weight], base: Path, percentile: float) -> list[Weight]:
    """The weights with each norm's gains limited to the `percentile` of their magnitude, norm by norm."""
    return [_clipped(weight, base, percentile) if is_norm(weight.name, weight.shape) else weight for weight in tensors]


def rescaling_factors(names: Iterable[str], base: Path, k: float) -> dict[str, Rescaling]:
    """The factor of each tensor that rescaling the residual stream by `k` changes; errors as in `rescaled_weights`."""
    if not (k > 0 and math.frexp(k)[0] == 0.5):
        raise ValueError(
            f"k={k!r} is no power of two, so the embedding would be rounded anew: take {_nearest_power_of_two(k)}"
        )
    config = json.loads((base / "config.json").read_text())
    kind, names = str(config.get("model_type")), list(names)
    writers = family_of(kind).residual_writers
    if not writers:
        supported = ", ".join(model_types("residual_writers"))
        raise BadConfig(f"which tensors of {kind!r} write into the residual stream is not known, only of {supported}")
    tied = _is_tied(config, names)
    factors = {}
    for name in names:
        if (rescaling := _rescaling(name, writers, tied, k)) is not None:
            factors[name] = rescaling._replace(gain_offset=gain_offset(base, name) if is_norm(name, (1,)) else 0.0)
    return factors


def write_model(tensors: list[Weight], model: ModelDir, out: Path) -> None:
    """A model directory: `tensors` in one file, beside everything else that the base (and adapter) brought."""
    out.mkdir(parents=True, exist_ok=True)
    for source in (model.base, model.adapter):
        for file in source.iterdir() if source else ():
            if file.is_file() and not file.name.startswith(("model", "adapter_", "provenance", "report")):
                shutil.copyfile(file, out / file.name)
    write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})


def _rescaling(name: str, writers: tuple[str, ...], tied: bool, k: float) -> Rescaling | None:
    """What rescaling by `k` does to the tensor `name`, where the endings `writers` write into the stream."""
    if ("vision" in name or "audio" in name) and "projector" not in name:
        return None
    if name.endswith(("embed_tokens.weight", "mm_input_projection_weight")) or (tied and name == "lm_head.weight"):
        return Rescaling(k)
    if ".layers." in name:
        return Rescaling(k) if name.endswith(writers) else None
    return Rescaling(1 / k) if tied and name.endswith("model.norm.weight") else None


def _is_tied(config: dict[str, Any], names: list[str]) -> bool:
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    return bool(tied) if tied is not None else not any(name.endswith("lm_head.weight") for name in names)


def _rescaled(weight: Weight, rescaling: Rescaling) -> Weight:
    dtype = torch.float32 if is_norm(weight.name, weight.shape) else weight.dtype
    return weight._replace(transform=_then(weight.transform, lambda rows, *_: rescaling(rows)), dtype=dtype)


def _clipped(weight: Weight, base: Path, percentile: float) -> Weight:
    offset = gain_offset(base, weight.name)
    gains = weight.rows().double() + offset
    limit = float(gains.abs().quantile(percentile / 100))

    def clip(rows: Tensor, *_: int) -> Tensor:
        return ((rows.double() + offset).clamp(-limit, limit) - offset).float()

    return weight._replace(transform=_then(weight.transform, clip))


def _then(first: RowTransform | None, second: RowTransform) -> RowTransform:
    """One transform after another."""
    if first is None:
        return second
    return lambda rows, start, stop: second(first(rows, start, stop), start, stop)


def _nearest_power_of_two(k: float) -> str:
    return f"{2.0 ** round(math.log2(k)):g}" if k > 0 else "a positive one"


def main() -> None:
    """The command: streams a rescaled or clipped copy of a model directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=ModelDir.parse)
    parser.add_argument("out", type=Path)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--k", type=float)
    way.add_argument("--clip", type=float, metavar="PERCENTILE")
    arguments = parser.parse_args()
    model, tensors = arguments.model, list(effective_weights(arguments.model))
    if arguments.k:
        changed = rescaled_weights(tensors, model.base, arguments.k)
    else:
        changed = clipped_weights(tensors, model.base, arguments.clip)
    write_model(changed, model, arguments.out)


if __name__ == "__main__":
    main()
