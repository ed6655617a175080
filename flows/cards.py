"""The CUDA devices of this machine, by NVML: no torch, and no context on the card."""

from typing import Any, NamedTuple

import pynvml


class Card(NamedTuple):
    """The smallest CUDA device of this machine."""

    name: str
    gib: float


def smallest_card() -> Card | None:
    """The CUDA device with the least memory, by NVML; None without one."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cards = [Card(_name(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30) for handle in handles]
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return min(cards, key=lambda card: card.gib, default=None)


def _name(handle: Any) -> str:
    name = pynvml.nvmlDeviceGetName(handle)
    return name.decode() if isinstance(name, bytes) else str(name)
