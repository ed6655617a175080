"""An optimizer's state as checkpoints keep it: one process's or several', AdamW's or bitsandbytes' 8-bit one.

A run that falls from AdamW to 8-bit AdamW after an out-of-memory error keeps its moments: they are quantized block by
block as bitsandbytes does it (arXiv 2110.02861).
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.distributed.fsdp import part_like, whole

BLOCK = 256  # bitsandbytes' block size of 8-bit states
CODES = ("qmap1", "qmap2")  # the same table for every parameter: made again, not saved


def flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named `<parameter index>/<key>` and a JSON rest.

    From the state itself: bitsandbytes' state_dict hides its tensors in a dictionary of its own.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and key not in CODES:
                tensors[f"{index}/{key}"] = whole(value)
            elif not isinstance(value, Tensor):
                rest.setdefault(str(index), {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"rest": rest, "groups": groups}


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Puts a flattened state into `optimizer`, in the form that this optimizer and this process keep it in."""
    states: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in saved["rest"].items()}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        states.setdefault(int(index), {})[key] = value
    for group, old in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({key: value for key, value in old.items() if key in group and key in ("lr", "initial_lr")})
    if hasattr(optimizer, "check_overrides"):  # bitsandbytes keeps an embedding's state in 32 bits
        optimizer.check_overrides()
    places = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    for number, (group_number, place, parameter) in enumerate(places):
        if number in states:
            _restore_one(optimizer, (group_number, place), parameter, states[number])


def go_on(optimizer: torch.optim.Optimizer, scheduler: Any, step: int) -> None:
    """Puts the schedule where it was after `step` steps, from this run's own peak: a rollback has halved it."""
    scheduler.last_epoch = step
    rates = [peak * rate(step) for peak, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, peak, rate in zip(optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
        group["initial_lr"], group["lr"] = peak, rate
    scheduler._last_lr = rates


def _restore_one(
    optimizer: torch.optim.Optimizer, place: tuple[int, int], parameter: Tensor, state: dict[str, Any]
) -> None:
    eight_bit = hasattr(optimizer, "init_state")
    was_eight_bit = "state1" in state
    if not eight_bit:
        if was_eight_bit:
            state = {"step": torch.tensor(float(state["step"])), **_moments(state, parameter)}
        kept = optimizer.state[parameter]
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for key, value in state.items():
            if key == "step":  # fused and capturable AdamW count on the device
                kept[key] = value.to(parameter.device if on_device else "cpu")
            else:
                kept[key] = part_like(value.to(parameter.device), parameter)
        return
    cast(Any, optimizer).init_state(optimizer.param_groups[place[0]], parameter, *place)
    kept = optimizer.state[parameter]
    kept["step"] = int(state["step"])
    if was_eight_bit and state["state1"].dtype == kept["state1"].dtype:
        for key in ("state1", "state2", "absmax1", "absmax2"):
            if key in kept:
                kept[key].copy_(state[key])
        return
    import bitsandbytes.functional as bnb  # noqa: PLC0415  (seconds to import, and only for 8-bit states)

    moments = state if "exp_avg" in state else _moments(state, parameter)
    for slot, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        value = moments[name].to(parameter.device, torch.float32).view_as(parameter)
        if kept[f"state{slot}"].dtype == torch.float32:
            kept[f"state{slot}"].copy_(value)
        else:
            packed, how = bnb.quantize_blockwise(value, code=kept[f"qmap{slot}"], blocksize=BLOCK)
            kept[f"state{slot}"].copy_(packed)
            kept[f"absmax{slot}"].copy_(how.absmax)


def _moments(state: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's two moments out of an 8-bit state (or one that bitsandbytes kept in float32, being small)."""
    import bitsandbytes.functional as bnb  # noqa: PLC0415

    found: dict[str, Tensor] = {}
    for slot, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        value = state[f"state{slot}"].to(parameter.device)
        if value.dtype == torch.uint8:
            code = cast(Any, bnb).create_dynamic_map(signed=slot == "1").to(parameter.device)
            absmax = state[f"absmax{slot}"].to(parameter.device)
            value = bnb.dequantize_blockwise(value, absmax=absmax, code=code, blocksize=BLOCK)
        found[name] = value.view_as(parameter)
    return found
