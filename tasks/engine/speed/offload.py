"""What compiled layers keep for the backward pass, kept in the host's memory meanwhile.

    offload = Offload(model)
    with offload.layer(3):                  # around a layer's forward
        hidden = layer(hidden)

What a layer keeps as wide as the residual stream, its input and its MLP's output, is copied to pinned memory while the
next layers work, and copied back while the layer behind it goes backward, on a stream of their own: the copies cost no
time as long as a layer takes longer than they need on the bus. Attention's output stays: with it, the bus would be the
slower one on an H200. It works inside CUDA graphs too. Unsloth does the same with its layers' inputs.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.engine.models.lm_head import layers_of, unwrap

LEAST = 4 << 20  # bytes: smaller tensors stay
UNDERWAY = 4  # tensors being copied before the next one waits
LAST_KEPT = 1  # layers at the end that keep theirs: the backward begins with them
SHARE = 0.25  # of the host's free memory that may be pinned


@dataclass(eq=False)
class _Away:
    """A tensor in host memory, and its copy on the device while it is on its way back."""

    layer: int
    host: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    back: Tensor | None = None
    there: torch.cuda.Event | None = None


class Offload:
    """The activations that one model's layers keep. On the CPU they are only copied, so that it can be tried there."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.layers = layers
        weights = [*model.parameters(), *model.buffers()]
        self.own = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self.cuda = weights[0].is_cuda
        self.width = unwrap(model).config.get_text_config().hidden_size
        self.stream = torch.cuda.Stream(weights[0].device) if self.cuda else None
        self.hosts: dict[tuple[int, int], Tensor] = {}
        self.away: dict[int, list[_Away]] = {}
        self.leaving: deque[tuple[Any, Tensor]] = deque()
        self.now = 0

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Layer `number` of the model works inside."""
        if number >= self.layers - LAST_KEPT:
            yield
            return
        self.now, self.away[number] = number, []
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Away:
        if not self._goes(tensor):
            return tensor
        kept, whole = self.away[self.now], _whole(tensor)
        host = self._host((self.now, len(kept)), whole)
        one = _Away(self.now, host, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        kept.append(one)
        if self.stream is None:
            host.copy_(whole)
            return one
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            host.copy_(whole, non_blocking=True)
            self.leaving.append((self.stream.record_event(), tensor))
        while len(self.leaving) > UNDERWAY:  # its memory may be used again by what comes after the wait
            main.wait_event(self.leaving.popleft()[0])
        return one

    def _goes(self, tensor: Tensor) -> bool:
        """Whether it is a large activation as wide as the residual stream; one with a few more columns counts."""
        size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
        if size < LEAST or tensor.shape[-1] != self.width or tensor.is_cuda != self.cuda:
            return False
        return storage.data_ptr() not in self.own and storage.nbytes() <= 1.25 * size

    def _unpack(self, kept: Tensor | _Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.layer == self.layers - LAST_KEPT - 1:
            self._let_go()
        for layer in (kept.layer, kept.layer - 1):
            for one in self.away.get(layer, []):
                self._fetch(one)
        back, kept.back = kept.back, None
        self.away[kept.layer].remove(kept)
        assert back is not None  # just fetched
        back = back.as_strided(kept.shape, kept.stride, kept.offset)
        if kept.there is not None:
            torch.cuda.current_stream().wait_event(kept.there)
        return back

    def _fetch(self, one: _Away) -> None:
        """Starts a tensor's way back."""
        if one.back is not None:
            return
        one.back = torch.empty_like(one.host, device="cuda" if self.cuda else "cpu", pin_memory=False)
        if self.stream is None:
            one.back.copy_(one.host)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            one.back.copy_(one.host, non_blocking=True)
            one.there = self.stream.record_event()

    def _let_go(self) -> None:
        """Of the tensors whose copies the forward did not wait for."""
        while self.leaving:
            torch.cuda.current_stream().wait_event(self.leaving.popleft()[0])

    def _host(self, place: tuple[int, int], tensor: Tensor) -> Tensor:
        """Pinned memory for a flat tensor, the same for the same place in every step: a CUDA graph has its address."""
        size = tensor.numel() * tensor.element_size()
        if place not in self.hosts or self.hosts[place].numel() < size:
            self.hosts[place] = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        return self.hosts[place][:size].view(tensor.dtype)


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, which is what can be copied at the bus's speed."""
    return tensor.new_empty(0).set_(tensor.untyped_storage())


def host_has(size: float) -> bool:
    """Whether the host has so many bytes to pin."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return size < SHARE * 1024 * int(fields["MemAvailable"].split()[0])


def kept_a_token(model: nn.Module) -> int:
    """Bytes a token that all layers keep away: their inputs and their MLPs' outputs, in half precision (several streams
    of Gemma 3n's: in float32)."""
    text = unwrap(model).config.get_text_config()
    streams = int(getattr(text, "altup_num_inputs", 1))
    return len(layers_of(model)) * int(text.hidden_size) * (2 + streams * (4 if streams > 1 else 2))
