"""Merges an adapter into its base, one tensor at a time, and compares the two models on held-out rows.

python -m tasks.merge.run config.json --model BASE+ADAPTER --dataset DIR --out DIR
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from tasks.core.command import Report, command
from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.compare.agreement import Agreement, test_rows
from tasks.engine.compare.reference_logits import ReferenceLogits
from tasks.engine.data.chat_template import encode
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.text_only import load_text_model
from tasks.engine.weights.effective import Weight, effective_weights
from tasks.engine.weights.nf4 import combine_four_bit
from tasks.engine.weights.rescale import clipped_weights, rescaled_weights
from tasks.engine.weights.safetensors_reader import stored_tensors
from tasks.engine.weights.safetensors_writer import write_safetensors
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


def merge(config: MergeConfig, model: ModelDir, dataset: Path, out: Path, job: Job) -> Report:
    """Writes base + adapter as safetensors shards with the base's names, shapes and dtypes.

    A base in 4 bits is dequantized to 16 bits. Raises GateFailed when the merged model's answers differ too much.
    """
    tensors = list(effective_weights(model, weight=config.weight))
    if config.remedy == "rescale":
        tensors = rescaled_weights(tensors, model.base, config.rescale_k)
    elif config.remedy == "clip":
        tensors = clipped_weights(tensors, model.base, config.clip_percentile)
    bytes_written = write_shards(tensors, out, config.shard_bytes, job)
    copy_companions(model, out)
    recast = {weight.name: weight.dtype for weight in tensors if weight.dtype != weight.stored.dtype}
    check_inventory(model.base, out, recast)
    changed = sum(weight.changed for weight in tensors)
    facts = {"bytes": bytes_written, "tensors": len(tensors), "changed_tensors": changed}
    job.log(f"{len(tensors)} tensors written, {changed} of them changed, {bytes_written / 1e6:.1f} MB")
    if not changed:
        return Report(facts=facts, warnings=["there was no adapter: the model is its base, copied"])
    agreement = compare(config, model, dataset, out, job)
    job.metrics(0, **agreement.metrics())
    agreement.require("the merged model", config.max_mean_kl, config.min_top1)
    return Report(facts={**facts, "mean_kl": agreement.mean_kl, "top1": agreement.top1}, metrics=agreement.metrics())


def write_shards(tensors: list[Weight], out: Path, shard_bytes: int, job: Job) -> int:
    """Writes the weights into files of at most `shard_bytes`, with an index if there are several; returns all bytes."""
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
    """Copies config, generation config, tokenizer and chat template; the adapter's tokenizer replaces the base's."""
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
    """Raises GateFailed unless `out` has the tensors of `base` and no others, with their shapes and dtypes.

    `recast` gives the dtypes of tensors that are stored in another one on purpose.
    """
    merged, original = stored_tensors(out), combine_four_bit(stored_tensors(base))
    if merged.keys() != original.keys():
        lost, extra = sorted(original.keys() - merged.keys()), sorted(merged.keys() - original.keys())
        raise GateFailed(f"the merged model lacks {lost[:3]} ({len(lost)}) and has {extra[:3]} ({len(extra)}) besides")
    for name, stored in original.items():
        dtype, tensor = (recast or {}).get(name, stored.dtype), merged[name]
        if (stored.shape, dtype) != (tensor.shape, tensor.dtype):
            raise GateFailed(f"{name} was {dtype} {stored.shape}, is {tensor.dtype} {tensor.shape}")


def compare(config: MergeConfig, model: ModelDir, dataset: Path, out: Path, job: Job) -> Agreement:
    """Agreement of the unmerged and the merged model on held-out rows, in float32, one model in memory at a time."""
    tokenizer = load_tokenizer(ModelDir(out))
    examples = [encode(tokenizer, row) for row in test_rows(dataset, config.gate_rows)]
    unmerged = ReferenceLogits(_unmerged(model, config.weight), examples)
    job.progress(1, 2, "models", "unmerged")
    merged = ReferenceLogits(load_text_model(ModelDir(out), "float32"), examples)
    merged.share_head(unmerged)
    agreement = Agreement()
    for i in range(len(examples)):
        agreement.add(unmerged.logits(i), merged.logits(i))
    job.progress(2, 2, "models", f"mean KL {agreement.mean_kl:.2g}")
    return agreement


def _unmerged(model: ModelDir, weight: float) -> Any:
    """Base and adapter as peft runs them, each layer's scaling times `weight`."""
    loaded: Any = load_text_model(model, "float32")
    for module in loaded.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and "default" in scaling:
            scaling["default"] *= weight
    return loaded.eval()


if __name__ == "__main__":
    command(merge)
