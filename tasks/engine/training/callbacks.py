"""Reports of a running training: metrics of every step, and progress twice a second at most."""

import time

from transformers import PreTrainedModel

from tasks.engine.distributed import ranks
from tasks.engine.training.history import History
from tasks.engine.training.loss_scaling import LossScale
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.throughput import ThroughputMeter

SECONDS_BETWEEN_EVENTS = 0.5


class Reporter:
    """Sends each finished step's numbers to the job, and keeps the clocks of speed and checkpoints."""

    def __init__(self, spec: TrainingSpec, model: PreTrainedModel, history: History, loss_scale: LossScale) -> None:
        self.spec, self.history, self.loss_scale = spec, history, loss_scale
        self.meter = ThroughputMeter(model)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Starts the clocks after `step` finished steps; a resumed run's speed counts its own steps only."""
        self.run_start = self.last_checkpoint = self.last_progress = self.step_start = time.monotonic()
        self.first_step = step
        self.tokens = 0

    def checkpoint_is_due(self) -> bool:
        """Whether `save_every_seconds` have passed; process 0 decides for all."""
        return ranks.rank() == 0 and time.monotonic() - self.last_checkpoint >= self.spec.config.save_every_seconds

    def checkpoint_starts(self) -> None:
        """Restarts the clock of `checkpoint_is_due`."""
        self.last_checkpoint = time.monotonic()

    def leave_out(self, seconds: float) -> None:
        """Keeps a validation's time out of the step's."""
        self.step_start += seconds

    def step_metrics(self, step: int, tokens: int, labels: int, rows: list[int]) -> None:
        """Sends a step's numbers, which have just been added to the history."""
        clock_time = time.monotonic()
        self.tokens += tokens
        values = {name: series[-1] for name, series in self.history.steps.items()}
        lengths = [len(self.spec.examples[row].input_ids) for row in rows]
        speed = self.meter.step(clock_time - self.step_start, tokens, labels, lengths, ranks.world_size())
        if self.loss_scale.used:
            speed["loss_scale"] = self.loss_scale.factor
        self.spec.job.metrics(step, **values, **speed)
        self.step_start = clock_time
        if step == self.spec.steps or clock_time - self.last_progress >= SECONDS_BETWEEN_EVENTS:
            self._progress(step, clock_time, values["loss"], speed)

    def _progress(self, step: int, clock_time: float, loss: float, speed: dict[str, float]) -> None:
        remaining = (self.spec.steps - step) * (clock_time - self.run_start) / (step - self.first_step)
        notes = [f"loss {loss:.4f}", f"{self.tokens / max(clock_time - self.last_progress, 1e-9):,.0f} tokens/s"]
        notes.append(f"peak {speed['peak_gib']:.1f} GiB")
        notes += [f"MFU {speed['mfu']:.0%}"] if "mfu" in speed else []
        notes.append(f"{clock(remaining)} left")
        self.spec.job.progress(step, self.spec.steps, "steps", ", ".join(notes))
        self.last_progress, self.tokens = clock_time, 0


def clock(seconds: float) -> str:
    """`3:07`, or `2:03:07` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
