"""Greedy decoding with continuous batching: slots are refilled as soon as rows end.

All rows write their next key and value into the same column of one cache; the prompt of a row that joins late ends just
before that column, and everything left of it is masked. Columns that no unfinished row uses are dropped. So no row
waits for the batch's slowest, any architecture works, and each row's positions count from its own first token.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from tasks.evaluate.generation import GenerationRequest, Latency

CACHE_GROWTH = 64
"""Columns that are added to the cache at once."""


class Guide(Protocol):
    """Constrains answers to a grammar; rows are named by their index in `GenerationRequest.prompts`."""

    def allow(self, indices: Sequence[int], logits: Tensor) -> Tensor:
        """The logits [rows, vocabulary] with -inf for tokens that the grammar does not allow next."""

    def accept(self, index: int, token: int) -> None:
        """Advances the row's grammar by this token."""


class NotFinite(Exception):
    """The row `index` has NaN or infinite logits."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """A layer's keys and values [rows, heads, columns, head width], in buffers with room for the next columns."""

    keys: Tensor
    values: Tensor
    buffers: list[Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.store(key_states, value_states)
            return key_states, value_states
        old, new = self.keys.shape[2], key_states.shape[2]
        if old + new > self.buffers[0].shape[2]:
            self.store(self.keys, self.values)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, old : old + new] = states
        self.keys, self.values = (buffer[:, :, : old + new] for buffer in self.buffers)
        return self.keys, self.values

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Copies these into new buffers with room for CACHE_GROWTH more columns."""
        self.buffers = [torch.nn.functional.pad(states, (0, 0, 0, CACHE_GROWTH)) for states in (keys, values)]
        self.keys, self.values = (buffer[:, :, : keys.shape[2]] for buffer in self.buffers)


class _Batch:
    """The rows in the slots. `answers` are their ids so far; a finished row stays until `drop_finished`."""

    def __init__(
        self, model: PreTrainedModel, request: GenerationRequest, guide: Guide | None, indices: list[int]
    ) -> None:
        self.request, self.guide, self.indices = request, guide, indices
        self.answers: list[list[int]] = [[] for _ in indices]
        self.active = [True] * len(indices)
        prompts = [request.prompts[index] for index in indices]
        width = max(map(len, prompts))
        pad = min(request.end_ids)  # masked, so any id serves
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self.mask = torch.tensor(mask, device=model.device)
        self.length = self.mask.sum(1, keepdim=True)
        self.cache = Cache(layer_class_to_replicate=_GrowingLayer)
        self.forward(model, ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    @property
    def layers(self) -> list[_GrowingLayer]:
        """The cache's layers."""
        return cast(list[_GrowingLayer], self.cache.layers)

    def forward(self, model: PreTrainedModel, ids: Tensor, positions: Tensor) -> None:
        """Runs the model on the newest columns and appends each row's next token."""
        logits = model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        broken = ~(logits.amax(-1).isfinite() & logits.amin(-1).isfinite())
        if self.guide is not None:
            logits = self.guide.allow(self.indices, logits)
        self.next = logits.argmax(-1, keepdim=True)
        tokens = torch.where(broken, -1, self.next[:, 0]).tolist()  # the only synchronization with the device in a step
        for row, token in enumerate(tokens):
            if self.active[row]:
                self._append(row, token)

    def _append(self, row: int, token: int) -> None:
        if token < 0:
            raise NotFinite(self.indices[row])
        answer, request = self.answers[row], self.request
        answer.append(token)
        ended = token in request.end_ids or len(answer) >= request.max_new_tokens
        self.active[row] = not (ended or (request.is_complete is not None and request.is_complete(answer)))
        if self.guide is not None and self.active[row]:
            self.guide.accept(self.indices[row], token)

    def step(self, model: PreTrainedModel) -> None:
        """Generates one more token for every row; a finished row's is thrown away."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.forward(model, self.next, self.length)
        self.length += 1

    def drop_finished(self) -> "_Batch":
        """Removes finished rows, and the columns that only they used; returns itself."""
        rows = [row for row, active in enumerate(self.active) if active]
        self.indices, self.answers = [self.indices[row] for row in rows], [self.answers[row] for row in rows]
        self.active = [True] * len(rows)
        index = torch.tensor(rows, device=self.mask.device)
        self.mask, self.length, self.next = self.mask[index], self.length[index], self.next[index]
        first = int(self.mask.argmax(1).min())
        self.mask = self.mask[:, first:]
        for layer in self.layers:
            layer.store(layer.keys[index, :, first:], layer.values[index, :, first:])
        return self

    def join(self, other: "_Batch") -> "_Batch":
        """Appends the rows of another batch, aligned at the newest column; returns itself."""
        self.indices += other.indices
        self.answers += other.answers
        self.active += other.active
        width = max(self.mask.shape[1], other.mask.shape[1])

        def stack(tensors: tuple[Tensor, Tensor], dim: int) -> Tensor:
            """Concatenates along the rows, the narrower one padded on the left of `dim`."""
            trailing = [0] * (2 * (tensors[0].ndim - 1 - dim))
            pads = [[*trailing, width - tensor.shape[dim], 0] for tensor in tensors]
            return torch.cat([torch.nn.functional.pad(*padded) for padded in zip(tensors, pads, strict=True)])

        self.mask = stack((self.mask, other.mask), 1)
        self.length, self.next = torch.cat([self.length, other.length]), torch.cat([self.next, other.next])
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.store(stack((layer.keys, new.keys), 2), stack((layer.values, new.values), 2))
        return self


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    request: GenerationRequest,
    indices: Sequence[int],
    slots: int,
    guide: Guide | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (index, answer's ids, an end token included) as rows end; prompts of like length start together.

    Slots are refilled when a quarter of them is free. Raises NotFinite.
    """
    waiting = deque(sorted(indices, key=lambda index: (-len(request.prompts[index]), index)))
    batch: _Batch | None = None
    while waiting or batch is not None:
        if batch is not None and 4 * batch.active.count(False) >= len(batch.active):
            ended = [row for row, active in enumerate(batch.active) if not active]
            yield from [(batch.indices[row], batch.answers[row]) for row in ended]
            batch = batch.drop_finished() if any(batch.active) else None
        free = slots - (len(batch.indices) if batch is not None else 0)
        if waiting and 4 * free >= slots:
            new = _Batch(model, request, guide, [waiting.popleft() for _ in range(min(free, len(waiting)))])
            batch = new if batch is None else batch.join(new)
        if batch is not None and any(batch.active):
            batch.step(model)


@torch.inference_mode()
def decode_single(model: PreTrainedModel, request: GenerationRequest, index: int) -> Latency:
    """Decodes one row in one slot and times it. Raises NotFinite."""
    start = time.perf_counter()
    batch = _Batch(model, request, None, [index])
    first = time.perf_counter() - start
    while batch.active[0]:
        batch.step(model)
    return Latency(first, time.perf_counter() - start, len(batch.answers[0]))
