"""The CUDA devices of this machine, by NVML: no torch, and no context on the card."""

import os
from itertools import takewhile
from typing import Any, NamedTuple

import pynvml


class Card(NamedTuple):
    """A CUDA device of this machine."""

    name: str
    gib: float


def smallest_card(processes: int = 1) -> Card | None:
    """The CUDA device with the least memory among those that so many processes use; None without one.

    CUDA numbers devices by speed, which is taken to be the order of their memory, unless CUDA_DEVICE_ORDER says by
    slot, as NVML does; CUDA_VISIBLE_DEVICES chooses among them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        pynvml.nvmlInit()
        devices = [_card(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
        if os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            devices.sort(key=lambda card: -card.gib)
        cards = devices if visible is None else [_chosen(name.strip(), devices) for name in visible.split(",")]
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    used = takewhile(lambda card: card is not None, cards[:processes])  # CUDA stops at a name that is no device
    return min(filter(None, used), key=lambda card: card.gib, default=None)


def _chosen(name: str, devices: list[Card]) -> Card | None:
    """The device that an entry of CUDA_VISIBLE_DEVICES names by its number or UUID."""
    if name.startswith(("GPU-", "MIG-")):
        return _card(pynvml.nvmlDeviceGetHandleByUUID(name.encode()))
    return devices[int(name)] if name.isdecimal() and int(name) < len(devices) else None


def _card(handle: Any) -> Card:
    return Card(_name(handle), pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30)


def _name(handle: Any) -> str:
    name = pynvml.nvmlDeviceGetName(handle)
    return name.decode() if isinstance(name, bytes) else str(name)
