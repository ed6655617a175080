"""The teacher over rows: packed batches through its body; its states (or top k) and its own answers written down."""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.job import Job
from tasks.distill.teacher_cache import TEMPERATURES, StatesConfig, TeacherPrecision
from tasks.distill.teacher_cache.hidden_states import DTYPES, Kept, States, finish, mapped, row_key
from tasks.distill.teacher_cache.progress_marker import Mark
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, collate, to_device
from tasks.engine.data.sequence_packing import collate_packed, pack_first_fit
from tasks.engine.losses.loss_mix import Head
from tasks.engine.models.dtypes import pick_device, pick_dtype
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.speed.packing_support import enable_packing

GIB = 1 << 30
CHUNK_BYTES = 1 << 28


class Ask(NamedTuple):
    """A teacher that is loaded only when a row needs it, and what is kept of it."""

    load: Callable[[], PreTrainedModel]
    name: str
    kept: Kept
    config: StatesConfig


def _dtype(precision: TeacherPrecision) -> str:
    """The name of the dtype that hidden states are kept in: the one that the teacher computes in."""
    dtype = pick_dtype("auto" if precision in ("8bit", "4bit") else precision, pick_device())
    return str(dtype).removeprefix("torch.")


def what_to_keep(config: StatesConfig, width: int, labels: int, job: Job) -> Kept:
    """Hidden states where they fit the budget, else the top k; says how large either is before anything is done."""
    exact = Kept(width, _dtype(config.teacher_precision))
    gib = labels * exact.bytes_per_label / GIB
    text = f"the teacher's states of {labels} answer tokens take {gib:.3g} GiB"
    if gib <= config.states_budget_gib:
        job.log(text)
        return exact
    top = exact._replace(top_k=config.top_k)
    job.log(
        f"{text}, more than states_budget_gib={config.states_budget_gib:g}: the top {top.top_k} logits and the mass "
        f"of the others are kept, {labels * top.bytes_per_label / GIB:.3g} GiB",
        "warning",
    )
    return top


def remember_rows(ask: Ask, examples: Sequence[Example], known: States | None, directory: Path, job: Job) -> States:
    """States of all `examples` in `directory`: copied from `known` where it has a row, else asked of the teacher.

    Goes on where an earlier try of the same rows stopped. Equal rows are kept once.
    """
    unique = {row_key(example): example for example in examples}
    keys, rows, starts = list(unique), list(unique.values()), [0]
    for example in rows:
        starts.append(starts[-1] + len(example.answer_ids))
    directory.mkdir(parents=True, exist_ok=True)
    same = hashlib.sha256(b"".join(keys)).hexdigest()
    mark = Mark(directory, {"teacher": ask.name, "kept": list(ask.kept), "rows": same, **ask.config.model_dump()})
    if mark.done and (directory / "states.json").is_file():
        return States(directory)
    tensors, missing = mapped(directory, ask.kept, starts[-1]), list(range(len(rows)))
    if known is not None and (known.teacher, known.kept) == (ask.name, ask.kept):
        for row in (row for row in missing if keys[row] in known.places):
            for name, tensor in tensors.items():
                tensor[starts[row] : starts[row + 1]] = known.tensors[name][known.labels(keys[row])]
        missing = [row for row in missing if keys[row] not in known.places]
        job.log(f"{len(rows) - len(missing)} of {len(rows)} rows were asked of this teacher before")
        head = known.head()
    if missing or known is None:
        model = ask.load()
        head = head_of(model)
        _ask_missing(model, head, ask, rows, missing, starts, tensors, mark, job)
    mark.set(len(missing))
    return finish(directory, ask.name, ask.kept, head, keys, starts)


def _ask_missing(
    model: PreTrainedModel, head: Head, ask: Ask, rows: list[Example], missing: list[int], starts: list[int],
    tensors: dict[str, Tensor], mark: Mark, job: Job,
) -> None:  # fmt: skip
    reason = enable_packing(model, DTYPES[ask.kept.dtype])
    if reason:
        job.log(reason, "warning")
    lengths = [len(rows[row].input_ids) for row in missing]
    packing = pack_first_fit(lengths, max(1, ask.config.batch_tokens >> job.rung))
    order, done, told = [missing[i] for part in packing.micro_batches for i in part], 0, 0.0
    for part in packing.micro_batches:
        some = [missing[i] for i in part]
        done += len(some)
        if done <= mark.done:
            continue
        items = [(row, rows[row]) for row in some]
        batch = to_device(collate_packed(items, packing) if reason is None else collate(items), model.device)
        answers = answer(model, head, batch, ask.kept)
        start = 0
        for row in batch["rows"]:
            end = start + starts[row + 1] - starts[row]
            for name, values in answers.items():
                tensors[name][starts[row] : starts[row + 1]] = values[start:end]
            start = end
        mark.maybe(done)
        if done == len(order) or time.monotonic() - told > 0.5:
            job.progress(done, len(order), "rows through the teacher")
            told = time.monotonic()


@torch.no_grad()
def answer(model: PreTrainedModel, head: Head, batch: Batch, kept: Kept) -> dict[str, Tensor]:
    """What is kept of a batch's N labels, by file name: (N, values) each, on the CPU."""
    hidden = hidden_states(model, batch)
    found: dict[str, list[Tensor]] = {name: [] for name in kept.files}
    step = max(1, CHUNK_BYTES // (3 * 4 * len(head.weight)))  # float32 logits and two temporaries
    for start in range(0, len(hidden), step):
        logits = head.logits(hidden[start : start + step])
        labels = batch["labels"][start : start + step]
        lse = torch.logsumexp(logits, -1, keepdim=True)
        found["loss.bin"].append(lse - logits.gather(1, labels[:, None]))
        top, ids = logits.topk(kept.top_k) if kept.top_k else logits.max(-1, keepdim=True)  # a top 1 is a slow one
        found["said.bin"].append(ids[:, :1])
        found["lse.bin"].append(torch.stack([torch.logsumexp(logits / t, -1) for t in TEMPERATURES], 1))
        if kept.top_k:
            found["logits.bin"].append(top)
            found["ids.bin"].append(ids)
    if not kept.top_k:
        found["states.bin"] = [hidden]
    return {name: torch.cat(parts).to("cpu", kept.files[name][0]) for name, parts in found.items()}
