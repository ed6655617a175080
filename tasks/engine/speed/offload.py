"""Activation offload: compiled layers' saved tensors wait in pinned host memory between forward and backward.

    offload = Offload(model, layers)
    with offload.layer(3):                  # around a layer's forward
        hidden = layer(hidden)

Offloaded are a layer's saved tensors of the residual stream's width: its input and its MLP's output. A second stream
copies them out while the next layers run forward, and back while the layer behind runs backward, so the copies are free
as long as a layer takes longer than its share of the bus. Attention's output stays on the device: with it the bus would
be the slower one on an H200. Works inside CUDA graphs. Unsloth offloads its layers' inputs the same way.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.engine.models.family_registry import family_of
from tasks.engine.models.lm_head import decoder_layers, unwrap

MIN_BYTES = 4 << 20  # smaller tensors stay on the device
MAX_COPIES = 4  # copies in flight before the next one waits
LAYERS_ON_DEVICE = 1  # last layers that are not offloaded: the backward begins with them
MAX_PINNED_FRACTION = 0.25  # of the host's available memory


@dataclass(eq=False)
class _OffloadedTensor:
    """A tensor in host memory, and its device copy with the event that ends the copy back."""

    layer: int
    host: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    device_copy: Tensor | None = None
    copied: torch.cuda.Event | None = None


class Offload:
    """Offloads the saved activations of one model's layers. On the CPU it copies only, for tests."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.layers = layers
        weights = [*model.parameters(), *model.buffers()]
        self.weight_storages = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self.cuda = weights[0].is_cuda
        self.width = unwrap(model).config.get_text_config().hidden_size
        self.stream = torch.cuda.Stream(weights[0].device) if self.cuda else None
        self.host_buffers: dict[tuple[int, int], Tensor] = {}
        self.offloaded: dict[int, list[_OffloadedTensor]] = {}
        self.copies_out: deque[tuple[Any, Tensor]] = deque()
        self.current_layer = 0

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Context of layer `number`'s forward, whose saved tensors are offloaded."""
        if number >= self.layers - LAYERS_ON_DEVICE:
            yield
            return
        self.current_layer, self.offloaded[number] = number, []
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _OffloadedTensor:
        if not self._is_offloadable(tensor):
            return tensor
        offloaded, storage = self.offloaded[self.current_layer], _storage_view(tensor)
        host = self._host_buffer((self.current_layer, len(offloaded)), storage)
        entry = _OffloadedTensor(self.current_layer, host, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        offloaded.append(entry)
        if self.stream is None:
            host.copy_(storage)
            return entry
        main_stream = torch.cuda.current_stream()
        self.stream.wait_stream(main_stream)
        with torch.cuda.stream(self.stream):
            host.copy_(storage, non_blocking=True)
            self.copies_out.append((self.stream.record_event(), tensor))
        while len(self.copies_out) > MAX_COPIES:  # after the wait the allocator may reuse the tensor's memory
            main_stream.wait_event(self.copies_out.popleft()[0])
        return entry

    def _is_offloadable(self, tensor: Tensor) -> bool:
        """Whether a tensor is a large activation of the residual stream's width, padded columns included."""
        size, storage = tensor.numel() * tensor.element_size(), tensor.untyped_storage()
        if size < MIN_BYTES or tensor.shape[-1] != self.width or tensor.is_cuda != self.cuda:
            return False
        return storage.data_ptr() not in self.weight_storages and storage.nbytes() <= 1.25 * size

    def _unpack(self, entry: Tensor | _OffloadedTensor) -> Tensor:
        if isinstance(entry, Tensor):
            return entry
        if entry.layer == self.layers - LAYERS_ON_DEVICE - 1:
            self._wait_for_copies()
        for layer in (entry.layer, entry.layer - 1):
            for other in self.offloaded.get(layer, []):
                self._start_copy_back(other)
        tensor, entry.device_copy = entry.device_copy, None
        self.offloaded[entry.layer].remove(entry)
        assert tensor is not None  # just fetched
        tensor = tensor.as_strided(entry.shape, entry.stride, entry.offset)
        if entry.copied is not None:
            torch.cuda.current_stream().wait_event(entry.copied)
        return tensor

    def _start_copy_back(self, entry: _OffloadedTensor) -> None:
        """Starts the copy to the device, unless it was started before."""
        if entry.device_copy is not None:
            return
        entry.device_copy = torch.empty_like(entry.host, device="cuda" if self.cuda else "cpu", pin_memory=False)
        if self.stream is None:
            entry.device_copy.copy_(entry.host)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            entry.device_copy.copy_(entry.host, non_blocking=True)
            entry.copied = self.stream.record_event()

    def _wait_for_copies(self) -> None:
        """Waits for the copies to the host that the forward left in flight."""
        while self.copies_out:
            torch.cuda.current_stream().wait_event(self.copies_out.popleft()[0])

    def _host_buffer(self, slot: tuple[int, int], tensor: Tensor) -> Tensor:
        """Pinned buffer of a slot (layer, index), the same in every step: CUDA graphs hold its address."""
        size = tensor.numel() * tensor.element_size()
        if slot not in self.host_buffers or self.host_buffers[slot].numel() < size:
            self.host_buffers[slot] = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        return self.host_buffers[slot][:size].view(tensor.dtype)


def _storage_view(tensor: Tensor) -> Tensor:
    """A tensor's whole storage, flat: contiguous, so copied at the bus's full speed."""
    return tensor.new_empty(0).set_(tensor.untyped_storage())


def fits_host_memory(size: float) -> bool:
    """Whether `size` bytes may be pinned on this host."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return size < MAX_PINNED_FRACTION * 1024 * int(fields["MemAvailable"].split()[0])


def offloaded_bytes_per_token(model: nn.Module) -> int:
    """Bytes per token that all layers offload: inputs and MLP outputs, half precision (Gemma 3n's streams: float32)."""
    text = unwrap(model).config.get_text_config()
    streams = family_of(text.model_type).streams(text)
    return len(decoder_layers(model)) * int(text.hidden_size) * (2 + streams * (4 if streams > 1 else 2))
