"""An optimizer's state through a checkpoint, and from AdamW into bitsandbytes' 8-bit AdamW."""

import json

import bitsandbytes
import pytest
import torch
from torch import nn

from tasks.engine.training import checkpoint
from tasks.engine.training.optimizer_state import flatten, restore
from tasks.engine.training.train import train
from tests.engine.training.test_loop import assert_equal, base, rows, sigterm, training_spec, weights  # noqa: F401

KINDS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "adamw_8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, weight_decay=1e-2),
}


def stepped(kind: str, steps: int, model: nn.Module | None = None):
    """A model of one large and one small tensor, and its optimizer, after some steps on fixed data."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 3))
    optimizer, data = KINDS[kind](model.parameters()), torch.randn(8, 16, 96)
    for batch in data[:steps]:
        step(model, optimizer, batch)
    return model, optimizer, data[steps:]


def step(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()


def through_a_checkpoint(optimizer, target, directory) -> None:
    tensors, settings_document = flatten(optimizer)
    saved = checkpoint.write(directory, 2, {"optimizer": tensors}, {"state": settings_document}, fingerprint="run")
    restore(target, checkpoint.read(saved, "optimizer"), json.loads((saved / "state.json").read_text()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_steps_are_those_of_an_optimizer_that_never_stopped(kind, tmp_path):
    model, optimizer, remaining = stepped(kind, 4)
    restored = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 3))
    restored.load_state_dict(model.state_dict())
    resumed = KINDS[kind](restored.parameters())
    through_a_checkpoint(optimizer, resumed, tmp_path)
    for batch in remaining:
        step(model, optimizer, batch)
        step(restored, resumed, batch)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("before, after", [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_moments_survive_the_change_of_optimizer(before, after, tmp_path):
    model, optimizer, remaining = stepped(before, 4)
    restored = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 3))
    restored.load_state_dict(model.state_dict())
    changed, fresh = KINDS[after](restored.parameters()), nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 3))
    fresh.load_state_dict(model.state_dict())
    forgetful = KINDS[after](fresh.parameters())
    through_a_checkpoint(optimizer, changed, tmp_path)
    for batch in remaining[:2]:
        step(model, optimizer, batch)
        step(restored, changed, batch)
        step(fresh, forgetful, batch)

    def distance(other: nn.Module) -> float:
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        return sum(float((parameter - its).detach().square().sum()) for parameter, its in pairs) ** 0.5

    assert distance(restored) < 0.2 * distance(fresh), "a new optimizer's first steps are larger than the kept moments'"


def test_a_run_falls_to_the_paged_8_bit_optimizer_and_goes_on(base, rows, tmp_path):  # noqa: F811
    settings = dict(dropout=0, micro_batch_size=1, gradient_checkpointing=True, rank=64, max_steps=8)
    _, uninterrupted = train(training_spec(base, rows, tmp_path / "whole", **settings))

    def run_out(call: int) -> None:
        if call > 4 * 8:
            raise torch.OutOfMemoryError("CUDA out of memory")

    short = training_spec(base, rows, tmp_path / "short", at_micro_batch=run_out, **settings)
    with pytest.raises(torch.OutOfMemoryError):
        train(short)
    lower = training_spec(base, rows, tmp_path / "short", level=1, **settings)
    assert lower.config.optimizer == "paged_adamw_8bit"
    model, history = train(lower)
    assert history.steps["loss"][:4] == uninterrupted.steps["loss"][:4]
    assert history.steps["loss"][-1] == pytest.approx(uninterrupted.steps["loss"][-1], rel=0.02)
    reread, _ = train(training_spec(base, rows, tmp_path / "short", level=1, **settings))
    assert_equal(weights(reread), weights(model))
