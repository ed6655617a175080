"""A micro-batch's forward and backward as one CUDA graph: captured once for each shape, replayed without launches.

    graphs = CudaGraphs(model, objective, padded_label_counts(batches))   # objective(model, batch) -> LossSums
    graphs.begin_step()                     # reattach gradient buffers, zeroed where this step does not overwrite them
    sums = graphs.run(batch)                # accumulates the gradient of sums.loss: the same numbers as uncaptured
    norm = graphs.finish_step(normalizer, max_norm)

A small model is bound by kernel launches, which a graph takes off the CPU. Shapes have to be static
(tasks.engine.data.sequence_packing), so labels are padded with -100 to the largest count of any micro-batch of the same
length. Gradients live in one float32 buffer that the head's products and the embedding's backward accumulate into in
place; no second buffer of the vocabulary's size is allocated. Fully trained Gemma 3 layers run through
tasks.engine.speed.gemma3, with the residual stream in the autocast dtype, as it is when the model is served.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tasks.core.errors import BadConfig
from tasks.engine.data.chat_template import IGNORE
from tasks.engine.data.collator import Batch
from tasks.engine.data.micro_batches import MicroBatchDataset
from tasks.engine.distributed import fsdp, ranks
from tasks.engine.distributed.gradient_reduction import norm_with_shards
from tasks.engine.losses.gradient_accumulation import OverwriteBuffer
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.models.lm_head import unwrap
from tasks.engine.speed.embedding_gradient import EmbeddingGradient
from tasks.engine.speed.gemma3 import Gemma3Decoder

LABELS = 32  # label counts are rounded up to a multiple of this
ALIGNED = 64  # elements: each parameter's gradient begins at a multiple of 256 bytes
LABEL_ALIGNED = ("positions", "labels", "label_weights")  # one value a label, as have names that begin with "teacher_"


def padded_label_counts(batches: MicroBatchDataset) -> dict[int, int]:
    """Static length -> largest number of labels in a micro-batch of that length, rounded up to `LABELS`."""
    assert batches.packing is not None
    tokens = [len(example.input_ids) for example in batches.examples]
    labels = [len(example.answer_ids) for example in batches.examples]
    counts: dict[int, int] = {}
    for micro_batch in batches.micro_batches:
        length = batches.packing.static_length(sum(tokens[row] for row in micro_batch))
        count = sum(labels[row] for row in micro_batch)
        counts[length] = max(counts.get(length, 0), -(-count // LABELS) * LABELS)
    return counts


def pad_labels(batch: Batch, label_counts: dict[int, int]) -> Batch:
    """Pads a batch's labels with -100, and its other per-label tensors with zeros, to the count of its length."""
    missing = label_counts[batch["input_ids"].shape[1]] - len(batch["labels"])
    padded: dict[str, Any] = dict(batch)
    for name, value in padded.items():
        if isinstance(value, Tensor) and (name in LABEL_ALIGNED or name.startswith("teacher_")):
            padding = [0, 0] * (value.dim() - 1) + [0, missing]
            padded[name] = F.pad(value, padding, value=IGNORE if name == "labels" else 0)
    return cast(Batch, padded)


class CudaGraphs:
    """CUDA graphs of one model and objective by batch shape, and the flat buffer of the model's gradients.

    `use_gemma3_decoder` replaces the layers of a fully trained Gemma 3 by tasks.engine.speed.gemma3.
    """

    def __init__(
        self, model: PreTrainedModel, objective: Callable[[PreTrainedModel, Batch], LossSums],
        label_counts: dict[int, int], use_gemma3_decoder: bool = True, warn: Callable[[str], None] = warnings.warn,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.label_counts, self.warn = model, objective, label_counts, warn
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trainable.sort(key=fsdp.is_sharded)  # unsharded parameters first
        local_parts = [fsdp.local_tensor(parameter) for parameter in self.trainable]
        starts, size = [], 0
        for part in local_parts:
            starts.append(size)
            size += -(-part.numel() // ALIGNED) * ALIGNED
        self.flat_grads = torch.zeros(size, dtype=torch.float32, device=model.device)
        views = [
            self.flat_grads[start : start + part.numel()].view(part.shape)
            for start, part in zip(starts, local_parts, strict=True)
        ]
        self.grads = [fsdp.join_shard(view, parameter) for view, parameter in zip(views, self.trainable, strict=True)]
        unsharded = sum(not fsdp.is_sharded(parameter) for parameter in self.trainable)
        self.sharded_grads = self.flat_grads[starts[unsharded] if unsharded < len(starts) else size :]
        grads_by_id = {id(p): grad for p, grad in zip(self.trainable[:unsharded], self.grads, strict=False)}
        self.head_grad = grads_by_id.get(id(cast(Any, unwrap(model)).get_output_embeddings().weight))
        self.embedding_gradient = EmbeddingGradient(unwrap(model).get_input_embeddings(), grads_by_id)
        dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        self.decoder = Gemma3Decoder.of(model, grads_by_id, dtype) if use_gemma3_decoder else None
        head_weight = self.decoder.head_weight if self.decoder else None
        extras = {"head_grad": self.head_grad, "decoder": self.decoder, "head_weight": head_weight}
        self.batch_extras = {name: value for name, value in extras.items() if value is not None}
        self.grad_scale = torch.ones((), device=model.device)
        # A step of one micro-batch (predicted from the previous step's count) overwrites every gradient: no zeroing.
        self.can_overwrite = (
            self.decoder is not None and self.head_grad is not None and self.head_grad is self.embedding_gradient.grad
            and len(self.trainable) == len(list(unwrap(model).base_model.parameters()))
        )  # fmt: skip
        self.optimizer_scales = self.decoder_current = self.overwrites = False
        self.micro_batches, self.can_capture = 0, True
        self.warm_shapes: set[tuple[Any, ...]] = set()
        self.graphs: dict[tuple[Any, ...], _CapturedGraph] = {}

    def close(self) -> None:
        """Frees the captured graphs: NCCL cannot shut down while a graph holds its collectives."""
        for captured in self.graphs.values():
            captured.graph.reset()
        self.graphs.clear()

    def begin_step(self) -> None:
        """Reattaches the gradient buffers, zeroed unless this step's only micro-batch overwrites them."""
        self.overwrites, self.micro_batches = self.can_overwrite and self.micro_batches == 1, 0
        if not self.overwrites:
            self.flat_grads.zero_()
        for parameter, grad in zip(self.trainable, self.grads, strict=True):
            parameter.grad = grad
        if self.decoder is not None and not self.decoder_current:
            self.decoder.refresh()
        self.decoder_current = False

    def finish_step(self, normalizer: Tensor | int, max_norm: float) -> Tensor:
        """Sums gradients over all processes, divides by `normalizer` and clips them to `max_norm` (0: no clipping).

        Both are one scale, which `optimizer`'s AdamW applies itself. Returns the norm before clipping.
        """
        unsharded = self.flat_grads[: len(self.flat_grads) - len(self.sharded_grads)]
        ranks.sum_over_ranks(unsharded)
        norm: Tensor = torch.linalg.vector_norm(unsharded)
        if len(self.sharded_grads):  # summed over the processes in the backward
            norm = norm_with_shards(norm, torch.linalg.vector_norm(self.sharded_grads))
        norm = norm / normalizer
        clipping = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else torch.ones_like(norm)
        self.grad_scale.copy_(clipping / normalizer)
        if not self.optimizer_scales:
            self.flat_grads.mul_(self.grad_scale)
        return norm

    def optimizer(self, learning_rate: float) -> tuple[Any, dict[str, Any]] | None:
        """A fused AdamW (class, settings) that scales gradients and updates the decoder's weights; None without one."""
        if self.decoder is None or self.flat_grads.device.type != "cuda":
            return None
        from tasks.engine.speed.gemma3.fused_adamw import AdamW  # noqa: PLC0415  # Triton is where CUDA is

        def mark_current() -> None:
            self.decoder_current = True

        self.optimizer_scales = True
        settings = {"copies": self.decoder.weights, "factor": self.grad_scale, "after_step": mark_current}
        return AdamW, {"lr": learning_rate, **settings}

    def run(self, batch: Batch) -> LossSums:
        """Forward and backward of a micro-batch; returns the objective's detached sums, valid until the next call.

        A shape runs uncaptured the first time (which compiles kernels), is captured the second, and replayed from then.
        """
        batch, overwrite = pad_labels(batch, self.label_counts), self.overwrites and not self.micro_batches
        self.micro_batches += 1
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()) if isinstance(value, Tensor))
        key = (*shape, batch["longest"])
        if key in self.warm_shapes and self.can_capture and (key, overwrite) not in self.graphs:
            self._capture((key, overwrite), batch)
        if (key, overwrite) in self.graphs:
            return self.graphs[key, overwrite].replay(batch)
        if key in self.warm_shapes:
            return self._forward_backward(batch, overwrite)
        self.graphs.clear()  # the uncaptured run needs their memory
        torch.cuda.empty_cache()
        self.warm_shapes.add(key)
        return self._forward_backward(batch, overwrite)

    def _capture(self, key: tuple[Any, bool], batch: Batch) -> None:
        """Captures a micro-batch; a model that cannot be captured warns and runs without graphs from then on.

        A model that waits for the device cannot be (Gemma 3n makes tensors of host numbers). Raises BadConfig for a
        sharded one, whose processes would stop between two collectives.
        """
        torch.cuda.empty_cache()
        pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
        try:
            self.graphs[key] = _CapturedGraph(batch, lambda batch: self._forward_backward(batch, key[1]), pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            if any(map(fsdp.is_sharded, self.model.parameters())):
                raise BadConfig(f"a micro-batch cannot be a CUDA graph: {reason}. Set cuda_graphs=off") from error
            self.can_capture = False
            self.close()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())  # the old state may wait for the capture's end
            self.warn(f"micro-batches run without CUDA graphs: {reason}")

    def _forward_backward(self, batch: Batch, overwrite: bool = False) -> LossSums:
        """Accumulates the batch's gradients into the buffers, or with `overwrite` replaces what they hold."""
        inputs: dict[str, Any] = {**batch, **self.batch_extras}
        head_buffer = OverwriteBuffer(self.head_grad) if overwrite and self.head_grad is not None else None
        if head_buffer:
            inputs |= {"head_grad": head_buffer, "decoder": partial(cast(Any, self.decoder), overwrite=True)}
        with self.embedding_gradient:
            sums = self.objective(self.model, cast(Batch, inputs))
        if head_buffer and not head_buffer.written:  # a loss that leaves the head's gradient to autograd, which adds it
            head_buffer.grad.zero_()
        sums.loss.backward()
        return sums.detach()


class _CapturedGraph:
    """A captured micro-batch: static input tensors, the graph, and the sums that a replay writes."""

    def __init__(self, batch: Batch, work: Callable[[Batch], LossSums], pool: Any) -> None:
        self.inputs = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # thread_local: the prefetch thread pins memory meanwhile, which a global capture would not allow.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.sums = work(cast(Batch, {**batch, **self.inputs}))

    def replay(self, batch: Batch) -> LossSums:
        for name, value in self.inputs.items():
            value.copy_(cast(dict[str, Tensor], batch)[name], non_blocking=True)
        self.graph.replay()
        return self.sums
