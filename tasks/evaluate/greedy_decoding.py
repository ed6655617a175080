"""Greedy decoding of many prompts in a few slots that are filled again as soon as rows end.

All rows write their next key and value into the same column of one cache; a row that joins late has its prompt laid
just before that column, and everything left of it masked. Columns that no living row uses are dropped. So no row waits
for the batch's slowest, no architecture needs to know, and each row's positions count from its own first token.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from tasks.evaluate.generation import Asked, Latency

ROOM = 64
"""Columns added to the cache at once."""


class Guide(Protocol):
    """Holds answers to a grammar; rows are named by their place in `Asked.prompts`."""

    def allow(self, places: Sequence[int], logits: Tensor) -> Tensor:
        """The logits [rows, vocabulary] with what may not come next at -inf."""

    def accept(self, place: int, token: int) -> None:
        """The row goes on with this token."""


class NotFinite(Exception):
    """The row at `place` has NaN or infinite logits."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


class _Columns(DynamicLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """A layer's keys and values [rows, heads, columns, head width], with room to write the next columns in place."""

    keys: Tensor
    values: Tensor
    room: list[Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keep(key_states, value_states)
            return key_states, value_states
        old, new = self.keys.shape[2], key_states.shape[2]
        if old + new > self.room[0].shape[2]:
            self.keep(self.keys, self.values)
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, old : old + new] = states
        self.keys, self.values = (room[:, :, : old + new] for room in self.room)
        return self.keys, self.values

    def keep(self, keys: Tensor, values: Tensor) -> None:
        """Takes these as its contents, with new room behind them."""
        self.room = [torch.nn.functional.pad(states, (0, 0, 0, ROOM)) for states in (keys, values)]
        self.keys, self.values = (room[:, :, : keys.shape[2]] for room in self.room)


class _Batch:
    """The rows in the slots. `answers` are their ids so far; a dead row stays until the next `keep`."""

    def __init__(self, model: PreTrainedModel, asked: Asked, guide: Guide | None, places: list[int]) -> None:
        self.asked, self.guide, self.places = asked, guide, places
        self.answers: list[list[int]] = [[] for _ in places]
        self.alive = [True] * len(places)
        prompts = [asked.prompts[place] for place in places]
        width = max(map(len, prompts))
        pad = min(asked.ends)  # masked, so any id serves
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in prompts], device=model.device)
        self.mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=model.device)
        self.length = self.mask.sum(1, keepdim=True)
        self.cache = Cache(layer_class_to_replicate=_Columns)
        self.forward(model, ids, (self.mask.cumsum(1) - 1).clamp(min=0))

    @property
    def layers(self) -> list[_Columns]:
        """The cache's layers."""
        return cast(list[_Columns], self.cache.layers)

    def forward(self, model: PreTrainedModel, ids: Tensor, positions: Tensor) -> None:
        """Runs the model on the newest columns and takes each row's next token."""
        logits = model(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        broken = ~(logits.amax(-1).isfinite() & logits.amin(-1).isfinite())
        if self.guide is not None:
            logits = self.guide.allow(self.places, logits)
        self.next = logits.argmax(-1, keepdim=True)
        tokens = torch.where(broken, -1, self.next[:, 0]).tolist()  # the one time a step that the device is waited for
        for row, token in enumerate(tokens):
            if self.alive[row]:
                self._take(row, token)

    def _take(self, row: int, token: int) -> None:
        if token < 0:
            raise NotFinite(self.places[row])
        answer, asked = self.answers[row], self.asked
        answer.append(token)
        ended = token in asked.ends or len(answer) >= asked.max_new_tokens
        self.alive[row] = not (ended or (asked.whole is not None and asked.whole(answer)))
        if self.guide is not None and self.alive[row]:
            self.guide.accept(self.places[row], token)

    def step(self, model: PreTrainedModel) -> None:
        """One more token for every row; a dead row's is thrown away."""
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.forward(model, self.next, self.length)
        self.length += 1

    def keep(self) -> "_Batch":
        """Itself without its dead rows, and without the columns that only they used."""
        rows = [row for row, alive in enumerate(self.alive) if alive]
        self.places, self.answers = [self.places[row] for row in rows], [self.answers[row] for row in rows]
        self.alive = [True] * len(rows)
        index = torch.tensor(rows, device=self.mask.device)
        self.mask, self.length, self.next = (one[index] for one in (self.mask, self.length, self.next))
        first = int(self.mask.argmax(1).min())
        self.mask = self.mask[:, first:]
        for layer in self.layers:
            layer.keep(layer.keys[index, :, first:], layer.values[index, :, first:])
        return self

    def join(self, other: "_Batch") -> "_Batch":
        """Itself with the rows of another batch, so that the newest column of both is the same one."""
        self.places += other.places
        self.answers += other.answers
        self.alive += other.alive
        short = max(self.mask.shape[1], other.mask.shape[1])

        def stacked(ours: Tensor, theirs: Tensor, dim: int) -> Tensor:
            """Both below each other, the narrower one moved to the right."""
            behind = [0] * (2 * (ours.ndim - 1 - dim))
            pads = [[*behind, short - one.shape[dim], 0] for one in (ours, theirs)]
            both = [torch.nn.functional.pad(one, pad) for one, pad in zip((ours, theirs), pads, strict=True)]
            return torch.cat(both)

        self.mask = stacked(self.mask, other.mask, 1)
        self.length, self.next = torch.cat([self.length, other.length]), torch.cat([self.next, other.next])
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.keep(stacked(layer.keys, new.keys, 2), stacked(layer.values, new.values, 2))
        return self


@torch.inference_mode()
def decode(
    model: PreTrainedModel, asked: Asked, places: Sequence[int], slots: int, guide: Guide | None = None
) -> Iterator[tuple[int, list[int]]]:
    """Yields (place, answer's ids, an end token included) as rows end; prompts of like length start together.

    Slots are filled again when a quarter of them is free. Raises NotFinite.
    """
    waiting = deque(sorted(places, key=lambda place: (-len(asked.prompts[place]), place)))
    batch: _Batch | None = None
    while waiting or batch is not None:
        if batch is not None and 4 * batch.alive.count(False) >= len(batch.alive):
            ended = [row for row, alive in enumerate(batch.alive) if not alive]
            yield from [(batch.places[row], batch.answers[row]) for row in ended]
            batch = batch.keep() if any(batch.alive) else None
        free = slots - (len(batch.places) if batch is not None else 0)
        if waiting and 4 * free >= slots:
            new = _Batch(model, asked, guide, [waiting.popleft() for _ in range(min(free, len(waiting)))])
            batch = new if batch is None else batch.join(new)
        if batch is not None and any(batch.alive):
            batch.step(model)


@torch.inference_mode()
def decode_alone(model: PreTrainedModel, asked: Asked, place: int) -> Latency:
    """One row in one slot, timed. Raises NotFinite."""
    start = time.perf_counter()
    batch = _Batch(model, asked, None, [place])
    first = time.perf_counter() - start
    while batch.alive[0]:
        batch.step(model)
    return Latency(first, time.perf_counter() - start, len(batch.answers[0]))
