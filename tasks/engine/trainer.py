"""The training loop that fine-tuning and distillation share: transformers' Trainer with our loss, rows and safety.

    model, history = train(Plan(build, examples, validation, objective, config, job, made_by))

SIGTERM saves a checkpoint after the running step and raises Preempted; the same call then goes on from the newest
verified checkpoint, over the same rows, to the same weights. A diverged run goes back and halves its learning rate.
"""

import dataclasses
import gc
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer

from tasks.core.errors import Diverged
from tasks.engine import checkpoint
from tasks.engine.batches import Rows, collate, row_order
from tasks.engine.history import History
from tasks.engine.plan import Plan, loss_sums, training_arguments, validation_losses
from tasks.engine.reporter import Reporter


def train(plan: Plan) -> tuple[PreTrainedModel, History]:
    """The trained model, in evaluation mode, and the run's history by step.

    Raises Preempted after SIGTERM, Diverged when `config.rollbacks` did not help.
    """
    scale = 1.0
    for rollback in range(plan.config.rollbacks + 1):
        found = checkpoint.newest(plan.checkpoints, plan.made_by, lambda text: plan.job.log(text, "warning"))
        if found:
            scale = min(scale, checkpoint.read_state(found)["scale"])
            plan.job.log(f"goes on from {found.name} of {plan.steps} steps")
        try:
            return _attempt(plan, found, scale)
        except Diverged as error:
            if rollback == plan.config.rollbacks:
                raise Diverged(f"{error}. Set a lower learning_rate than {plan.config.learning_rate:g}") from error
            message, scale = str(error), scale / 2
        gc.collect()  # the diverged model and its optimizer
        plan.job.log(f"{message}; back to the last checkpoint with {scale:g} of the learning rate", "warning")
    raise AssertionError("the loop returns or raises")


def _attempt(plan: Plan, found: Path | None, scale: float) -> tuple[PreTrainedModel, History]:
    trainer = GuardedTrainer(plan, scale)
    with plan.job.defer_stop():
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    trained = cast(PreTrainedModel, trainer.model)
    trained.train(False)
    return trained, trainer.history


class GuardedTrainer(Trainer):
    """transformers' Trainer over a fixed order of rows, with checkpoints of our own and a check of every step."""

    def __init__(self, plan: Plan, scale: float) -> None:
        model = plan.build()
        config, device = plan.config, model.device.type
        lengths = [len(example.input_ids) for example in plan.examples]
        self.plan, self.scale = plan, scale
        self.history = History()
        self.rows: list[int] = []  # of the running step
        self.tokens = 0
        self._sums: dict[str, Tensor] = {}
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._use_cache = getattr(model.config, "use_cache", True)
        super().__init__(
            model,
            training_arguments(plan, scale, device),
            data_collator=cast(Any, lambda items: collate(items, 8 if device == "cuda" else 1)),
            train_dataset=Rows(plan.examples, row_order(lengths, config.batch_size, plan.steps, config.seed)),
            callbacks=[Reporter(self, plan)],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # or training_step divides by the number of micro-batches once more
        model.config.use_cache = self._use_cache  # Trainer switches it off, and it would be saved

    def validate(self) -> dict[str, float]:
        """Mean losses per label token on the validation rows, recorded and told; empty when there are none."""
        values = validation_losses(self.plan, cast(PreTrainedModel, self.model))
        if values:
            self.history.add_validation(self.state.global_step, values)
            self.plan.job.metrics(self.state.global_step, **{f"validation_{k}": v for k, v in values.items()})
        return values

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Any, self.train_dataset))

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """A step's micro-batches, and how many labels they hold together."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.rows = [row for batch in batches for row in batch["rows"]]
        self.tokens = sum(batch["tokens"] for batch in batches)
        return batches, sum(len(batch["labels"]) for batch in batches)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's sum over a micro-batch divided by the labels of the whole step."""
        sums = loss_sums(self.plan, cast(PreTrainedModel, self.model), inputs)
        for name, value in sums.items():
            mean = value.detach() / num_items_in_batch
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean
        return sums["loss"] / num_items_in_batch

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers' estimate walks over all parameters for every micro-batch."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Takes the step's numbers off the device at once, and looks at them before the optimizer does."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        values = torch.stack([*self._sums.values(), torch.as_tensor(norm)]).tolist()
        step = dict(zip([*self._sums, "grad_norm"], values, strict=True))
        self._sums = {}
        rate = self._get_learning_rate()
        problem = self.history.add({**step, "learning_rate": rate}, self._vocabulary)
        if problem:
            raise Diverged(self._where(problem, rate))
        return norm

    def _where(self, problem: str, rate: float) -> str:
        rows = ", ".join(map(str, self.rows[:8])) + (" ..." if len(self.rows) > 8 else "")
        named = cast(nn.Module, self.model).named_parameters()
        bad = [name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())]
        where = f"; gradient not finite first in {', '.join(bad[:3])}" if bad else ""
        return f"step {self.state.global_step + 1}: {problem} at learning rate {rate:g}, training rows {rows}{where}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        optimizer, rest = checkpoint.flatten_optimizer(cast(Any, self.optimizer).state_dict())
        generators, seeds = checkpoint.random_state()
        named = cast(nn.Module, self.model).named_parameters()
        trained: dict[str, Tensor] = {name: p.detach() for name, p in named if p.requires_grad}
        tensors = {"model": trained, "optimizer": optimizer, "random": generators, "history": self.history.tensors()}
        state = {"optimizer": rest, "random": seeds, "scale": self.scale}
        documents = {"state": state, "trainer_state": dataclasses.asdict(self.state)}
        checkpoint.write(self.plan.checkpoints, self.state.global_step, tensors, documents, self.plan.made_by)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        found, kept = Path(resume_from_checkpoint), dict(cast(nn.Module, self.model).named_parameters())
        with torch.no_grad():
            for name, value in checkpoint.read(found, "model").items():
                kept[name].copy_(value)
        self.history.restore(checkpoint.read(found, "history"))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None:
            return
        found, optimizer, scheduler = Path(checkpoint_dir), cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        saved, groups = checkpoint.read_state(found)["optimizer"], optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(checkpoint.unflatten_optimizer(checkpoint.read(found, "optimizer"), saved, groups))
        # The schedule goes on where it was, from this run's own peak: a rollback has halved it.
        scheduler.last_epoch = self.state.global_step
        rates = [
            peak * rate(scheduler.last_epoch)
            for peak, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, peak, rate in zip(optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate
        scheduler._last_lr = rates

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is not None:
            found = Path(checkpoint_dir)
            checkpoint.restore_random_state(checkpoint.read(found, "random"), checkpoint.read_state(found)["random"])
