"""What a run takes from tasks.engine.speed, in the one module that imports it.

Without that package rows are padded, and layers and adapters run as transformers and peft wrote them: slower, the same
losses up to rounding.
"""

import importlib.util
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.engine.data.micro_batches import MicroBatchDataset
from tasks.engine.data.sampler import row_order
from tasks.engine.distributed import ranks
from tasks.engine.distributed.fsdp import shard_layers
from tasks.engine.models.dtypes import pick_dtype
from tasks.engine.models.lm_head import decoder_layers, unwrap
from tasks.engine.training.spec import TrainingSpec

AVAILABLE = importlib.util.find_spec("tasks.engine.speed") is not None
if TYPE_CHECKING or AVAILABLE:
    from tasks.engine.speed.compile import compiling_pays, configure_layers
    from tasks.engine.speed.cuda_graphs import CudaGraphs, padded_label_counts
    from tasks.engine.speed.fp8.matmul import unsupported_reason
    from tasks.engine.speed.fused_lora.fused_layers import fuse_adapters
    from tasks.engine.speed.offload import fits_host_memory, offloaded_bytes_per_token
    from tasks.engine.speed.packing_support import enable_packing

MISSING = "tasks.engine.speed is not installed"


def pack_attention(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Gives the model attention over packed rows; None, or the reason why its rows have to be padded.

    `dtype` is what queries and keys are multiplied in.
    """
    return enable_packing(model, dtype) if AVAILABLE else MISSING


def fp8_problem(device: torch.device) -> str | None:
    """Why the device cannot multiply in 8-bit floats; None where it can."""
    return unsupported_reason(device) if AVAILABLE else MISSING


def training_batches(spec: TrainingSpec, model: PreTrainedModel) -> MicroBatchDataset:
    """The micro-batches of this process's rows, packed where the model's attention can be."""
    config, device, packed = spec.config, model.device, False
    if config.packing == "auto":
        reason = pack_attention(model, pick_dtype(config.precision, device.type))
        packed = reason is None
        if reason:
            spec.warn(f"{reason}. Rows are padded instead")
    lengths = [len(example.input_ids) for example in spec.examples]
    order = ranks.rows_of_rank(row_order(lengths, config.batch_size, spec.steps, config.seed), config.batch_size)
    on_cuda = device.type == "cuda"
    return MicroBatchDataset(
        spec.examples, order, spec.rank_batch_size, spec.micro_batch, packed, shapes=2 * on_cuda,
        multiple=128 if on_cuda else 1, window=spec.window if on_cuda else 1,
    )  # fmt: skip


def accelerate(spec: TrainingSpec, model: PreTrainedModel, batches: MicroBatchDataset) -> "CudaGraphs | None":
    """Shards, fuses, checkpoints and compiles the model's layers as the config says; CUDA graphs where they fit."""
    if not AVAILABLE:
        _plain_layers(spec, model)
        return None
    accelerate_layers(spec, model, batches)
    return _cuda_graphs(spec, model, batches)


def accelerate_layers(spec: TrainingSpec, model: PreTrainedModel, batches: MicroBatchDataset) -> None:
    """Fuses adapters, shards weights, recomputes, compiles and offloads layers."""
    config = spec.config
    if spec.is_sharded and spec.fp8:
        raise BadConfig("fp8 needs unsharded weights: set strategy=ddp, or fp8=false")
    groups = fuse_adapters(
        model, not config.gradient_checkpointing, spec.fp8, spec.is_sharded, _gather_dtype(spec, model)
    )
    fp8_layers = sum(group.fp8 for group in groups) // 2
    if spec.fp8 and not fp8_layers:
        raise BadConfig(
            "fp8 fits none of this model's MLPs: it takes dense weights whose widths are multiples of 128, with plain "
            "adapters on gate, up and down. Set fp8=false"
        )
    pays = compiling_pays(model, len(batches), batches.tokens / max(1, len(batches)), config.gradient_checkpointing)
    compiled = config.compile == "on" or (config.compile == "auto" and pays)
    offloads = compiled and config.gradient_checkpointing and model.device.type == "cuda" and not spec.is_sharded
    offloads = offloads and _fits_host(model, batches)
    configure_layers(model, config.gradient_checkpointing, compiled, config.dropout > 0, offloads, warn=spec.warn)
    if model.device.type == "cuda":
        applied = [f"{len(groups)} groups of adapters fused"] * bool(groups) + ["layers compiled"] * compiled
        applied += [f"{fp8_layers} MLPs in 8 bits"] * bool(fp8_layers) + ["activations kept in host memory"] * offloads
        spec.job.log(", ".join([*applied, "rows packed" if batches.packing else "rows padded"]))


def _gather_dtype(spec: TrainingSpec, model: PreTrainedModel) -> torch.dtype | None:
    """The half-precision dtype in which sharded weights are gathered; None for their own."""
    dtype = pick_dtype(spec.config.precision, model.device.type)
    return dtype if dtype == torch.bfloat16 else None


def _fits_host(model: PreTrainedModel, batches: MicroBatchDataset) -> bool:
    """Whether the host has memory for what all layers save of the largest micro-batch, for every process on it."""
    tokens = max(batches.packing.static_lengths, default=0) if batches.packing else 0
    return fits_host_memory(float(tokens) * offloaded_bytes_per_token(model) * ranks.world_size()) and tokens > 0


def _cuda_graphs(spec: TrainingSpec, model: PreTrainedModel, batches: MicroBatchDataset) -> "CudaGraphs | None":
    """Graphs of the run's micro-batches, or None where they cannot be captured.

    They need CUDA, bfloat16, rows packed to static lengths, no dropout, and trained weights that stay in their places.
    """
    config, device = spec.config, model.device.type
    fits = device == "cuda" and pick_dtype(config.precision, device) == torch.bfloat16 and config.dropout == 0
    if not (fits and spec.weight_swap is None and batches.packing and batches.packing.static_lengths):
        return None
    if config.cuda_graphs == "off" or config.optimizer != "adamw":
        return None
    writes_layers = not (config.gradient_checkpointing or spec.is_sharded)
    return CudaGraphs(model, spec.loss_sums, padded_label_counts(batches), writes_layers, spec.warn)


def _plain_layers(spec: TrainingSpec, model: PreTrainedModel) -> None:
    """Recompute and sharding without tasks.engine.speed."""
    if spec.fp8:
        raise BadConfig(f"fp8=true: {MISSING}; set fp8=false")
    if spec.config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.is_sharded:
        is_full = unwrap(model) is model
        dtype = _gather_dtype(spec, model) if is_full else None
        shard_layers(cast(Any, unwrap(model)).base_model, decoder_layers(model), (), dtype)
