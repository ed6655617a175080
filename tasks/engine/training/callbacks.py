"""What a training run says while it works, and when it saves: a callback of transformers' Trainer."""

import time
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel, TrainerCallback

from tasks.engine.distributed import ranks
from tasks.engine.training.throughput import Meter

if TYPE_CHECKING:
    from tasks.engine.training.loop import GuardedTrainer
    from tasks.engine.training.spec import Plan

SECONDS_BETWEEN_EVENTS = 0.5


class Reporter(TrainerCallback):
    """Metrics of every step, progress twice a second at most; checkpoints by step, time, at the end and on SIGTERM."""

    def __init__(self, trainer: "GuardedTrainer", plan: "Plan") -> None:
        self.trainer, self.plan = trainer, plan
        self.start = self.saved = self.told = time.monotonic()
        self.step_began = self.start
        self.start_step = 0
        self.tokens = 0
        self.meter: Meter | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Starts the clocks; a resumed run's speed counts its own steps only."""
        self.start = self.saved = self.told = self.step_began = time.monotonic()
        self.start_step = state.global_step
        self.meter = Meter(cast(PreTrainedModel, self.trainer.model))

    def wants_checkpoint(self) -> bool:
        """Whether the time for one has come; process 0 decides for all."""
        return ranks.rank() == 0 and time.monotonic() - self.saved >= self.plan.config.save_every_seconds

    def told_step(self, step: int, tokens: int, labels: int, rows: list[int]) -> None:
        """Tells a step's numbers, which the history has just got."""
        now = time.monotonic()
        self.tokens += tokens
        numbers = {name: values[-1] for name, values in self.trainer.history.steps.items()}
        speed = self._speed(now - self.step_began, tokens, labels, rows)
        self.plan.job.metrics(step, **numbers, **speed)
        self.step_began = now
        if step == self.plan.steps or now - self.told >= SECONDS_BETWEEN_EVENTS:
            self._tell(step, now, numbers["loss"], speed)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Validates, and asks for a checkpoint where one is due."""
        step, config = state.global_step, self.plan.config
        last = step == self.plan.steps
        validates = config.validate_every_steps and step % config.validate_every_steps == 0 and not last
        stop = self.trainer.must_stop if ranks.count() > 1 else self.plan.job.stop_requested
        by_step = config.save_every_steps and step % config.save_every_steps == 0
        saves = last or stop or by_step or self.trainer.must_save
        if saves or validates:
            self.trainer.catch_up()
            began = time.monotonic()
            if validates:
                self.trainer.validate()
            self.step_began += time.monotonic() - began
        if saves:
            control.should_save, self.saved, self.trainer.must_save = True, time.monotonic(), False
        if stop:
            control.should_training_stop = True

    def finish(self) -> dict[str, float]:
        """This try's speed as it goes into the report."""
        return self.meter.summary() if self.meter else {}

    def _speed(self, seconds: float, tokens: int, labels: int, rows: list[int]) -> dict[str, float]:
        trainer = self.trainer
        assert self.meter is not None  # made when training began
        lengths = [len(self.plan.examples[row].input_ids) for row in rows]
        told = self.meter.step(seconds, tokens, labels, lengths, ranks.count())
        return told if not trainer.loss_scale.used else {**told, "loss_scale": trainer.loss_scale.factor}

    def _tell(self, step: int, now: float, loss: float, speed: dict[str, float]) -> None:
        left = (self.plan.steps - step) * (now - self.start) / (step - self.start_step)
        told = [f"loss {loss:.4f}", f"{self.tokens / max(now - self.told, 1e-9):,.0f} tokens/s"]
        told.append(f"peak {speed['peak_gib']:.1f} GiB")
        told += [f"MFU {speed['mfu']:.0%}"] if "mfu" in speed else []
        told.append(f"{clock(left)} left")
        self.plan.job.progress(step, self.plan.steps, "steps", ", ".join(told))
        self.told, self.tokens = now, 0


def clock(seconds: float) -> str:
    """`3:07`, or `2:03:07` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
