"""Merges adapters into their base, one tensor at a time, and compares the two models on held-out rows.

python -m tasks.merge.run config.json --model BASE+ADAPTER --dataset DIR --out DIR [--adapters NAME=DIR ...]
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tasks.core.command import Report, command
from tasks.core.errors import BadConfig, GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.compare.agreement import Agreement, held_out
from tasks.engine.compare.reference_logits import Remembered
from tasks.engine.data.chat_template import encode
from tasks.engine.models.load import load_tokenizer
from tasks.engine.models.text_only import adapter_keys, load_text
from tasks.engine.weights.effective import Weight, weights, write_safetensors
from tasks.engine.weights.nf4 import unpacked
from tasks.engine.weights.rescale import clipped, rescaled
from tasks.engine.weights.safetensors_reader import stored_tensors
from tasks.merge import MergeConfig

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
COMPANIONS = ("config.json", "generation_config.json", "*processor_config.json", "LICENSE*", *TOKENIZER)


class Added(NamedTuple):
    """A further adapter."""

    name: str
    directory: Path
    weight: float


def merge(
    config: MergeConfig,
    model: ModelDir,
    dataset: Path,
    out: Path,
    job: Job,
    adapters: dict[str, ModelDir] | None = None,
) -> Report:
    """Writes base + adapters as safetensors shards with the base's names, shapes and dtypes; raises GateFailed.

    A base in 4 bits becomes the 16-bit model that it stands for.
    """
    more = further(config, adapters or {})
    tensors = list(weights(model, [(one.directory, one.weight) for one in more], config.weight))
    if config.remedy == "rescale":
        tensors = rescaled(tensors, model.base, config.rescale_k)
    elif config.remedy == "clip":
        tensors = clipped(tensors, model.base, config.clip_percentile)
    bytes_written = write_shards(tensors, out, config.shard_bytes, job)
    copy_companions(model, out)
    recast = {weight.name: weight.dtype for weight in tensors if weight.dtype != weight.stored.dtype}
    check_inventory(model.base, out, recast)
    changed = sum(weight.changed for weight in tensors)
    facts = {"bytes": bytes_written, "tensors": len(tensors), "changed_tensors": changed}
    job.log(f"{len(tensors)} tensors written, {changed} of them changed, {bytes_written / 1e6:.1f} MB")
    if not changed:
        return Report(facts=facts, warnings=["there was no adapter: the model is its base, copied"])
    agreement = compare(config, model, more, dataset, out, job)
    job.metrics(0, **agreement.metrics())
    agreement.gate("the merged model", config.max_mean_kl, config.min_top1)
    return Report(facts={**facts, "mean_kl": agreement.mean_kl, "top1": agreement.top1}, metrics=agreement.metrics())


def further(config: MergeConfig, adapters: dict[str, ModelDir]) -> list[Added]:
    """The adapters beside the model's own; raises BadConfig for a weight without an adapter."""
    unknown = sorted(config.adapter_weights.keys() - adapters.keys())
    if unknown:
        raise BadConfig(f"adapter_weights names {unknown[0]!r}, but --adapters gives {sorted(adapters) or 'none'}")
    return [
        Added(name, one.adapter or one.base, config.adapter_weights.get(name, 1.0)) for name, one in adapters.items()
    ]


def write_shards(tensors: list[Weight], out: Path, shard_bytes: int, job: Job) -> int:
    """Writes the effective weights, an index beside them when it takes several files; returns their bytes."""
    shards: list[list[Weight]] = [[]]
    filled = total = 0
    for weight in tensors:
        size = math.prod(weight.shape) * weight.dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
        total += size
    weight_map = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(out / name, shard, {"format": "pt"})
        weight_map.update({weight.name: name for weight in shard})
        job.progress(i + 1, len(shards), "shards")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
    return total


def copy_companions(model: ModelDir, out: Path) -> None:
    """Copies config, generation config, tokenizer and template; the adapter's tokenizer goes before the base's."""
    files = [file for pattern in COMPANIONS for file in model.base.glob(pattern)]
    if model.adapter is not None:
        files += [file for pattern in TOKENIZER for file in model.adapter.glob(pattern)]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    settings: dict[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if settings.pop("quantization_config", None) is not None:  # what is written is no longer quantized
        (out / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def check_inventory(base: Path, out: Path, recast: dict[str, torch.dtype] | None = None) -> None:
    """Raises GateFailed unless `out` has every tensor of `base`, of its shape and dtype, and none besides.

    `recast` are the dtypes of those that were meant to get another one.
    """
    ours, theirs = stored_tensors(out), unpacked(stored_tensors(base))
    if ours.keys() != theirs.keys():
        lost, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        raise GateFailed(f"the merged model lacks {lost[:3]} ({len(lost)}) and has {extra[:3]} ({len(extra)}) besides")
    for name, stored in theirs.items():
        dtype = (recast or {}).get(name, stored.dtype)
        if (stored.shape, dtype) != (ours[name].shape, ours[name].dtype):
            raise GateFailed(f"{name} was {dtype} {stored.shape}, is {ours[name].dtype} {ours[name].shape}")


def compare(config: MergeConfig, model: ModelDir, more: list[Added], dataset: Path, out: Path, job: Job) -> Agreement:
    """Unmerged against merged on held-out rows, in float32, one model in memory at a time."""
    tokenizer = load_tokenizer(ModelDir(out))
    examples = [encode(tokenizer, row) for row in held_out(dataset, config.gate_rows)]
    unmerged = Remembered(_unmerged(model, more, config.weight), examples)
    job.progress(1, 2, "models", "unmerged")
    merged = Remembered(load_text(ModelDir(out), "float32"), examples)
    merged.share_head(unmerged)
    agreement = Agreement()
    for i in range(len(examples)):
        agreement.add(unmerged.logits(i), merged.logits(i))
    job.progress(2, 2, "models", f"mean KL {agreement.mean_kl:.2g}")
    return agreement


def _unmerged(model: ModelDir, more: list[Added], weight: float) -> Any:
    """Base and adapters as peft runs them: all active at once, each layer's scaling times its weight."""
    given = [Added("default", model.adapter, weight)] if model.adapter else []
    given += more
    first = given[0].directory if given else None
    loaded: Any = load_text(ModelDir(model.base, first), "float32")
    names = ["default", *(f"more_{one.name}" for one in given[1:])][: len(given)]
    for name, one in list(zip(names, given, strict=True))[1:]:
        loaded.load_adapter(one.directory, name, key_mapping=adapter_keys(model))
    if len(names) > 1:
        loaded.base_model.set_adapter(names)
    for name, one in zip(names, given, strict=True):
        for module in loaded.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and name in scaling:
                scaling[name] *= one.weight
    return loaded.eval()


if __name__ == "__main__":
    command(merge)
