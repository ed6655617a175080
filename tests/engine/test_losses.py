import math

import pytest
import torch

from tasks.engine.losses import Head, Mix, cross_entropy, distillation

N, H, G, V = 13, 8, 10, 37


def tensors(teacher_columns: int = V, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, min(V, teacher_columns), (N,), generator=generator)
    return (
        (randn(N, H) * 2).requires_grad_(),
        randn(V, H).requires_grad_(),
        labels,
        randn(N, G) * 2,
        randn(teacher_columns, G),
    )


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(hidden, weight, labels, teacher_hidden, teacher_weight, mix: Mix, softcap, teacher_softcap):
    """The formulas as their papers write them, through autograd."""
    student = capped(hidden @ weight.T, softcap)
    teacher = capped(teacher_hidden @ teacher_weight.T, teacher_softcap)
    ce = -torch.log_softmax(student, -1)[torch.arange(len(labels)), labels].sum()
    shared = min(student.shape[1], teacher.shape[1])
    p = torch.softmax(teacher[:, :shared] / mix.temperature, -1)
    q = torch.softmax(student[:, :shared] / mix.temperature, -1)
    if mix.divergence == "forward_kl":
        value = (p * (p / q).log()).sum()
    elif mix.divergence == "reverse_kl":
        value = (q * (q / p).log()).sum()
    else:
        m = mix.beta * p + (1 - mix.beta) * q
        value = mix.beta * (p * (p / m).log()).sum() + (1 - mix.beta) * (q * (q / m).log()).sum()
    kd = value * mix.temperature**2
    return mix.kd_weight * kd + mix.ce_weight * ce, kd, ce


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("teacher_columns", [V, V + 5, V - 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_formula_in_value_and_gradient(divergence, softcap, teacher_columns, temperature):
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors(teacher_columns)
    mix = Mix(0.7, 0.3, temperature, divergence, beta=0.3)
    rows_of_three = 3 * 4 * 4 * V
    ours = distillation(
        hidden, Head(weight, softcap), labels, teacher_hidden, Head(teacher_weight, 5.0), mix, rows_of_three
    )
    (ours.loss / 7).backward()
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = reference(hidden, weight, labels, teacher_hidden, teacher_weight, mix, softcap, 5.0)
    (expected[0] / 7).backward()
    for got, want in zip((*ours, *gradients), (*expected, hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 16 * V, 1 << 30])
def test_cross_entropy_does_not_depend_on_the_chunk(chunk_bytes):
    hidden, weight, labels, *_ = tensors()
    loss = cross_entropy(hidden, Head(weight), labels, chunk_bytes)
    loss.backward()
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected.backward()
    for got, want in zip((loss, *gradients), (expected, hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient(divergence):
    hidden, weight, labels, *_ = tensors()
    losses = distillation(
        hidden, Head(weight), labels, hidden.detach(), Head(weight.detach()), Mix(1, 0, 2, divergence)
    )
    losses.loss.backward()
    assert abs(float(losses.kd_loss)) < 1e-12
    assert float(hidden.grad.abs().max()) < 1e-12


def test_the_temperature_squared_keeps_the_gradient_in_size():
    """For small logits KL * T^2 tends to half the squared distance of the centred logits: independent of T."""
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    norms = []
    for temperature in (50.0, 100.0):
        hidden.grad = None
        mix = Mix(1, 0, temperature)
        distillation(hidden, Head(weight), labels, teacher_hidden, Head(teacher_weight), mix).loss.backward()
        norms.append(float(hidden.grad.norm()))
    assert math.isclose(*norms, rel_tol=0.03)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels, *_ = tensors()
    frozen = weight.detach()
    cross_entropy(hidden, Head(frozen), labels).backward()
    assert frozen.grad is None and hidden.grad is not None


def test_bfloat16_states_stay_close_to_the_exact_loss():
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    exact = distillation(hidden, Head(weight), labels, teacher_hidden, Head(teacher_weight), Mix(0.7, 0.3, 2))
    half = [t.detach().bfloat16() for t in (hidden, weight, teacher_hidden, teacher_weight)]
    rough = distillation(half[0], Head(half[1]), labels, half[2], Head(half[3]), Mix(0.7, 0.3, 2))
    assert rough.loss.dtype == torch.float32
    assert math.isclose(float(rough.loss.detach()), float(exact.loss.detach()), rel_tol=0.02)
