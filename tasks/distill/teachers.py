"""Where the loss gets the teacher from: its remembered states, or the teacher itself beside the student."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill.teacher_cache import TEMPERATURES, StatesConfig
from tasks.distill.teacher_cache.hidden_states import States, row_key, teacher_key
from tasks.distill.teacher_cache.load_teacher import load_teacher
from tasks.distill.teacher_cache.teacher_pass import Ask, remember_rows, what_to_keep
from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch
from tasks.engine.losses.loss_mix import Head, TopK
from tasks.engine.models.dtypes import pick_device
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.models.model_config import read_config

TAUGHT = ("teacher_logits", "teacher_ids", "teacher_lse", "teacher_states", "label_weights")


class TaughtBatch(Batch, total=False):
    """A batch with what its N labels are taught: states (N, G) or a top k, its log-sum-exps at the run's temperature
    and each label's weight (N,)."""

    teacher_states: Tensor
    teacher_logits: Tensor
    teacher_ids: Tensor
    teacher_lse: Tensor
    label_weights: Tensor


class Remembered:
    """Memory-mapped states of numbered rows. `head` reads them; None for a top k, which needs none."""

    def __init__(self, states: States, examples: Sequence[Example], temperature: float) -> None:
        self.states = states
        self.places = [states.labels(row_key(example)) for example in examples]
        self.weights: list[float] | None = None
        self.head: Head | None = None
        self.at = TEMPERATURES.index(temperature) if temperature in TEMPERATURES else None
        if states.kept.top_k:
            if self.at is None:
                named = ", ".join(f"{t:g}" for t in TEMPERATURES)
                raise BadConfig(f"temperature={temperature:g}: with the top k kept, it must be one of {named}")
        else:
            head = states.head()
            self.head = Head(head.weight.to(pick_device()), head.softcap)

    def enrich(self, batch: Batch) -> TaughtBatch:
        """The batch with what is known of its rows, on the host."""
        places, found = [self.places[row] for row in batch["rows"]], cast(TaughtBatch, dict(batch))

        def gather(name: str) -> Tensor:
            tensor, pin = self.states.tensors[name], torch.cuda.is_available()
            count = sum(place.stop - place.start for place in places)
            out = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=pin)
            return torch.cat([tensor[place] for place in places], out=out)  # where the device copies it from by itself

        if self.head is not None:
            found["teacher_states"] = gather("states.bin")
        else:
            found["teacher_logits"], found["teacher_ids"] = gather("logits.bin"), gather("ids.bin")
        if self.at is not None:
            found["teacher_lse"] = gather("lse.bin")[:, self.at].contiguous()
        if self.weights is not None:
            counts = torch.tensor([place.stop - place.start for place in places])
            weights = torch.tensor([self.weights[row] for row in batch["rows"]])
            found["label_weights"] = weights.repeat_interleave(counts)
        return found

    def restrict(self, head: Head) -> None:
        """Takes a head of fewer pieces; the sums over all are then of no use."""
        self.head, self.at = head, None

    def known(self, batch: Batch) -> tuple[Tensor | TopK, Head | None, Tensor | None, Tensor | None]:
        """What the loss takes: states or top k, the head, the labels' weights and the log-sum-exps where they are
        known; on the batch's device."""
        device = batch["input_ids"].device
        taught = cast(
            dict[str, Tensor], batch if "teacher_states" in batch or "teacher_logits" in batch else self.enrich(batch)
        )
        there = {name: taught[name].to(device) for name in TAUGHT if name in taught}
        lse, weights = there.get("teacher_lse"), there.get("label_weights")
        if "teacher_states" in there:
            return there["teacher_states"], self.head, weights, lse
        return TopK(*(there[name] for name in TAUGHT[:3])), None, weights, None


class Online:
    """The teacher in memory, asked anew whenever a row comes by."""

    weights: list[float] | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.head = model, head_of(model)

    def enrich(self, batch: Batch) -> Batch:
        """Nothing is known beforehand."""
        return batch

    def known(self, batch: Batch) -> tuple[Tensor, Head, None, None]:
        """As `Remembered.known`, with states made now."""
        own = cast(Batch, {name: value for name, value in batch.items() if name != "decoder"})  # the student's layers
        with torch.no_grad():
            return hidden_states(self.model, own), self.head, None, None


def remembered(
    config: StatesConfig, teacher: ModelDir, examples: Sequence[Example], given: Path | None, directory: Path, job: Job
) -> States:
    """`given` states if they hold every row; else states in `directory`, of which `given` saves what it has."""
    name = teacher_key(teacher, config)
    known = States(given) if given else None
    if known is not None and known.teacher != name:
        raise BadConfig(f"{given}: the states of another teacher, or of another teacher_precision; make them anew")
    if known is not None and all(row_key(example) in known.places for example in examples):
        return known
    width = read_config(teacher.base).get_text_config().hidden_size
    labels = sum(len(example.answer_ids) for example in examples)
    kept = known.kept if known else what_to_keep(config, width, labels, job)
    ask = Ask(lambda: load_teacher(teacher, config), name, kept, config)
    return remember_rows(ask, examples, known, directory, job)
