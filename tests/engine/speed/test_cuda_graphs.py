"""What a graph replays, run without one: autograd's gradients, in one buffer. Replays need a CUDA device."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import to_device
from tasks.engine.data.micro_batches import Feed
from tasks.engine.losses import cross_entropy
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.speed.cuda_graphs import LABELS, Graphs, fill_labels, most_labels
from tasks.engine.speed.packing_support import make_packable
from tests.pico import pico_model


def objective(model, batch):
    return {
        "loss": cross_entropy(hidden_states(model, batch), head_of(model), batch["labels"], into=batch.get("head_grad"))
    }


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(pico_model(tmp_path), dtype=torch.float32)


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for n in range(12):
        ids = torch.randint(4, 300, (10 + n,), generator=generator).tolist()
        found.append(Example(ids, [-100] * 5 + ids[5:]))
    return found


def plain_gradients(model, batches) -> list[torch.Tensor]:
    other = copy.deepcopy(model)
    for batch in batches:
        objective(other, batch)["loss"].backward()
    return [p.grad for p in other.parameters()]


def test_gradients_added_in_place_are_autograds(model):
    """Tied weights: the head's products and the embedding's look-ups meet in one place of the buffer."""
    make_packable(model, torch.float32)
    feed = Feed(rows(), list(range(12)), 6, 3, packed=True, shapes=1, multiple=16)
    batches = [feed[0], feed[1]]
    want = plain_gradients(model, batches)
    graphs = Graphs(model, objective, most_labels(feed))
    for _ in range(2):  # a step begins at 0 whatever the last one left
        graphs.begin()
        for batch in batches:
            graphs._work(fill_labels(batch, graphs.most))
    assert all(p.grad is grad for p, grad in zip(graphs.trained, graphs.grads, strict=True))
    for got, expected in zip(graphs.grads, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    labels = sum(len(batch["labels"]) for batch in batches)
    norm = graphs.finish(labels, most=0.1)
    exact = torch.cat([grad.flatten() for grad in want]).norm() / labels
    assert float(norm) == pytest.approx(float(exact), rel=1e-4)
    assert float(graphs.flat.norm()) == pytest.approx(min(0.1, float(exact)), rel=1e-3)


def other_objective(model, batch):
    hidden, head = hidden_states(model, batch), head_of(model)
    return {"loss": cross_entropy(hidden, head, batch["labels"])}  # its head's gradient comes by autograd


@pytest.mark.parametrize("work", [objective, other_objective])
def test_a_step_of_one_micro_batch_writes_gradients_whatever_was_there(model, work):
    make_packable(model, torch.float32)
    feed = Feed(rows(), list(range(12)), 6, 6, packed=True, shapes=1, multiple=16)
    want = plain_gradients(model, [feed[0]])
    graphs = Graphs(model, work, most_labels(feed))
    assert graphs.stack is not None
    assert graphs.writes
    graphs.begin()
    for grad in graphs.grads:
        grad.fill_(torch.nan)
    graphs._work(fill_labels(feed[0], graphs.most), fresh=True)
    for got, expected in zip(graphs.grads, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_filled_labels_have_one_number_and_change_nothing(model):
    make_packable(model, torch.float32)
    feed = Feed(rows(), list(range(12)), 6, 3, packed=True, shapes=1, multiple=16)
    batch = feed[0]
    filled = fill_labels({**batch, "teacher_states": torch.ones(len(batch["labels"]), 4)}, most_labels(feed))
    assert len(filled["labels"]) % LABELS == 0
    assert filled["teacher_states"].shape == (len(filled["labels"]), 4)
    assert float(objective(model, filled)["loss"]) == pytest.approx(float(objective(model, batch)["loss"]), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_add_the_gradients_of_each_batch(model):
    model = model.cuda()
    make_packable(model, torch.bfloat16)
    feed = Feed(rows() * 3, list(range(36)), 12, 6, packed=True, shapes=2, multiple=16)
    batches = [to_device(feed[i], model.device) for i in range(len(feed))]

    def half(model, batch):
        with torch.autocast("cuda", torch.bfloat16):
            return objective(model, batch)

    other = copy.deepcopy(model)
    for batch in batches:
        half(other, batch)["loss"].backward()
    graphs = Graphs(model, half, most_labels(feed))
    for _ in range(3):  # the first meets every shape anew, the second captures, the third replays
        graphs.begin()
        losses = [float(graphs.run(batch)["loss"]) for batch in batches]
    assert len(graphs.captured) >= 1
    assert losses == pytest.approx([float(half(other, batch)["loss"]) for batch in batches], rel=1e-2)
    for got, parameter in zip(graphs.grads, other.parameters(), strict=True):
        assert float((got - parameter.grad).norm() / parameter.grad.norm()) < 0.05  # the residual stream is bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("waits", [lambda loss: loss.item(), lambda loss: torch.tensor(1.0, device=loss.device)])
def test_a_model_that_waits_for_the_device_goes_on_without_graphs(model, waits):
    model = model.cuda()
    make_packable(model, torch.bfloat16)
    feed = Feed(rows(), list(range(12)), 12, 12, packed=True, shapes=1, multiple=16)
    batch, told = to_device(feed[0], model.device), []

    def half(model, batch):
        with torch.autocast("cuda", torch.bfloat16):
            sums = objective(model, batch)
            waits(sums["loss"])
            return sums

    graphs = Graphs(model, half, most_labels(feed), warn=told.append)
    losses, norms = [], []
    for _ in range(4):
        graphs.begin()
        losses.append(float(graphs.run(batch)["loss"]))
        norms.append(float(graphs.finish(1, 0)))
    assert len(told) == 1 and "without CUDA graphs" in told[0]
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-3) and norms[1:] == pytest.approx(norms[:1] * 3, rel=1e-2)
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator is not left waiting for a capture's end
