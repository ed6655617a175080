"""Forward and backward of CudaGraphs without capture, against autograd's gradients; replays need a CUDA device."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import to_device
from tasks.engine.data.micro_batches import MicroBatchDataset
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.speed.cuda_graphs import LABELS, CudaGraphs, pad_labels, padded_label_counts
from tasks.engine.speed.packing_support import enable_packing
from tests.pico import pico_model


def objective(model, batch):
    hidden, head = hidden_states(model, batch), head_of(model)
    return LossSums(cross_entropy(hidden, head, batch["labels"], head_grad=batch.get("head_grad")))


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(pico_model(tmp_path), dtype=torch.float32)


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in range(12):
        ids = torch.randint(4, 300, (10 + length,), generator=generator).tolist()
        examples.append(Example(ids, [-100] * 5 + ids[5:]))
    return examples


def plain_gradients(model, batches) -> list[torch.Tensor]:
    reference = copy.deepcopy(model)
    for batch in batches:
        objective(reference, batch).loss.backward()
    return [p.grad for p in reference.parameters()]


def test_accumulated_gradients_equal_autograds(model):
    """Tied weights: the head's products and the embedding's backward accumulate into one gradient."""
    enable_packing(model, torch.float32)
    feed = MicroBatchDataset(rows(), list(range(12)), 6, 3, packed=True, shapes=1, multiple=16)
    batches = [feed[0], feed[1]]
    expected = plain_gradients(model, batches)
    graphs = CudaGraphs(model, objective, padded_label_counts(feed))
    for _ in range(2):  # a step begins at 0 whatever the last one left
        graphs.begin_step()
        for batch in batches:
            graphs._forward_backward(pad_labels(batch, graphs.label_counts))
    assert all(p.grad is grad for p, grad in zip(graphs.trainable, graphs.grads, strict=True))
    for grad, expected_grad in zip(graphs.grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    labels = sum(len(batch["labels"]) for batch in batches)
    norm = graphs.finish_step(labels, max_norm=0.1)
    exact = torch.cat([grad.flatten() for grad in expected]).norm() / labels
    assert float(norm) == pytest.approx(float(exact), rel=1e-4)
    assert float(graphs.flat_grads.norm()) == pytest.approx(min(0.1, float(exact)), rel=1e-3)


def other_objective(model, batch):
    hidden, head = hidden_states(model, batch), head_of(model)
    return LossSums(cross_entropy(hidden, head, batch["labels"]))  # its head's gradient comes by autograd


@pytest.mark.parametrize("loss", [objective, other_objective])
def test_a_step_of_one_micro_batch_overwrites_gradients(model, loss):
    enable_packing(model, torch.float32)
    feed = MicroBatchDataset(rows(), list(range(12)), 6, 6, packed=True, shapes=1, multiple=16)
    expected = plain_gradients(model, [feed[0]])
    graphs = CudaGraphs(model, loss, padded_label_counts(feed))
    assert graphs.decoder is not None
    assert graphs.can_overwrite
    graphs.begin_step()
    for grad in graphs.grads:
        grad.fill_(torch.nan)
    graphs._forward_backward(pad_labels(feed[0], graphs.label_counts), overwrite=True)
    for grad, expected_grad in zip(graphs.grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


def test_padded_labels_leave_the_loss_unchanged(model):
    enable_packing(model, torch.float32)
    feed = MicroBatchDataset(rows(), list(range(12)), 6, 3, packed=True, shapes=1, multiple=16)
    batch = feed[0]
    padded = pad_labels({**batch, "teacher_states": torch.ones(len(batch["labels"]), 4)}, padded_label_counts(feed))
    assert len(padded["labels"]) % LABELS == 0
    assert padded["teacher_states"].shape == (len(padded["labels"]), 4)
    assert float(objective(model, padded).loss) == pytest.approx(float(objective(model, batch).loss), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_add_the_gradients_of_each_batch(model):
    model = model.cuda()
    enable_packing(model, torch.bfloat16)
    feed = MicroBatchDataset(rows() * 3, list(range(36)), 12, 6, packed=True, shapes=2, multiple=16)
    batches = [to_device(feed[i], model.device) for i in range(len(feed))]

    def autocast_objective(model, batch):
        with torch.autocast("cuda", torch.bfloat16):
            return objective(model, batch)

    reference = copy.deepcopy(model)
    for batch in batches:
        autocast_objective(reference, batch).loss.backward()
    graphs = CudaGraphs(model, autocast_objective, padded_label_counts(feed))
    for _ in range(3):  # the first meets every shape anew, the second captures, the third replays
        graphs.begin_step()
        losses = [float(graphs.run(batch).loss) for batch in batches]
    assert len(graphs.graphs) >= 1
    assert losses == pytest.approx([float(autocast_objective(reference, batch).loss) for batch in batches], rel=1e-2)
    for grad, parameter in zip(graphs.grads, reference.parameters(), strict=True):
        assert float((grad - parameter.grad).norm() / parameter.grad.norm()) < 0.05  # the residual stream is bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wait", [lambda loss: loss.item(), lambda loss: torch.tensor(1.0, device=loss.device)])
def test_a_model_that_synchronizes_runs_without_graphs(model, wait):
    model = model.cuda()
    enable_packing(model, torch.bfloat16)
    feed = MicroBatchDataset(rows(), list(range(12)), 12, 12, packed=True, shapes=1, multiple=16)
    batch, warnings = to_device(feed[0], model.device), []

    def waiting_objective(model, batch):
        with torch.autocast("cuda", torch.bfloat16):
            sums = objective(model, batch)
            wait(sums.loss)
            return sums

    graphs = CudaGraphs(model, waiting_objective, padded_label_counts(feed), warn=warnings.append)
    losses, norms = [], []
    for _ in range(4):
        graphs.begin_step()
        losses.append(float(graphs.run(batch).loss))
        norms.append(float(graphs.finish_step(1, 0)))
    assert len(warnings) == 1 and "without CUDA graphs" in warnings[0]
    assert losses[1:] == pytest.approx(losses[:1] * 3, rel=1e-3) and norms[1:] == pytest.approx(norms[:1] * 3, rel=1e-2)
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator is not left waiting for a capture's end
