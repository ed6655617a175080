"""Runs the teacher over rows in packed batches and writes its hidden states (or top-k logits) into the cache."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.job import Job
from tasks.distill.teacher_cache import TEMPERATURES, TeacherCacheConfig, TeacherPrecision
from tasks.distill.teacher_cache.cache_files import DTYPES, CacheLayout, TeacherCache, map_tensors, row_key, write_index
from tasks.distill.teacher_cache.progress_marker import ProgressMarker
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, collate, to_device
from tasks.engine.data.sequence_packing import collate_packed, pack_first_fit
from tasks.engine.losses.loss_mix import Head
from tasks.engine.models.dtypes import pick_device, pick_dtype
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.training.acceleration import pack_attention

GIB = 1 << 30
CHUNK_BYTES = 1 << 28


class TeacherPass(NamedTuple):
    """A teacher that is loaded only when a row needs it, the key of its outputs, and what is cached of them."""

    load: Callable[[], PreTrainedModel]
    teacher_key: str
    layout: CacheLayout
    config: TeacherCacheConfig


def _dtype(precision: TeacherPrecision) -> str:
    """Name of the dtype that hidden states are cached in: the one that the teacher computes in."""
    dtype = pick_dtype("auto" if precision in ("8bit", "4bit") else precision, pick_device())
    return str(dtype).removeprefix("torch.")


def choose_layout(config: TeacherCacheConfig, width: int, labels: int, job: Job) -> CacheLayout:
    """Hidden states where they fit the budget, else the top k; logs how large either is before the teacher runs."""
    exact = CacheLayout(width, _dtype(config.teacher_precision))
    gib = labels * exact.bytes_per_label / GIB
    text = f"the teacher's hidden states of {labels} answer tokens take {gib:.3g} GiB"
    if gib <= config.states_budget_gib:
        job.log(text)
        return exact
    top_k = exact._replace(top_k=config.top_k)
    job.log(
        f"{text}, more than states_budget_gib={config.states_budget_gib:g}: the top {top_k.top_k} logits and the mass "
        f"of the others are cached, {labels * top_k.bytes_per_label / GIB:.3g} GiB",
        "warning",
    )
    return top_k


def cache_rows(
    teacher_pass: TeacherPass, examples: Sequence[Example], previous: TeacherCache | None, directory: Path, job: Job
) -> TeacherCache:
    """The cache of all `examples` in `directory`: rows of `previous` are copied, the others go through the teacher.

    Resumes an interrupted pass over the same rows. Equal rows are cached once.
    """
    unique = {row_key(example): example for example in examples}
    keys, rows, starts = list(unique), list(unique.values()), [0]
    for example in rows:
        starts.append(starts[-1] + len(example.answer_ids))
    directory.mkdir(parents=True, exist_ok=True)
    teacher, layout = teacher_pass.teacher_key, teacher_pass.layout
    digest = hashlib.sha256(b"".join(keys)).hexdigest()
    work = {"teacher": teacher, "kept": list(layout), "rows": digest, **teacher_pass.config.model_dump()}
    marker = ProgressMarker(directory, work)
    if marker.rows and (directory / "states.json").is_file():
        return TeacherCache(directory)
    tensors, missing = map_tensors(directory, layout, starts[-1]), list(range(len(rows)))
    if previous is not None and (previous.teacher, previous.layout) == (teacher, layout):
        for row in (row for row in missing if keys[row] in previous.row_indices):
            for name, tensor in tensors.items():
                tensor[starts[row] : starts[row + 1]] = previous.tensors[name][previous.labels(keys[row])]
        missing = [row for row in missing if keys[row] not in previous.row_indices]
        job.log(f"{len(rows) - len(missing)} of {len(rows)} rows are copied from this teacher's earlier cache")
        head = previous.head()
    if missing or previous is None:
        model = teacher_pass.load()
        head = head_of(model)
        _run_teacher(model, head, teacher_pass, rows, missing, starts, tensors, marker, job)
    marker.mark(len(missing))
    return write_index(directory, teacher, layout, head, keys, starts)


def _run_teacher(
    model: PreTrainedModel, head: Head, teacher_pass: TeacherPass, rows: list[Example], missing: list[int],
    starts: list[int], tensors: dict[str, Tensor], marker: ProgressMarker, job: Job,
) -> None:  # fmt: skip
    """Writes the outputs of the rows `missing` into `tensors`, where row r has labels starts[r] to starts[r + 1]."""
    reason = pack_attention(model, DTYPES[teacher_pass.layout.dtype])
    if reason:
        job.log(reason, "warning")
    lengths = [len(rows[row].input_ids) for row in missing]
    packing = pack_first_fit(lengths, max(1, teacher_pass.config.batch_tokens >> job.memory_level))
    processed, last_report = 0, 0.0
    for positions in packing.micro_batches:
        indices = [missing[position] for position in positions]
        processed += len(indices)
        if processed <= marker.rows:
            continue
        items = [(row, rows[row]) for row in indices]
        batch = to_device(collate_packed(items, packing) if reason is None else collate(items), model.device)
        outputs = teacher_outputs(model, head, batch, teacher_pass.layout)
        start = 0
        for row in batch["rows"]:
            end = start + starts[row + 1] - starts[row]
            for name, values in outputs.items():
                tensors[name][starts[row] : starts[row + 1]] = values[start:end]
            start = end
        marker.mark_periodically(processed)
        if processed == len(missing) or time.monotonic() - last_report > 0.5:
            job.progress(processed, len(missing), "rows through the teacher")
            last_report = time.monotonic()


@torch.no_grad()
def teacher_outputs(model: PreTrainedModel, head: Head, batch: Batch, layout: CacheLayout) -> dict[str, Tensor]:
    """What the cache holds of a batch's N labels, by file name: (N, values) each, on the CPU."""
    hidden = hidden_states(model, batch)
    chunks: dict[str, list[Tensor]] = {name: [] for name in layout.files}
    step = max(1, CHUNK_BYTES // (3 * 4 * len(head.weight)))  # float32 logits and two temporaries
    for start in range(0, len(hidden), step):
        logits = head.logits(hidden[start : start + step])
        labels = batch["labels"][start : start + step]
        lse = torch.logsumexp(logits, -1, keepdim=True)
        chunks["loss.bin"].append(lse - logits.gather(1, labels[:, None]))
        # max, for a topk of 1 is slow
        values, ids = logits.topk(layout.top_k) if layout.top_k else logits.max(-1, keepdim=True)
        chunks["said.bin"].append(ids[:, :1])
        chunks["lse.bin"].append(torch.stack([torch.logsumexp(logits / t, -1) for t in TEMPERATURES], 1))
        if layout.top_k:
            chunks["logits.bin"].append(values)
            chunks["ids.bin"].append(ids)
    if not layout.top_k:
        chunks["states.bin"] = [hidden]
    return {name: torch.cat(tensors).to("cpu", layout.files[name][0]) for name, tensors in chunks.items()}
