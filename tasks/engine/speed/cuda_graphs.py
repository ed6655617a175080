"""A micro-batch's forward and backward as one CUDA graph: captured once for each shape, replayed without launches.

    graphs = Graphs(model, objective)       # objective(model, batch) -> sums, "loss" among them
    graphs.begin()                          # at a step's start: gradients count as 0
    sums = graphs.run(batch)                # the gradient of sums["loss"] is added; the same numbers as without

A small student is bound by launches: a graph takes them off the CPU. Shapes have to be static
(tasks.engine.data.sequence_packing),
so labels are filled up, with -100, to the most that a micro-batch of the same length has. Gradients live in one float32
buffer, where the head's products and the embedding's look-ups add theirs in place; a buffer of the vocabulary's size
is never made twice. The residual stream is in the autocast dtype, as it is when the model is served. Where the layers
are Gemma 3's, and all of them trained, they run as tasks.engine.speed.gemma3 writes them.
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
from tasks.engine.data.micro_batches import Feed
from tasks.engine.distributed import fsdp, ranks
from tasks.engine.distributed.gradient_reduction import norm_with_parts
from tasks.engine.losses.gradient_accumulation import Fresh
from tasks.engine.models.lm_head import unwrap
from tasks.engine.speed.embedding_gradient import Look
from tasks.engine.speed.gemma3 import Stack

LABELS = 32  # a number of labels is rounded up to a multiple of this
ALIGNED = 64  # elements: a parameter's gradient begins at 256 bytes
BY_LABEL = ("positions", "labels", "label_weights")  # and all whose name begins with "teacher_"

Sums = dict[str, Tensor]


def most_labels(batches: Feed) -> dict[int, int]:
    """By static length, the most labels that a micro-batch of it has, rounded up."""
    assert batches.packing is not None
    tokens = [len(example.input_ids) for example in batches.examples]
    labels = [len(example.answer_ids) for example in batches.examples]
    found: dict[int, int] = {}
    for rows in batches.micro_batches:
        length = batches.packing.length(sum(tokens[row] for row in rows))
        count = sum(labels[row] for row in rows)
        found[length] = max(found.get(length, 0), -(-count // LABELS) * LABELS)
    return found


def fill_labels(batch: Batch, most: dict[int, int]) -> Batch:
    """The batch with its labels, and all that goes with each, filled up: labels of -100, else zeros."""
    more = most[batch["input_ids"].shape[1]] - len(batch["labels"])
    filled: dict[str, Any] = dict(batch)
    for name, value in filled.items():
        if isinstance(value, Tensor) and (name in BY_LABEL or name.startswith("teacher_")):
            padding = [0, 0] * (value.dim() - 1) + [0, more]
            filled[name] = F.pad(value, padding, value=IGNORE if name == "labels" else 0)
    return cast(Batch, filled)


class Graphs:
    """The graphs of one model and objective, and the buffer of its gradients. Without `stack` layers stay as they
    are."""

    def __init__(
        self, model: PreTrainedModel, objective: Callable[[PreTrainedModel, Batch], Sums], most: dict[int, int],
        stack: bool = True, warn: Callable[[str], None] = warnings.warn,
    ) -> None:  # fmt: skip
        self.model, self.objective, self.most, self.warn = model, objective, most, warn
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.trained.sort(key=fsdp.is_split)  # whole ones first
        held = [fsdp.own(p) for p in self.trained]
        starts, size = [], 0
        for part in held:
            starts.append(size)
            size += -(-part.numel() // ALIGNED) * ALIGNED
        self.flat = torch.zeros(size, dtype=torch.float32, device=model.device)
        views = [self.flat[s : s + part.numel()].view(part.shape) for s, part in zip(starts, held, strict=True)]
        self.grads = [fsdp.joined_like(view, p) for view, p in zip(views, self.trained, strict=True)]
        whole = sum(not fsdp.is_split(p) for p in self.trained)
        self.parts = self.flat[starts[whole] if whole < len(starts) else size :]  # of split parameters' gradients
        own = {id(p): grad for p, grad in zip(self.trained[:whole], self.grads, strict=False)}
        self.head_grad = own.get(id(cast(Any, unwrap(model)).get_output_embeddings().weight))
        self.look = Look(unwrap(model).get_input_embeddings(), own)
        dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
        self.stack = Stack.of(model, own, dtype) if stack else None
        head = self.stack.head if self.stack else None
        extras = {"head_grad": self.head_grad, "stack": self.stack, "head_weight": head}
        self.extras = {name: value for name, value in extras.items() if value is not None}
        self.factor = torch.ones((), device=model.device)
        # Where a step is one micro-batch (as its last was), products write all gradients, which need not be 0 before.
        self.writes = (
            self.stack is not None and self.head_grad is not None and self.head_grad is self.look.into
            and len(self.trained) == len(list(unwrap(model).base_model.parameters()))
        )  # fmt: skip
        self.leaves_factor = self.current = self.alone = False
        self.runs, self.captures = 0, True
        self.warm: set[tuple[Any, ...]] = set()
        self.captured: dict[tuple[Any, ...], _Captured] = {}

    def close(self) -> None:
        """Lets go of what was captured: NCCL does not end while a graph holds its work."""
        for captured in self.captured.values():
            captured.graph.reset()
        self.captured.clear()

    def begin(self) -> None:
        """Gradients of 0, or such as the first product writes, in place: whoever took them away at the last step's end
        gets the same ones."""
        self.alone, self.runs = self.writes and self.runs == 1, 0
        if not self.alone:
            self.flat.zero_()
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            parameter.grad = grad
        if self.stack is not None and not self.current:
            self.stack.refresh()
        self.current = False

    def finish(self, labels: Tensor | int, most: float) -> Tensor:
        """Sums the gradients over all processes, makes them those of the mean over `labels`, and clips them to a norm
        of `most` (0: not at all) in the same pass, which may be the optimizer's; the norm before."""
        whole = self.flat[: len(self.flat) - len(self.parts)]
        ranks.total(whole)
        norm: Tensor = torch.linalg.vector_norm(whole)
        if len(self.parts):  # summed over the processes in the backward
            norm = norm_with_parts(norm, torch.linalg.vector_norm(self.parts))
        norm = norm / labels
        self.factor.copy_(((most / (norm + 1e-6)).clamp(max=1.0) if most else torch.ones_like(norm)) / labels)
        if not self.leaves_factor:
            self.flat.mul_(self.factor)
        return norm

    def optimizer(self, rate: float) -> tuple[Any, dict[str, Any]] | None:
        """An AdamW that applies what `finish` leaves, and renews the layers' weights; None for torch's own."""
        if self.stack is None or self.flat.device.type != "cuda":
            return None
        from tasks.engine.speed.gemma3.fused_adamw import AdamW  # noqa: PLC0415  # Triton is where CUDA is

        def after() -> None:
            self.current = True

        self.leaves_factor = True
        return AdamW, {"lr": rate, "copies": self.stack.weights, "factor": self.factor, "after": after}

    def run(self, batch: Batch) -> Sums:
        """The objective's sums, detached; their tensors hold until the next call."""
        batch, fresh = fill_labels(batch, self.most), self.alone and not self.runs
        self.runs += 1
        shape = tuple((name, tuple(v.shape)) for name, v in sorted(batch.items()) if isinstance(v, Tensor))
        key = (*shape, batch["longest"])
        if key in self.warm and self.captures and (key, fresh) not in self.captured:
            self._capture((key, fresh), batch)
        if (key, fresh) in self.captured:
            return self.captured[key, fresh].replay(batch)
        if key in self.warm:
            return self._work(batch, fresh)
        self.captured.clear()  # their memory is needed: the first time, a shape runs (and compiles) without a graph
        torch.cuda.empty_cache()
        self.warm.add(key)
        return self._work(batch, fresh)

    def _capture(self, key: tuple[Any, bool], batch: Batch) -> None:
        """Nothing that is captured runs: a model that cannot be, for it waits for the device (Gemma 3n makes tensors of
        host numbers), goes on without graphs. One that is split cannot: it would stop between two collectives."""
        torch.cuda.empty_cache()
        pool = next(iter(self.captured.values())).graph.pool() if self.captured else None
        try:
            self.captured[key] = _Captured(batch, lambda batch: self._work(batch, key[1]), pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            if any(map(fsdp.is_split, self.model.parameters())):
                raise BadConfig(f"a micro-batch cannot be a CUDA graph: {reason}. Set cuda_graphs=off") from error
            self.captures = False
            self.close()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())  # the old state may wait for the capture's end
            self.warn(f"micro-batches run without CUDA graphs: {reason}")

    def _work(self, batch: Batch, fresh: bool = False) -> Sums:
        """Adds the batch's gradients to what is there; `fresh`: puts them in its place."""
        own: dict[str, Any] = {**batch, **self.extras}
        head = Fresh(self.head_grad) if fresh and self.head_grad is not None else None
        if head:
            own |= {"head_grad": head, "stack": partial(cast(Any, self.stack), fresh=True)}
        with self.look:
            sums = self.objective(self.model, cast(Batch, own))
        if head and not head.taken:  # the loss did not ask for it: autograd will add the gradient
            head.total.zero_()
        sums["loss"].backward()
        return {name: value.detach() for name, value in sums.items()}


class _Captured:
    def __init__(self, batch: Batch, work: Callable[[Batch], Sums], pool: Any) -> None:
        self.inputs = {name: value.clone() for name, value in batch.items() if isinstance(value, Tensor)}
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Only this thread must leave the device alone meanwhile: the one that makes batches ready pins memory.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.sums = work(cast(Batch, {**batch, **self.inputs}))

    def replay(self, batch: Batch) -> Sums:
        for name, value in self.inputs.items():
            value.copy_(cast(dict[str, Tensor], batch)[name], non_blocking=True)
        self.graph.replay()
        return self.sums
