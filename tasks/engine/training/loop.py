"""The training loop that fine-tuning and distillation share: transformers' Trainer with our loss, rows and safety.

    model, history = train(Plan(build, examples, validation, objective, config, job, made_by))

SIGTERM saves a checkpoint after the running step and raises Preempted; the same call then goes on from the newest
verified checkpoint, over the same rows, to the same weights. A diverged run goes back and halves its learning rate.
"""

import contextlib
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback

from tasks.core.errors import BadConfig, Diverged
from tasks.engine.data.collator import Batch, collate, to_device
from tasks.engine.data.prefetch import Ahead
from tasks.engine.distributed import fsdp, ranks
from tasks.engine.distributed.gradient_reduction import gradient_norm, scale_gradients, sum_gradients
from tasks.engine.training import checkpoint
from tasks.engine.training.async_metrics import Coming, Sums
from tasks.engine.training.callbacks import Reporter
from tasks.engine.training.diagnosis import Broke, worst, worst_gradients
from tasks.engine.training.history import History
from tasks.engine.training.loss_scaling import LossScale
from tasks.engine.training.resumable import Resumable
from tasks.engine.training.spec import Plan, feed, graphs_for, loss_sums, quicken, training_arguments, validation_losses
from tasks.engine.training.weight_swap import ShowWeights

ROWS_NAMED = 32


def train(plan: Plan) -> tuple[PreTrainedModel, History]:
    """The trained model, in evaluation mode, and the run's history by step.

    Raises Preempted after SIGTERM, Diverged when `config.rollbacks` did not help.
    """
    scale = 1.0
    for rollback in range(plan.config.rollbacks + 1):
        found = _newest(plan)
        if found:
            scale = min(scale, checkpoint.read_state(found)["scale"])
            plan.job.log(f"goes on from {found.name} of {plan.steps} steps")
        try:
            return _attempt(plan, found, scale)
        except Broke as error:
            if rollback == plan.config.rollbacks:
                times = f", after going back {rollback} times" if rollback else ""
                advice = f"Set a lower learning_rate than {plan.config.learning_rate:g}"
                raise Diverged(f"{error}{times}. {advice}") from error
            message, scale, since = str(error), scale / 2, error.since
        gc.collect()  # the diverged model and its optimizer
        if ranks.rank() == 0:
            checkpoint.discard_after(plan.checkpoints, since)
        plan.job.log(f"{message}; back to the last good checkpoint with {scale:g} of the learning rate", "warning")
    raise AssertionError("the loop returns or raises")


def _newest(plan: Plan) -> Path | None:
    """The checkpoint that all processes go on from; process 0 looks."""
    ranks.wait()
    found = None
    if ranks.rank() == 0:
        found = checkpoint.newest(plan.checkpoints, plan.made_by, lambda text: plan.job.log(text, "warning"))
    name = ranks.agree(found.name if found else None)
    return plan.checkpoints / name if name else None


def _attempt(plan: Plan, found: Path | None, scale: float) -> tuple[PreTrainedModel, History]:
    trainer = GuardedTrainer(plan, scale)
    with plan.job.defer_stop():
        trainer.train(resume_from_checkpoint=str(found) if found else None)
        plan.job.stop_requested |= trainer.must_stop  # another process was asked to
    trained = trainer.whole_model() if trainer.is_split else cast(PreTrainedModel, trainer.model)
    trained.train(False)
    trainer.history.speed = trainer.reporter.finish()
    return trained, trainer.history


class GuardedTrainer(Resumable):
    """transformers' Trainer over a fixed order of rows, with checkpoints of our own and a check of every step."""

    def __init__(self, plan: Plan, scale: float) -> None:
        model = plan.build()
        config, device = plan.config, model.device.type
        self.is_split = plan.is_split
        if self.is_split and config.optimizer != "adamw":
            raise BadConfig(f"optimizer={config.optimizer} cannot be split: set optimizer=adamw, or strategy=ddp")
        self.plan, self.scale = plan, scale
        self.history = History()
        self.rows: list[int] = []  # of the running step
        self.tokens, self.labels, self.must_stop, self.must_save = 0, 0, False, False
        self.loss_scale = LossScale(config.precision == "float16")
        self.reporter = Reporter(self, plan)
        self._sums = Sums()
        self._coming: Coming | None = None
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._use_cache = getattr(model.config, "use_cache", True)
        batches = feed(plan, model)
        quicken(plan, model, batches)
        self.graphs = graphs_for(plan, batches, model)
        super().__init__(
            model,
            training_arguments(plan, scale, device),
            data_collator=cast(Any, lambda items: items[0]),
            train_dataset=Ahead(batches, self._prepared, device == "cuda"),
            callbacks=[self.reporter],
            optimizer_cls_and_kwargs=self._own_optimizer(config.learning_rate * scale),
        )
        if ranks.rank():
            torch.manual_seed(config.seed + ranks.rank())  # each process drops others of its rows' activations
        self.shown = plan.shown(model) if plan.shown else None
        if self.shown:
            self.add_callback(ShowWeights(self.shown))
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # or training_step divides by the number of micro-batches once more
        model.config.use_cache = self._use_cache  # Trainer switches it off, and it would be saved

    def _own_optimizer(self, rate: float) -> tuple[Any, dict[str, Any]] | None:
        """The optimizer's class and settings; None for transformers' choice."""
        if self.is_split:
            return fsdp.AdamW, {"lr": rate}
        return self.graphs.optimizer(rate) if self.graphs else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, and no graph outlives it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.graphs:
                self.graphs.close()

    def validate(self) -> dict[str, float]:
        """Mean losses per label token on the validation rows, recorded and told; empty when there are none."""
        with self.shown.during(self.state.global_step) if self.shown else contextlib.nullcontext():
            values = validation_losses(self.plan, cast(PreTrainedModel, self.model))
        if values:
            self.history.add_validation(self.state.global_step, values)
            self.plan.job.metrics(self.state.global_step, **{f"validation_{k}": v for k, v in values.items()})
        return values

    def _prepared(self, batch: Batch) -> Batch:
        """What happens to a batch on the host, ahead of its time."""
        return self.plan.enrich(batch) if self.plan.enrich else batch

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Any, self.train_dataset))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """A step's micro-batches, and how many labels they hold together."""
        if self.plan.before_step:
            self.plan.before_step(self.history, self.state.global_step)
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.rows = [row for batch in batches for row in batch["rows"]]
        self.tokens = sum(batch["tokens"] for batch in batches)
        self.labels = labels = sum(len(batch["labels"]) for batch in batches)
        if self.graphs:
            self.graphs.begin()
        if ranks.count() == 1:
            self.all_labels: Tensor | int = labels
        else:
            self.all_labels = ranks.total(torch.full((), float(labels), device=device))
        return batches, self.all_labels

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch forward and backward, replayed where it can be; its gradient is then of the sum."""
        if self.graphs is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        sums = self.graphs.run(inputs)
        self._sums.add(sums, num_items_in_batch)
        self.catch_up()  # the device is busy with this step: the last one's numbers cost no time now
        return cast(Tensor, sums["loss"] / num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's sum over a micro-batch divided by the labels of the whole step."""
        sums = loss_sums(self.plan, cast(PreTrainedModel, self.model), inputs)
        self._sums.add(sums, num_items_in_batch)
        return sums["loss"] / num_items_in_batch * self.loss_scale.factor

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers' estimate walks over all parameters for every micro-batch."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Sums the gradients of all processes, undoes the loss's scale, clips; the norm before."""
        most = self.plan.config.max_grad_norm
        if self.graphs:
            return self.graphs.finish(self.all_labels, most)
        named = list(cast(nn.Module, self.model).parameters())
        sum_gradients(named)
        undo = 1 / self.loss_scale.factor
        if undo != 1:
            scale_gradients(named, undo)
        norm = gradient_norm(named)
        if most:
            scale_gradients(named, (most / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Takes the step's numbers off the device, and looks at them before the optimizer does.

        With graphs the look comes during the next step, so that the device never waits for it; a step whose gradient
        is not finite moves nothing all the same, since the optimizer is told so on the device.
        """
        norm = self._clip_grad_norm(model) if grad_norm is None else grad_norm
        asked = [float(self.tokens), float(self.plan.job.stop_requested), float(self.reporter.wants_checkpoint())]
        step, rate = self.state.global_step + 1, self._get_learning_rate()
        self._coming = self._sums.send(asked, norm, step, self.rows, self.labels, rate)
        if self.graphs is None:
            self.catch_up()
        else:
            cast(Any, self._plain_optimizer()).found_inf = (~norm.isfinite()).float()
        return norm

    def catch_up(self) -> None:
        """Looks at the numbers that were sent last: records and tells them, or raises Broke."""
        coming, self._coming = self._coming, None
        if coming is None:
            return
        losses, (tokens, stop, save), grad_norm = coming.read()
        self.must_stop, self.must_save = stop > 0, save > 0
        step = {**losses, "grad_norm": grad_norm}
        if self.loss_scale.overflowed(step["loss"], step["grad_norm"]):
            cast(nn.Module, self.model).zero_grad()  # the optimizer has nothing to do
            step["grad_norm"] = 0.0
        problem = self.history.add({**step, "learning_rate": coming.rate}, self._vocabulary)
        if problem:
            raise Broke(self._where(problem.text, coming), coming.step - problem.steps)
        self.reporter.told_step(coming.step, int(tokens), coming.labels, coming.rows)

    def _where(self, problem: str, coming: Coming) -> str:
        """The step's address, and what is worst in it."""
        model, rows = cast(PreTrainedModel, self.model), coming.rows

        def loss_of(some: Sequence[int]) -> float:
            batch = collate([(row, self.plan.examples[row]) for row in some])
            sums = loss_sums(self.plan, model, to_device(batch, model.device))
            return float(sums["loss"]) / max(1, len(batch["labels"]))

        named = ", ".join(map(str, rows[:ROWS_NAMED])) + (" ..." if len(rows) > ROWS_NAMED else "")
        at = f"step {coming.step}: {problem} at learning rate {coming.rate:g}, training rows {named}"
        return f"{at}; {worst_gradients(model) if self.is_split else worst(model, rows, loss_of)}"
