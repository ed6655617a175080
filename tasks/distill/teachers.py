"""The two sources of the loss's targets: a cached teacher on disk and a live teacher in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill.teacher_cache import TEMPERATURES, TeacherCacheConfig
from tasks.distill.teacher_cache.cache_files import TeacherCache, row_key, teacher_key
from tasks.distill.teacher_cache.load_teacher import load_teacher
from tasks.distill.teacher_cache.teacher_pass import TeacherPass, cache_rows, choose_layout
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch
from tasks.engine.losses.loss_mix import Head, TopK
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.models.model_config import read_config

TOP_K_FIELDS = ("teacher_logits", "teacher_ids", "teacher_lse")
TARGET_FIELDS = (*TOP_K_FIELDS, "teacher_states", "label_weights")
Targets = tuple[Tensor | TopK, Head | None, Tensor | None, Tensor | None]
"""What the loss takes: hidden states (N, G) or a top k, the head for the former, the labels' weights (N,) and the
log-sum-exps (N,) where they are known."""


class DistillationBatch(Batch, total=False):
    """A batch with the targets of its N labels: the teacher's hidden states (N, G) or its top k (N, K), its
    log-sum-exps at the run's temperature (N,), and each label's weight (N,)."""

    teacher_states: Tensor
    teacher_logits: Tensor
    teacher_ids: Tensor
    teacher_lse: Tensor
    label_weights: Tensor


class CachedTeacher:
    """Targets of numbered rows from a teacher cache. `head` turns hidden states into logits; None for a top k.

    `row_weights`, where set, weight each row's labels. Raises BadConfig for a top k at a temperature it has no
    log-sum-exps of.
    """

    def __init__(self, cache: TeacherCache, examples: Sequence[Example], temperature: float) -> None:
        self.cache = cache
        self.label_slices = [cache.labels(row_key(example)) for example in examples]
        self.row_weights: list[float] | None = None
        self.head: Head | None = None
        self.temperature_index = TEMPERATURES.index(temperature) if temperature in TEMPERATURES else None
        if cache.layout.top_k:
            if self.temperature_index is None:
                temperatures = ", ".join(f"{t:g}" for t in TEMPERATURES)
                raise BadConfig(f"temperature={temperature:g}: with a cached top k, it must be one of {temperatures}")
        else:
            head = cache.head()
            self.head = Head(head.weight.to(pick_device()), head.softcap)

    def prepare_batch(self, batch: Batch) -> DistillationBatch:
        """The batch with its rows' targets, on the host."""
        prepared = cast(DistillationBatch, dict(batch))
        slices = [self.label_slices[row] for row in batch["rows"]]
        counts = [labels.stop - labels.start for labels in slices]

        def gather(name: str) -> Tensor:
            tensor, pin = self.cache.tensors[name], torch.cuda.is_available()  # pinned: the device copies by itself
            out = torch.empty((sum(counts), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=pin)
            return torch.cat([tensor[labels] for labels in slices], out=out)

        if self.head is not None:
            prepared["teacher_states"] = gather("states.bin")
        else:
            prepared["teacher_logits"], prepared["teacher_ids"] = gather("logits.bin"), gather("ids.bin")
        if self.temperature_index is not None:
            prepared["teacher_lse"] = gather("lse.bin")[:, self.temperature_index].contiguous()
        if self.row_weights is not None:
            weights = torch.tensor([self.row_weights[row] for row in batch["rows"]])
            prepared["label_weights"] = weights.repeat_interleave(torch.tensor(counts))
        return prepared

    def restrict(self, head: Head) -> None:
        """Replaces the head by one of fewer pieces, for which the cached log-sum-exps do not hold."""
        self.head, self.temperature_index = head, None

    def targets(self, batch: Batch) -> Targets:
        """The batch's targets on its device; prepares the batch where that was not done ahead."""
        device = batch["input_ids"].device
        is_prepared = "teacher_states" in batch or "teacher_logits" in batch
        prepared = cast(dict[str, Tensor], batch if is_prepared else self.prepare_batch(batch))
        fields = {name: prepared[name].to(device) for name in TARGET_FIELDS if name in prepared}
        lse, label_weights = fields.get("teacher_lse"), fields.get("label_weights")
        if "teacher_states" in fields:
            return fields["teacher_states"], self.head, label_weights, lse
        return TopK(*(fields[name] for name in TOP_K_FIELDS)), None, label_weights, None


class LiveTeacher:
    """Targets from the teacher in memory, which runs over each batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.head = model, head_of(model)

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch itself: there is nothing to read ahead."""
        return batch

    def targets(self, batch: Batch) -> Targets:
        """The teacher's hidden states and its head."""
        without_decoder = {name: value for name, value in batch.items() if name != "decoder"}  # the student's layers
        with torch.no_grad():
            return hidden_states(self.model, cast(Batch, without_decoder)), self.head, None, None


def fill_cache(
    config: TeacherCacheConfig, teacher: ModelDir, examples: Sequence[Example], previous_path: Path | None,
    directory: Path, job: Job,
) -> TeacherCache:  # fmt: skip
    """The cache at `previous_path` if it holds every row; else one in `directory`, with that one's rows copied.

    Raises BadConfig for the cache of another teacher.
    """
    key = teacher_key(teacher, config)
    previous = TeacherCache(previous_path) if previous_path else None
    if previous is not None and previous.teacher != key:
        raise BadConfig(
            f"{previous_path}: the cache of another teacher, or of another teacher_precision; run the teacher again"
        )
    if previous is not None and all(row_key(example) in previous.row_indices for example in examples):
        return previous
    width = read_config(teacher.base).get_text_config().hidden_size
    labels = sum(len(example.answer_ids) for example in examples)
    layout = previous.layout if previous else choose_layout(config, width, labels, job)
    teacher_pass = TeacherPass(lambda: load_teacher(teacher, config), key, layout, config)
    return cache_rows(teacher_pass, examples, previous, directory, job)
