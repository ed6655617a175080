"""Saves and restores optimizer state across world sizes, and between AdamW and bitsandbytes' 8-bit AdamW.

A run that changes from AdamW to 8-bit AdamW after an out-of-memory error keeps its moments: they are quantized block by
block as bitsandbytes does (arXiv 2110.02861).
"""

from typing import Any, cast

import torch
from torch import Tensor

from tasks.engine.distributed.fsdp import full_tensor, shard_like

BLOCK = 256  # bitsandbytes' block size of 8-bit states
CODEBOOKS = ("qmap1", "qmap2")  # constant tables: created again, not saved


def flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors named `<parameter index>/<key>`, and its other values as JSON.

    Read from `optimizer.state`: bitsandbytes' state_dict nests its tensors in a dictionary of its own.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and key not in CODEBOOKS:
                tensors[f"{index}/{key}"] = full_tensor(value)
            elif not isinstance(value, Tensor):
                scalars.setdefault(str(index), {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"rest": scalars, "groups": groups}


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Puts a flattened state into `optimizer`, sharded and quantized as this optimizer keeps it."""
    states: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in saved["rest"].items()}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        states.setdefault(int(index), {})[key] = value
    for group, saved_group in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update({key: saved_group[key] for key in ("lr", "initial_lr") if key in group and key in saved_group})
    if hasattr(optimizer, "check_overrides"):  # bitsandbytes keeps an embedding's state in 32 bits
        optimizer.check_overrides()
    parameters = [((g, i), p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    for number, (position, parameter) in enumerate(parameters):
        if number in states:
            _restore_parameter(optimizer, position, parameter, states[number])


def resume_schedule(optimizer: torch.optim.Optimizer, scheduler: Any, step: int) -> None:
    """Sets the schedule to `step` finished steps, from this run's own peak rate: a rollback has halved it."""
    scheduler.last_epoch = step
    rates = [peak * rate(step) for peak, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, peak, rate in zip(optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
        group["initial_lr"], group["lr"] = peak, rate
    scheduler._last_lr = rates


def _restore_parameter(
    optimizer: torch.optim.Optimizer, position: tuple[int, int], parameter: Tensor, state: dict[str, Any]
) -> None:
    """Restores a parameter's state; `position` is its group's number and its own in the group."""
    eight_bit = hasattr(optimizer, "init_state")
    was_eight_bit = "state1" in state
    if not eight_bit:
        if was_eight_bit:
            state = {"step": torch.tensor(float(state["step"])), **_moments(state, parameter)}
        target = optimizer.state[parameter]
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        for key, value in state.items():
            if key == "step":  # fused and capturable AdamW count on the device
                target[key] = value.to(parameter.device if on_device else "cpu")
            else:
                target[key] = shard_like(value.to(parameter.device), parameter)
        return
    cast(Any, optimizer).init_state(optimizer.param_groups[position[0]], parameter, *position)
    target = optimizer.state[parameter]
    target["step"] = int(state["step"])
    if was_eight_bit and state["state1"].dtype == target["state1"].dtype:
        for key in ("state1", "state2", "absmax1", "absmax2"):
            if key in target:
                target[key].copy_(state[key])
        return
    import bitsandbytes.functional as bnb  # noqa: PLC0415  (seconds to import, and only for 8-bit states)

    moments = state if "exp_avg" in state else _moments(state, parameter)
    for slot, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        value = moments[name].to(parameter.device, torch.float32).view_as(parameter)
        if target[f"state{slot}"].dtype == torch.float32:
            target[f"state{slot}"].copy_(value)
        else:
            codes, quant_state = bnb.quantize_blockwise(value, code=target[f"qmap{slot}"], blocksize=BLOCK)
            target[f"state{slot}"].copy_(codes)
            target[f"absmax{slot}"].copy_(quant_state.absmax)


def _moments(state: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's two moments from an 8-bit state, or from a small parameter's, which bitsandbytes keeps in float32."""
    import bitsandbytes.functional as bnb  # noqa: PLC0415

    moments: dict[str, Tensor] = {}
    for slot, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
        value = state[f"state{slot}"].to(parameter.device)
        if value.dtype == torch.uint8:
            code = cast(Any, bnb).create_dynamic_map(signed=slot == "1").to(parameter.device)
            absmax = state[f"absmax{slot}"].to(parameter.device)
            value = bnb.dequantize_blockwise(value, absmax=absmax, code=code, blocksize=BLOCK)
        moments[name] = value.view_as(parameter)
    return moments
