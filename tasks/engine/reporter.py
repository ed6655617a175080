"""What a training run says while it works, and when it saves: a callback of transformers' Trainer."""

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from tasks.engine.plan import Plan
    from tasks.engine.trainer import GuardedTrainer

SECONDS_BETWEEN_EVENTS = 0.5


class Reporter(TrainerCallback):
    """Metrics of every step, progress twice a second at most; checkpoints by step, time, at the end and on SIGTERM."""

    def __init__(self, trainer: "GuardedTrainer", plan: "Plan") -> None:
        self.trainer, self.plan = trainer, plan
        self.start = self.saved = self.told = time.monotonic()
        self.step_began = self.start
        self.start_step = 0
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Starts the clocks; a resumed run's speed counts its own steps only."""
        self.start = self.saved = self.told = self.step_began = time.monotonic()
        self.start_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Tells, validates, and asks for a checkpoint where one is due."""
        step, config, now = state.global_step, self.plan.config, time.monotonic()
        last = step == self.plan.steps
        self.tokens += self.trainer.tokens
        numbers = {name: values[-1] for name, values in self.trainer.history.steps.items()}
        speed = self.trainer.tokens / max(now - self.step_began, 1e-9)
        self.plan.job.metrics(step, **numbers, tokens_per_second=speed)
        self.step_began = now
        if last or now - self.told >= SECONDS_BETWEEN_EVENTS:
            self._tell(step, now, numbers["loss"])
        if config.validate_every_steps and step % config.validate_every_steps == 0 and not last:
            self.trainer.validate()
        stop = self.plan.job.stop_requested
        by_step = config.save_every_steps and step % config.save_every_steps == 0
        if last or stop or by_step or now - self.saved >= config.save_every_seconds:
            control.should_save, self.saved = True, now
        if stop:
            control.should_training_stop = True

    def _tell(self, step: int, now: float, loss: float) -> None:
        speed = self.tokens / max(now - self.told, 1e-9)
        left = (self.plan.steps - step) * (now - self.start) / (step - self.start_step)
        note = f"loss {loss:.4f}, {speed:,.0f} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left"
        self.plan.job.progress(step, self.plan.steps, "steps", note)
        self.told, self.tokens = now, 0
