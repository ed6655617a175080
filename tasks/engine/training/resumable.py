"""transformers' Trainer with checkpoints that can be trusted, and that any number of processes goes on from."""

import dataclasses
import gc
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from tasks.engine.distributed import fsdp, ranks
from tasks.engine.training import checkpoint, optimizer_state
from tasks.engine.training.history import History
from tasks.engine.training.loss_scaling import LossScale
from tasks.engine.training.spec import Plan


class Resumable(Trainer):
    """What is trained, the optimizer, the history and all random states, in `tasks.engine.training.checkpoint`'s files.

    `scale` is what the run's divergences have left of the learning rate.
    """

    plan: Plan
    history: History
    loss_scale: LossScale
    scale: float

    def whole_model(self) -> PreTrainedModel:
        """A model that is not split, with what was trained in it."""
        trained = self._trained()
        self.model = self.model_wrapped = self.optimizer = None  # type: ignore[assignment]
        self.callback_handler.model = self.callback_handler.optimizer = None
        gc.collect()
        model = self.plan.build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.copy_(trained[name])
        return model

    def _trained(self) -> dict[str, Tensor]:
        named = cast(nn.Module, self.model).named_parameters()
        return {name: fsdp.whole(p.detach()) for name, p in named if p.requires_grad}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        optimizer, rest = optimizer_state.flatten(self._plain_optimizer())
        tensors = {"model": self._trained(), "optimizer": optimizer, "history": self.history.tensors()}
        generators = ranks.all_of(checkpoint.random_state())
        tensors["random"] = {f"{i}/{name}": t for i, (own, _) in enumerate(generators) for name, t in own.items()}
        state = {"optimizer": rest, "random": [seeds for _, seeds in generators], "scale": self.scale}
        state["loss_scale"] = self.loss_scale.state()
        documents = {"state": state, "trainer_state": dataclasses.asdict(self.state)}
        if ranks.rank() == 0:
            checkpoint.write(self.plan.checkpoints, self.state.global_step, tensors, documents, self.plan.made_by)
        ranks.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        found, kept = Path(resume_from_checkpoint), dict(cast(nn.Module, self.model).named_parameters())
        with torch.no_grad():
            for name, value in checkpoint.read(found, "model").items():
                kept[name].copy_(fsdp.part_like(value, kept[name]))
        self.history.restore(checkpoint.read(found, "history"))
        self.loss_scale.restore(checkpoint.read_state(found)["loss_scale"])

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None:
            return
        found, optimizer, scheduler = Path(checkpoint_dir), self._plain_optimizer(), cast(Any, self.lr_scheduler)
        optimizer_state.restore(
            optimizer, checkpoint.read(found, "optimizer"), checkpoint.read_state(found)["optimizer"]
        )
        optimizer_state.go_on(optimizer, scheduler, self.state.global_step)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, getattr(self.optimizer, "optimizer", self.optimizer))  # below accelerate's

    def _load_rng_state(self, checkpoint_dir: str | None) -> None:
        if checkpoint_dir is None:
            return
        found, own = Path(checkpoint_dir), f"{ranks.rank()}/"
        seeds, tensors = checkpoint.read_state(found)["random"], checkpoint.read(found, "random")
        if ranks.rank() < len(seeds):  # a process that was not there before goes on with its own seed
            mine = {name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}
            checkpoint.restore_random_state(mine, seeds[ranks.rank()])
