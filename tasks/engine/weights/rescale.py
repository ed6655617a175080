"""Two ways with a model whose activations are too large for float16: an exact rescale, and clipping its norms.

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
from tasks.engine.models.norms import adds_one, is_norm
from tasks.engine.weights.adapter_delta import Patch
from tasks.engine.weights.effective import Weight, weights, write_safetensors

# Sandwich norms: what a block adds to the stream has passed a norm, whose gain carries the scale.
SANDWICH = ("gemma2", "gemma3", "gemma3_text")
# Pre-norm blocks: the last projection of attention and MLP writes into the stream itself.
PRE_NORM = ("llama", "mistral", "qwen2", "qwen3", "gemma")


class Change(NamedTuple):
    """What becomes of a tensor: its effective values times `factor`; `adds_one` where it is stored as gain - 1."""

    factor: float
    adds_one: bool = False

    def __call__(self, values: Tensor) -> Tensor:
        """Float32 in, float32 out. (w + 1) f - 1, in float64 since it cancels near a gain of 0."""
        if self.adds_one:
            return ((values.double() + 1) * self.factor - 1).float()
        return values * self.factor


def rescaled(tensors: Iterable[Weight], base: Path, k: float) -> list[Weight]:
    """The weights of a model whose residual stream is `k` times as large and whose function is the same.

    Norms that change are float32 from here on: Gemma stores gain - 1, and a small gain is lost to rounding near -1.
    Raises BadConfig for an architecture whose stream has other writers, ValueError for a k that is no power of two.
    """
    tensors = list(tensors)
    found = changes([weight.name for weight in tensors], base, k)
    return [_changed(weight, found[weight.name]) if weight.name in found else weight for weight in tensors]


def clipped(tensors: Iterable[Weight], base: Path, percentile: float) -> list[Weight]:
    """The weights with each norm's gains limited to the `percentile` of their magnitude, norm by norm."""
    return [_clipped(weight, base, percentile) if is_norm(weight.name, weight.shape) else weight for weight in tensors]


def changes(names: Iterable[str], base: Path, k: float) -> dict[str, Change]:
    """What rescaling by `k` does to the tensors that it touches; the errors are `rescaled`'s."""
    if not (k > 0 and math.frexp(k)[0] == 0.5):
        raise ValueError(f"k={k!r} is no power of two, so the embedding would be rounded anew: take {_near(k)}")
    config = json.loads((base / "config.json").read_text())
    kind, names = str(config.get("model_type")), list(names)
    if kind not in SANDWICH + PRE_NORM:
        raise BadConfig(
            f"the residual stream of {kind!r} is not known here; known are {', '.join(SANDWICH + PRE_NORM)}"
        )
    tied = _is_tied(config, names)
    found = {}
    for name in names:
        if (change := _change(name, kind in SANDWICH, tied, k)) is not None:
            found[name] = change._replace(adds_one=is_norm(name, (1,)) and adds_one(base, name))
    return found


def write_model(tensors: list[Weight], model: ModelDir, out: Path) -> None:
    """A model directory: `tensors` in one file, beside everything else that the base (and adapter) brought."""
    out.mkdir(parents=True, exist_ok=True)
    for source in (model.base, model.adapter):
        for file in source.iterdir() if source else ():
            if file.is_file() and not file.name.startswith(("model", "adapter_", "provenance", "report")):
                shutil.copyfile(file, out / file.name)
    write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})


def _change(name: str, sandwich: bool, tied: bool, k: float) -> Change | None:
    if ("vision" in name or "audio" in name) and "projector" not in name:
        return None
    if name.endswith(("embed_tokens.weight", "mm_input_projection_weight")) or (tied and name == "lm_head.weight"):
        return Change(k)
    if ".layers." in name:
        writers: tuple[str, ...] = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
        if not sandwich:
            writers = ("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias")
        return Change(k) if name.endswith(writers) else None
    return Change(1 / k) if tied and name.endswith("model.norm.weight") else None


def _is_tied(config: dict[str, Any], names: list[str]) -> bool:
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    return bool(tied) if tied is not None else not any(name.endswith("lm_head.weight") for name in names)


def _changed(weight: Weight, change: Change) -> Weight:
    dtype = torch.float32 if is_norm(weight.name, weight.shape) else weight.dtype
    return weight._replace(patch=_after(weight.patch, lambda rows, start, stop: change(rows)), dtype=dtype)


def _clipped(weight: Weight, base: Path, percentile: float) -> Weight:
    one = 1.0 if adds_one(base, weight.name) else 0.0
    gains = weight.rows().double() + one
    limit = float(gains.abs().quantile(percentile / 100))
    after = _after(weight.patch, lambda rows, start, stop: ((rows.double() + one).clamp(-limit, limit) - one).float())
    return weight._replace(patch=after)


def _after(first: Patch | None, then: Patch) -> Patch:
    """One patch after another."""
    if first is None:
        return then
    return lambda rows, start, stop: then(first(rows, start, stop), start, stop)


def _near(k: float) -> str:
    return f"{2.0 ** round(math.log2(k)):g}" if k > 0 else "a positive one"


def main() -> None:
    """The command: streams a rescaled or clipped copy of a model directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=ModelDir.parse)
    parser.add_argument("out", type=Path)
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--k", type=float)
    way.add_argument("--clip", type=float, metavar="PERCENTILE")
    given = parser.parse_args()
    tensors = list(weights(given.model))
    changed = (
        rescaled(tensors, given.model.base, given.k) if given.k else clipped(tensors, given.model.base, given.clip)
    )
    write_model(changed, given.model, given.out)


if __name__ == "__main__":
    main()
