"""The training loop of fine-tuning and distillation.

Plain torch. transformers' Trainer was here and had to be overridden in twelve methods; of accelerate nothing would be
left: the model is built on its device, batches come prefetched and pinned (tasks.engine.data.prefetch), accumulation is
a loop, and processes sum their gradients once a step themselves (tasks.engine.distributed.gradient_reduction), so DDP
wraps nothing. On CUDA a step never waits for the device: batches are copied without blocking, and with CUDA graphs a
step's metrics are read during the next one.
"""

import contextlib
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import set_seed

from tasks.core.errors import BadConfig
from tasks.engine.data.collator import Batch, collate, to_device
from tasks.engine.data.prefetch import PrefetchDataset
from tasks.engine.distributed import fsdp, ranks
from tasks.engine.distributed.gradient_reduction import gradient_norm, reduce_gradients, scale_gradients
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.training.acceleration import accelerate, training_batches
from tasks.engine.training.async_metrics import MetricSums, PendingMetrics
from tasks.engine.training.callbacks import Reporter
from tasks.engine.training.diagnosis import DivergedStep, describe_divergence
from tasks.engine.training.history import History
from tasks.engine.training.loss_scaling import LossScale
from tasks.engine.training.optimizer import make_optimizer, make_scheduler
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.training_state import TrainingState
from tasks.engine.training.validation import validation_losses


class TrainingLoop:
    """One attempt at a run: batches -> forward and backward -> reduce and clip -> optimizer and scheduler -> hooks.

    `rate_scale` is what the run's divergences have left of its learning rate; `step` counts finished steps.
    """

    def __init__(self, spec: TrainingSpec, rate_scale: float = 1.0) -> None:
        config = spec.config
        if spec.is_sharded and config.optimizer != "adamw":
            raise BadConfig(f"optimizer={config.optimizer} cannot be sharded: set optimizer=adamw, or strategy=ddp")
        self.spec, self.rate_scale, self.step = spec, rate_scale, 0
        self.model = spec.build()
        self.device = self.model.device
        micro_batches = training_batches(spec, self.model)
        self.graphs = accelerate(spec, self.model, micro_batches)
        prepare = spec.prepare_batch or (lambda batch: batch)
        self.batches = PrefetchDataset(micro_batches, prepare, self.device.type == "cuda")
        set_seed(config.seed)
        if ranks.rank():
            torch.manual_seed(config.seed + ranks.rank())  # each process drops other activations
        learning_rate = config.learning_rate * rate_scale
        replacement = self.graphs.optimizer(learning_rate) if self.graphs else None
        if spec.is_sharded:
            replacement = fsdp.AdamW, {"lr": learning_rate}
        self.optimizer = make_optimizer(self.model, config, learning_rate, replacement)
        self.scheduler = make_scheduler(self.optimizer, config, spec.steps)
        self.weight_swap = spec.weight_swap(self.model) if spec.weight_swap else None
        self.loss_scale = LossScale(config.precision == "float16")
        self.history = History()
        self.reporter = Reporter(spec, self.model, self.history, self.loss_scale)
        self.stops = self.saves = False  # as all processes agreed at the last step whose metrics were read
        self._metrics, self._pending = MetricSums(), list[PendingMetrics]()
        self._vocabulary = int(self.model.config.get_text_config().vocab_size)

    def run(self, resumed: Path | None = None) -> None:
        """All steps, or those after the checkpoint `resumed`, until the last or a requested stop."""
        gc.collect()
        torch.cuda.empty_cache()  # what building the model left
        torch.empty(
            (), dtype=torch.int64
        ).random_()  # torch's DataLoader drew a seed here: dropout's masks depend on it
        if resumed:
            self.step = self.state().restore(resumed)
        self.model.train()
        self.model.zero_grad()
        self.reporter.begin(self.step)
        try:
            while self.step < self.spec.steps and not self._finish_step(self._train_step()):
                pass
        finally:
            if self.graphs:
                self.graphs.close()

    def _train_step(self) -> int:
        """One optimizer step; the number of finished steps."""
        if self.spec.before_step:
            self.spec.before_step(self.history, self.step)
        batches, normalizer = self._step_batches()
        if self.graphs:
            self.graphs.begin_step()
        if self.weight_swap:
            self.weight_swap.swap_in(self.step)
        for batch in batches:
            self._forward_backward(batch, normalizer)
        self._send_metrics(batches, self._reduce_and_clip(normalizer))
        if self.weight_swap:
            self.weight_swap.swap_out()
        self.optimizer.step()
        self.scheduler.step()
        self.model.zero_grad()
        self.step += 1
        return self.step

    def _step_batches(self) -> tuple[list[Batch], Tensor | int]:
        """A step's micro-batches on the device, and their normalizer summed over all processes."""
        count = self.spec.accumulation_steps
        batches = [self.batches[index] for index in range(self.step * count, (self.step + 1) * count)]
        normalizer = sum(map(self.spec.objective.normalizer, batches))
        batches = [to_device(batch, self.device) for batch in batches]
        if ranks.world_size() == 1:
            return batches, normalizer
        return batches, ranks.sum_over_ranks(torch.full((), float(normalizer), device=self.device))

    def _forward_backward(self, batch: Batch, normalizer: Tensor | int) -> None:
        """Adds a micro-batch's gradient: of the mean loss times the loss scale, or of the sum in a CUDA graph."""
        if self.graphs:
            self._metrics.add(self.graphs.run(batch).by_name(), normalizer)
            self.read_metrics()  # the device is busy with this step: the last one's numbers cost no time now
            return
        sums = self.loss_sums(batch)
        self._metrics.add(sums.by_name(), normalizer)
        (sums.loss / normalizer * self.loss_scale.factor).backward()

    def _reduce_and_clip(self, normalizer: Tensor | int) -> Tensor:
        """Sums the gradients of all processes, undoes the loss scale, clips; the norm before clipping."""
        max_norm = self.spec.config.max_grad_norm
        if self.graphs:
            return self.graphs.finish_step(normalizer, max_norm)
        parameters = list(self.model.parameters())
        reduce_gradients(parameters)
        if self.loss_scale.factor != 1:
            scale_gradients(parameters, 1 / self.loss_scale.factor)
        norm = gradient_norm(parameters)
        if max_norm:
            scale_gradients(parameters, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _send_metrics(self, batches: list[Batch], norm: Tensor) -> None:
        """Sends the step's numbers off the device, and reads them before the optimizer moves.

        With graphs they are read during the next step; a step whose gradient is not finite moves nothing all the same,
        since the optimizer is told so on the device.
        """
        rows = [row for batch in batches for row in batch["rows"]]
        tokens, labels = sum(batch["tokens"] for batch in batches), sum(len(batch["labels"]) for batch in batches)
        counters = [float(tokens), float(self.spec.job.stop_requested), float(self.reporter.checkpoint_is_due())]
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self._pending = [self._metrics.send(counters, norm, self.step + 1, rows, labels, learning_rate)]
        if self.graphs is None:
            self.read_metrics()
        else:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]

    def read_metrics(self) -> None:
        """Records and reports the step that was sent last, or raises DivergedStep."""
        for pending in self._pending:
            self._pending = []
            losses, (tokens, stop, save), norm = pending.read()
            self.stops, self.saves = stop > 0, save > 0
            if self.loss_scale.overflowed(losses["loss"], norm):
                self.model.zero_grad()  # the optimizer has nothing to do
                norm = 0.0
            values = {**losses, "grad_norm": norm, "learning_rate": pending.learning_rate}
            problem = self.history.add(values, self._vocabulary)
            if problem:
                text = describe_divergence(problem.text, pending, self.model, self._mean_loss, self.spec.is_sharded)
                raise DivergedStep(text, pending.step - problem.steps)
            self.reporter.step_metrics(pending.step, int(tokens), pending.labels, pending.rows)

    def _finish_step(self, step: int) -> bool:
        """Validates and saves where due after a step; whether the run ends here."""
        config, job = self.spec.config, self.spec.job
        is_last = step == self.spec.steps
        stops = self.stops if ranks.world_size() > 1 else job.stop_requested
        validates = bool(config.validate_every_steps and step % config.validate_every_steps == 0 and not is_last)
        by_step = bool(config.save_every_steps and step % config.save_every_steps == 0)
        saves = is_last or stops or by_step or self.saves
        if saves or validates:
            self.read_metrics()
            start = time.monotonic()
            if validates:
                self.validate()
            self.reporter.leave_out(time.monotonic() - start)
        if saves:
            self.reporter.checkpoint_starts()
            self.saves = False
            self.save_checkpoint()
        return stops

    def validate(self) -> None:
        """Records and reports mean losses on the validation rows, if there are any."""
        with self.weight_swap.swapped_in(self.step) if self.weight_swap else contextlib.nullcontext():
            losses = validation_losses(self.spec, self.model)
        if losses:
            self.history.add_validation(self.step, losses)
            self.spec.job.metrics(self.step, **{f"validation_{name}": value for name, value in losses.items()})

    def state(self) -> TrainingState:
        """What checkpoints keep of this loop."""
        return TrainingState(
            self.spec, self.model, self.optimizer, self.scheduler, self.history, self.loss_scale, self.rate_scale
        )

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of the finished steps."""
        self.state().save(self.step)

    def loss_sums(self, batch: Batch) -> LossSums:
        """The objective of a micro-batch on the device."""
        return self.spec.loss_sums(self.model, batch)

    def _mean_loss(self, rows: Sequence[int]) -> float:
        """The loss of some training rows under the present weights."""
        batch = to_device(collate([(row, self.spec.examples[row]) for row in rows]), self.device)
        return float(self.loss_sums(batch).loss) / max(1, self.spec.objective.normalizer(batch))
