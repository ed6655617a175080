"""What a checkpoint keeps of a training loop, so that any number of processes can resume from it.

Trained weights, optimizer state, history and loss scale are one for all processes and saved unsharded, by process 0;
random states are one a process.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from tasks.engine.distributed import fsdp, ranks
from tasks.engine.training import checkpoint, optimizer_state
from tasks.engine.training.history import History
from tasks.engine.training.loss_scaling import LossScale
from tasks.engine.training.spec import TrainingSpec


@dataclass
class TrainingState:
    """The parts of a loop that change as it runs; `rate_scale` is what divergences have left of the learning rate."""

    spec: TrainingSpec
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    history: History
    loss_scale: LossScale
    rate_scale: float

    def trained_weights(self) -> dict[str, Tensor]:
        """Trained parameters by name, unsharded; every process has to call it."""
        named = self.model.named_parameters()
        return {name: fsdp.full_tensor(p.detach()) for name, p in named if p.requires_grad}

    def save(self, step: int) -> None:
        """Writes the checkpoint of `step` finished steps; every process has to call it."""
        optimizer, settings = optimizer_state.flatten(self.optimizer)
        tensors = {"model": self.trained_weights(), "optimizer": optimizer, "history": self.history.tensors()}
        generators = ranks.all_gather(checkpoint.random_state())
        tensors["random"] = {
            f"{rank}/{name}": tensor for rank, (states, _) in enumerate(generators) for name, tensor in states.items()
        }
        documents = {
            "state": {
                "optimizer": settings,
                "random": [seeds for _, seeds in generators],
                "scale": self.rate_scale,
                "loss_scale": self.loss_scale.state(),
            },
            "trainer_state": {"global_step": step, "max_steps": self.spec.steps},
        }
        if ranks.rank() == 0:
            checkpoint.write(self.spec.checkpoints, step, tensors, documents, self.spec.fingerprint)
        ranks.barrier()

    def restore(self, directory: Path) -> int:
        """Puts a checkpoint's state in place; the number of its finished steps."""
        step, state = checkpoint.read_step(directory), checkpoint.read_state(directory)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint.read(directory, "model").items():
                parameters[name].copy_(fsdp.shard_like(value, parameters[name]))
        self.history.restore(checkpoint.read(directory, "history"))
        self.loss_scale.restore(state["loss_scale"])
        optimizer_state.restore(self.optimizer, checkpoint.read(directory, "optimizer"), state["optimizer"])
        optimizer_state.resume_schedule(self.optimizer, self.scheduler, step)
        rank, seeds = ranks.rank(), state["random"]
        if rank < len(seeds):  # a process that was not there before keeps its own seed
            tensors, prefix = checkpoint.read(directory, "random"), f"{rank}/"
            generators = {
                name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
            }
            checkpoint.restore_random_state(generators, seeds[rank])
        return step


def unsharded_model(spec: TrainingSpec, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A newly built model with trained `weights` in place."""
    model = spec.build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    return model
