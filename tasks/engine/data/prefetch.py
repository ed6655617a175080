"""Micro-batches made ready in two threads of their own while the device works on those before them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from tasks.engine.data.collator import Batch

DEPTH = 4


class Ahead(Dataset[Batch]):
    """`batches`, each through `prepare` and, with `pin`, into memory that a device copies from by itself."""

    def __init__(self, batches: Any, prepare: Callable[[Batch], Batch], pin: bool) -> None:
        self.batches, self.prepare, self.pin = batches, prepare, pin
        self.thread = ThreadPoolExecutor(2, "batches")
        self.coming: dict[int, Future[Batch]] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> Batch:
        self.coming = {at: batch for at, batch in self.coming.items() if place <= at}
        for at in range(place, min(place + DEPTH, len(self))):
            if at not in self.coming:
                self.coming[at] = self.thread.submit(self._make, at)
        return self.coming.pop(place).result()

    def _make(self, place: int) -> Batch:
        batch = self.prepare(self.batches[place])
        if not self.pin:
            return batch
        return cast(Batch, {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()})
