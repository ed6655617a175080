"""Merges an adapter into its base, one tensor at a time, and compares the two models on held-out rows.

python -m tasks.merge.run config.json --model BASE+ADAPTER --dataset DIR --out DIR
"""

import json
import math
import shutil
from pathlib import Path

from tasks.core.command import Report, command
from tasks.core.errors import GateFailed
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.engine.agreement import Agreement, answer_logits, held_out
from tasks.engine.chat import encode
from tasks.engine.load import load_model, load_tokenizer
from tasks.engine.stored import stored_tensors
from tasks.engine.weights import Weight, weights, write_safetensors
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
    """Writes base + adapter as safetensors shards with the base's names, shapes and dtypes; raises GateFailed."""
    bytes_written, changed = write_shards(model, out, config.shard_bytes, job)
    copy_companions(model, out)
    check_inventory(model.base, out)
    tensors = len(stored_tensors(out))
    facts = {"bytes": bytes_written, "tensors": tensors, "changed_tensors": changed}
    job.log(f"{tensors} tensors written, {changed} of them changed by the adapter, {bytes_written / 1e6:.1f} MB")
    if model.adapter is None:
        return Report(facts=facts, warnings=["there was no adapter: the model is its base, copied"])
    agreement = compare(config, model, dataset, out, job)
    job.metrics(0, **agreement.metrics())
    agreement.gate("the merged model", config.max_mean_kl, config.min_top1)
    return Report(facts={**facts, "mean_kl": agreement.mean_kl, "top1": agreement.top1}, metrics=agreement.metrics())


def write_shards(model: ModelDir, out: Path, shard_bytes: int, job: Job) -> tuple[int, int]:
    """Writes the effective weights, an index beside them when it takes several files; (bytes, tensors changed)."""
    shards: list[list[Weight]] = [[]]
    filled = total = changed = 0
    for weight in weights(model):
        size = math.prod(weight.shape) * weight.dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
        total += size
        changed += weight.changed
    weight_map = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(out / name, shard, {"format": "pt"})
        weight_map.update({weight.name: name for weight in shard})
        job.progress(i + 1, len(shards), "shards")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True))
    return total, changed


def copy_companions(model: ModelDir, out: Path) -> None:
    """Copies config, generation config, tokenizer and template; the adapter's tokenizer goes before the base's."""
    files = [file for pattern in COMPANIONS for file in model.base.glob(pattern)]
    if model.adapter is not None:
        files += [file for pattern in TOKENIZER for file in model.adapter.glob(pattern)]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, out / file.name)


def check_inventory(base: Path, out: Path) -> None:
    """Raises GateFailed unless `out` has every tensor of `base`, of its shape and dtype, and none besides."""
    ours, theirs = stored_tensors(out), stored_tensors(base)
    if ours.keys() != theirs.keys():
        lost, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
        raise GateFailed(f"the merged model lacks {lost[:3]} ({len(lost)}) and has {extra[:3]} ({len(extra)}) besides")
    for name, stored in theirs.items():
        if (stored.shape, stored.dtype) != (ours[name].shape, ours[name].dtype):
            raise GateFailed(f"{name} was {stored.dtype} {stored.shape}, is {ours[name].dtype} {ours[name].shape}")


def compare(config: MergeConfig, model: ModelDir, dataset: Path, out: Path, job: Job) -> Agreement:
    """Unmerged against merged, both in float32 and in memory at once, on held-out rows."""
    tokenizer = load_tokenizer(ModelDir(out))
    unmerged, merged = load_model(model, "float32"), load_model(ModelDir(out), "float32")
    rows = held_out(dataset, config.gate_rows)
    agreement = Agreement()
    for i, row in enumerate(rows):
        example = encode(tokenizer, row)
        agreement.add(answer_logits(unmerged, example), answer_logits(merged, example))
        job.progress(i + 1, len(rows), "rows", f"mean KL {agreement.mean_kl:.2g}")
    return agreement


if __name__ == "__main__":
    command(merge)
