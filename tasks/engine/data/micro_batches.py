"""Datasets of micro-batches for training and validation: packed, or padded where a model cannot be packed."""

from collections.abc import Iterator, Sequence

from torch import nn
from torch.utils.data import Dataset

from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, collate
from tasks.engine.data.sampler import balance_steps
from tasks.engine.data.sequence_packing import Packing, collate_packed, pack_first_fit, pack_steps
from tasks.engine.models.lm_head import unwrap


def uses_packed_attention(model: nn.Module) -> bool:
    """Whether the model's attention keeps packed rows apart."""
    return str(unwrap(model).config.get_text_config()._attn_implementation).startswith("packed")


class MicroBatchDataset(Dataset[Batch]):
    """Micro-batches of `order` (`batch_size` rows a step), `batch_size / micro_batch` a step.

    `shapes` is the number of static lengths, 0 for each micro-batch's own; a padded row is as long as its
    micro-batch's longest. Lengths are multiples of `multiple`. Rows of `window` steps are exchanged among these steps,
    so that all are of one size (tasks.engine.data.sampler.balance_steps).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        order: Sequence[int],
        batch_size: int,
        micro_batch: int,
        packed: bool,
        shapes: int = 0,
        multiple: int = 1,
        window: int = 1,
    ) -> None:
        if window > 1:
            sizes = [(len(example.input_ids), len(example.answer_ids)) for example in examples]
            order = balance_steps(sizes, order, batch_size, window)
        self.examples, self.multiple = examples, multiple
        self.packing: Packing | None = None
        if packed:
            lengths = [len(example.input_ids) for example in examples]
            self.packing = pack_steps(lengths, order, batch_size, micro_batch, shapes, multiple)
            self.micro_batches = self.packing.micro_batches
        else:
            starts = range(0, len(order), micro_batch)
            self.micro_batches = [list(order[start : start + micro_batch]) for start in starts]

    def __len__(self) -> int:
        return len(self.micro_batches)

    @property
    def tokens(self) -> int:
        """Of all micro-batches together, without padding."""
        return sum(len(self.examples[row].input_ids) for rows in self.micro_batches for row in rows)

    def __getitem__(self, index: int) -> Batch:
        items = [(row, self.examples[row]) for row in self.micro_batches[index]]
        return collate_packed(items, self.packing) if self.packing else collate(items, self.multiple)


def evaluation_batches(examples: Sequence[Example], first: int, micro_batch: int, packed: bool) -> Iterator[Batch]:
    """Batches of all `examples`, numbered from `first` and regrouped by length; a batch has at most the tokens of
    `micro_batch` rows as long as the longest."""
    lengths = [len(example.input_ids) for example in examples]
    if packed:
        packing = pack_first_fit(lengths, micro_batch * max(lengths, default=1))
        for rows in packing.micro_batches:
            yield collate_packed([(first + row, examples[row]) for row in rows], packing)
        return
    order = sorted(range(len(examples)), key=lambda row: lengths[row])
    for start in range(0, len(order), micro_batch):
        yield collate([(first + row, examples[row]) for row in order[start : start + micro_batch]])
