"""A training run with its attempts: resume from the newest checkpoint, go back after a divergence.

    model, history = train(TrainingSpec(build, examples, validation, objective, config, job, fingerprint))

SIGTERM saves a checkpoint after the running step and raises Preempted; the same call then resumes from the newest
verified checkpoint, over the same rows, to the same weights. A diverged run goes back to its last good checkpoint with
half the learning rate.
"""

import gc
from pathlib import Path

from transformers import PreTrainedModel

from tasks.core.errors import Diverged
from tasks.engine.distributed import ranks
from tasks.engine.training import checkpoint
from tasks.engine.training.diagnosis import DivergedStep
from tasks.engine.training.history import History
from tasks.engine.training.loop import TrainingLoop
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.training_state import unsharded_model


def train(spec: TrainingSpec) -> tuple[PreTrainedModel, History]:
    """The trained model, in evaluation mode, and the run's history by step.

    Raises Preempted after SIGTERM, Diverged when `config.rollbacks` did not help.
    """
    rate_scale = 1.0
    for rollback in range(spec.config.rollbacks + 1):
        resumed = _newest_checkpoint(spec)
        if resumed:
            rate_scale = min(rate_scale, checkpoint.read_state(resumed)["scale"])
            spec.job.log(f"resumes from {resumed.name} of {spec.steps} steps")
        try:
            return _attempt(spec, resumed, rate_scale)
        except DivergedStep as error:
            if rollback == spec.config.rollbacks:
                times = f", after going back {rollback} times" if rollback else ""
                advice = f"Set a lower learning_rate than {spec.config.learning_rate:g}"
                raise Diverged(f"{error}{times}. {advice}") from error
            message, rate_scale, last_good_step = str(error), rate_scale / 2, error.last_good_step
        gc.collect()  # the diverged model and its optimizer
        if ranks.rank() == 0:
            checkpoint.discard_after(spec.checkpoints, last_good_step)
        spec.warn(f"{message}; back to the last good checkpoint with {rate_scale:g} of the learning rate")
    raise AssertionError("the loop returns or raises")


def _newest_checkpoint(spec: TrainingSpec) -> Path | None:
    """The checkpoint that all processes resume from, as process 0 finds it."""
    ranks.barrier()
    newest = checkpoint.newest(spec.checkpoints, spec.fingerprint, spec.warn) if ranks.rank() == 0 else None
    name = ranks.broadcast(newest.name if newest else None)
    return spec.checkpoints / name if name else None


def _attempt(spec: TrainingSpec, resumed: Path | None, rate_scale: float) -> tuple[PreTrainedModel, History]:
    loop = TrainingLoop(spec, rate_scale)
    with spec.job.defer_stop():
        loop.run(resumed)
        spec.job.stop_requested |= loop.stops  # another process was asked to
    loop.history.speed = loop.reporter.meter.summary()
    history = loop.history
    if spec.is_sharded:
        weights = loop.state().trained_weights()
        del loop
        gc.collect()
        model = unsharded_model(spec, weights)
    else:
        model = loop.model
    model.train(False)
    return model, history
