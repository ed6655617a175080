"""Micro-batches prepared in background threads while the device works on earlier ones."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from tasks.engine.data.collator import Batch

DEPTH = 4


class PrefetchDataset(Dataset[Batch]):
    """`batches`, each passed through `prepare` and, with `pin`, into pinned host memory, `DEPTH` of them in advance."""

    def __init__(self, batches: Any, prepare: Callable[[Batch], Batch], pin: bool) -> None:
        self.batches, self.prepare, self.pin = batches, prepare, pin
        self.threads = ThreadPoolExecutor(2, "batches")
        self.pending: dict[int, Future[Batch]] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        self.pending = {i: batch for i, batch in self.pending.items() if index <= i}
        for i in range(index, min(index + DEPTH, len(self))):
            if i not in self.pending:
                self.pending[i] = self.threads.submit(self._prepared, i)
        return self.pending.pop(index).result()

    def _prepared(self, index: int) -> Batch:
        batch = self.prepare(self.batches[index])
        if not self.pin:
            return batch
        return cast(Batch, {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()})
