"""The losses of a chunk against the papers' formulas, through autograd in float64."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch

from tasks.engine.losses.chunked import cross_entropy, distillation
from tasks.engine.losses.divergence_registry import DIVERGENCES
from tasks.engine.losses.loss_mix import Head, LossMix, TopK

N, H, G, V = 13, 8, 10, 37
PARAMETERS = {"jsd_beta": 0.3, "skew": 0.2, "ab_alpha": 0.4, "ab_beta": 0.9}  # none of them a default
NOT_SMOOTH = {"total_variation"}  # their gradient does not vanish near the teacher
KERNELS = [name for name, divergence in DIVERGENCES.items() if divergence.kernel is not None]


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


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a / b).log()).sum(-1)


def alpha_beta(p: torch.Tensor, q: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Equation 3 of arXiv 2505.04560, with the limits of Cichocki et al. (2011) at 0."""
    total = alpha + beta
    if alpha == beta == 0:
        terms = (p.log() - q.log()) ** 2 / 2
    elif alpha == 0:
        terms = (q**beta * (q**beta / p**beta).log() - q**beta + p**beta) / beta**2
    elif beta == 0:
        terms = (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha) / alpha**2
    elif total == 0:
        terms = ((q**alpha / p**alpha).log() + p**alpha / q**alpha - 1) / alpha**2
    else:
        terms = -(p**alpha * q**beta - alpha / total * p**total - beta / total * q**total) / (alpha * beta)
    return terms.sum(-1)


def mixture(p: torch.Tensor, q: torch.Tensor, share: float) -> torch.Tensor:
    return share * p + (1 - share) * q


FORMULAS: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q, beta: beta * kl(p, mixture(p, q, beta)) + (1 - beta) * kl(q, mixture(p, q, beta)),
    "skew_kl": lambda p, q, alpha: kl(p, mixture(p, q, alpha)),
    "skew_reverse_kl": lambda p, q, alpha: kl(q, mixture(q, p, alpha)),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "alpha_beta": alpha_beta,
}  # as the papers write them


def test_every_divergence_is_held_to_its_formula():
    assert FORMULAS.keys() == DIVERGENCES.keys()


def formula(p: torch.Tensor, q: torch.Tensor, mix: LossMix) -> torch.Tensor:
    """D(p, q) a row."""
    return FORMULAS[mix.divergence](p, q, **mix.arguments())


def loss_mix(divergence: str, kd: float = 0.7, ce: float = 0.3, temperature: float = 2) -> LossMix:
    """The divergence with parameters that are no defaults."""
    settings = {parameter.setting for parameter in DIVERGENCES[divergence].parameters.values()}
    parameters = {name: value for name, value in PARAMETERS.items() if name in settings}
    return LossMix(kd, ce, temperature, divergence, parameters)


def reference(student, teacher, labels, mix: LossMix, weights) -> tuple[torch.Tensor, ...]:
    """Loss, parts and norms from whole float64 logits, through autograd."""
    shared = min(student.shape[1], teacher.shape[1])
    p = torch.softmax(teacher[:, :shared] / mix.temperature, -1)
    q = torch.softmax(student[:, :shared] / mix.temperature, -1)
    kd = mix.temperature**2 * formula(p, q, mix)
    ce = -torch.log_softmax(student, -1)[torch.arange(len(labels)), labels]
    norms = [torch.autograd.grad(part.sum(), student, retain_graph=True)[0].norm(dim=-1) for part in (kd, ce)]
    kd, ce, kd_norm, ce_norm = ((weights * part).sum() for part in (kd, ce, *norms))
    return mix.kd_weight * kd + mix.ce_weight * ce, kd, ce, kd_norm, ce_norm


def gradients(*leaves: torch.Tensor) -> list[torch.Tensor]:
    grads = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


def assert_equal(got, want) -> None:
    for actual, expected in zip(got, want, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_columns", [V, V + 5, V - 5])
def test_distillation_is_the_formula_in_value_norm_and_gradient(divergence, teacher_columns):
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors(teacher_columns)
    counts = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows_of_three = 3 * 8 * 4 * V
    for softcap, temperature, weights in product((None, 3.0), (1.0, 2.5), (None, counts)):
        mix = loss_mix(divergence, temperature=temperature)
        heads = Head(weight, softcap), Head(teacher_weight, 5.0)
        losses = distillation(hidden, heads[0], labels, teacher_hidden, heads[1], mix, rows_of_three, weights)
        (losses.loss / 7).backward()
        got = [*losses, *gradients(hidden, weight)]
        logits = capped(hidden @ weight.T, softcap), capped(teacher_hidden @ teacher_weight.T, 5.0)
        expected = reference(*logits, labels, mix, torch.ones(N) if weights is None else weights)
        (expected[0] / 7).backward()
        assert_equal(got, [*expected, *gradients(hidden, weight)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_top_k_with_a_tail_is_the_divergence_over_buckets(divergence):
    """k tokens and one bucket for the rest: summed probabilities on both sides, then the paper's formula.

    The teacher's head is padded by 5 columns that are not the student's: they are the tail's.
    """
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors(V + 5)
    mix = loss_mix(divergence)
    teacher = teacher_hidden @ teacher_weight.T
    logits, ids = teacher.topk(4)
    assert (ids >= V).any()
    top_k = TopK(logits, ids.int(), torch.logsumexp(teacher / 2, -1))
    losses = distillation(hidden, Head(weight), labels, top_k, None, mix, 3 * 8 * 4 * V)
    losses.loss.backward()
    got = [losses.loss, losses.kd_loss, *gradients(hidden, weight)]
    student = hidden @ weight.T
    padded = torch.nn.functional.pad(student / 2, (0, 5), value=-math.inf)
    sides = torch.softmax(teacher / 2, -1), torch.softmax(padded, -1)
    top = [torch.where(ids < V, side.gather(1, ids), 1e-300) for side in sides]
    buckets = [torch.cat([side, 1 - side.sum(-1, keepdim=True)], 1) for side in top]
    ce = -torch.log_softmax(student, -1)[torch.arange(N), labels].sum()
    kd = 4 * formula(*buckets, mix).sum()
    (0.7 * kd + 0.3 * ce).backward()
    assert_equal(got, [0.7 * kd + 0.3 * ce, kd, *gradients(hidden, weight)])


def test_merging_tokens_into_the_tail_never_adds_divergence():
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    teacher, mix = teacher_hidden @ teacher_weight.T, LossMix(1, 0, 2)
    lse = torch.logsumexp(teacher / 2, -1)
    values = []
    for k in (1, 4, 16, V):
        logits, ids = teacher.topk(k)
        values.append(float(distillation(hidden, Head(weight), labels, TopK(logits, ids, lse), None, mix).kd_loss))
    assert 0 < values[0] < values[1] < values[2] < values[3]


def test_all_tokens_as_the_top_k_are_the_exact_divergence():
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    mix = LossMix(1, 0, 2)
    teacher = teacher_hidden @ teacher_weight.T
    logits, ids = teacher.topk(V)
    top_k = TopK(logits, ids, torch.logsumexp(teacher / 2, -1))
    losses = distillation(hidden, Head(weight), labels, top_k, None, mix)
    losses.loss.backward()
    got = [losses.loss, *gradients(hidden, weight)]
    exact = distillation(hidden, Head(weight), labels, teacher_hidden, Head(teacher_weight), mix)
    exact.loss.backward()
    assert_equal(got, [exact.loss, *gradients(hidden, weight)])


@pytest.mark.parametrize("chunk_bytes", [1, 5 * 16 * V, 1 << 30])
def test_cross_entropy_does_not_depend_on_the_chunk(chunk_bytes):
    hidden, weight, labels, *_ = tensors()
    loss = cross_entropy(hidden, Head(weight), labels, chunk_bytes)
    loss.backward()
    got = [loss, *gradients(hidden, weight)]
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected.backward()
    assert_equal(got, [expected, *gradients(hidden, weight)])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient(divergence):
    """And a shift of all of the teacher's logits by a constant changes nothing."""
    hidden, weight, labels, *_ = tensors()
    shifted = [torch.cat([t.detach(), torch.full((len(t), 1), 3.0)], 1) for t in (hidden, weight)]
    for states, head in [(hidden.detach(), Head(weight.detach())), (shifted[0], Head(shifted[1]))]:
        losses = distillation(hidden, Head(weight), labels, states, head, loss_mix(divergence, 1, 0))
        losses.loss.backward()
        assert abs(float(losses.kd_loss)) < 1e-12
        largest = float(gradients(hidden, weight)[0].abs().max())
        assert largest < 1e-12 or divergence in NOT_SMOOTH


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_positions_do_not_contribute_even_if_nan(divergence):
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    keep = torch.arange(N) % 3 != 0
    mix, heads = loss_mix(divergence), (Head(weight), Head(teacher_weight))
    subset = distillation(hidden[keep], heads[0], labels[keep], teacher_hidden[keep], heads[1], mix)
    subset.loss.backward()
    want = [*subset, *gradients(hidden, weight)]
    masked = torch.where(keep, labels, -100)
    broken = torch.where(keep[:, None], teacher_hidden, math.nan)
    losses = distillation(hidden, heads[0], masked, broken, heads[1], mix)
    losses.loss.backward()
    assert_equal([*losses, *gradients(hidden, weight)], want)


def test_the_temperature_squared_preserves_the_gradient_size():
    """For small logits KL * T^2 tends to half the squared distance of the centred logits: independent of T."""
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    norms = []
    for temperature in (50.0, 100.0):
        mix = LossMix(1, 0, temperature)
        distillation(hidden, Head(weight), labels, teacher_hidden, Head(teacher_weight), mix).loss.backward()
        norms.append(float(gradients(hidden, weight)[0].norm()))
    assert math.isclose(*norms, rel_tol=0.03)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels, *_ = tensors()
    frozen = weight.detach()
    cross_entropy(hidden, Head(frozen), labels).backward()
    assert frozen.grad is None and hidden.grad is not None


def test_the_heads_gradient_is_accumulated_in_a_buffer():
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    mix, head = LossMix(0.7, 0.3, 2), Head(teacher_weight)
    plain = distillation(hidden, Head(weight), labels, teacher_hidden, head, mix)
    plain.loss.backward()
    want = gradients(hidden, weight)
    total = torch.ones_like(weight)
    losses = distillation(hidden, Head(weight), labels, teacher_hidden, head, mix, 999, head_grad=total)
    losses.loss.backward()
    assert weight.grad is None
    assert_equal([losses.loss, hidden.grad, total - 1], [plain.loss, *want])


def test_weights_in_a_tensor_go_before_those_of_the_mix():
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    heads = Head(weight), Head(teacher_weight)
    want = distillation(hidden, heads[0], labels, teacher_hidden, heads[1], LossMix(0.2, 3, 2))
    parts = torch.tensor([0.2, 3.0], dtype=torch.float64)
    got = distillation(hidden, heads[0], labels, teacher_hidden, heads[1], LossMix(1, 1, 2), part_weights=parts)
    assert_equal(got, want)


def test_bfloat16_states_stay_close_to_the_exact_loss():
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    exact = distillation(hidden, Head(weight), labels, teacher_hidden, Head(teacher_weight), LossMix(0.7, 0.3, 2))
    half = [t.detach().bfloat16() for t in (hidden, weight, teacher_hidden, teacher_weight)]
    rough = distillation(half[0], Head(half[1]), labels, half[2], Head(half[3]), LossMix(0.7, 0.3, 2))
    assert rough.loss.dtype == torch.float32
    assert math.isclose(float(rough.loss.detach()), float(exact.loss.detach()), rel_tol=0.02)


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="temperature=0 must be above 0"):
        LossMix(1, 0, 0)


def test_what_a_divergence_cannot_take_is_refused():
    with pytest.raises(ValueError, match="divergence=hinge is none of forward_kl, .*total_variation"):
        LossMix(1, 0, 2, "hinge")
    with pytest.raises(ValueError, match="jsd_beta=1 must be below 1"):
        LossMix(1, 0, 2, "jsd", {"jsd_beta": 1})
    with pytest.raises(ValueError, match="divergence=jsd has no parameter skew"):
        LossMix(1, 0, 2, "jsd", {"skew": 0.2})


AB_CASES = [(0, 0), (0, 0.7), (0.6, 0), (0.5, -0.5), (-0.4, 0.4), (0.2, 0.7), (0.9, 0.3), (1.3, -0.5), (-0.2, 0.8)]


@pytest.mark.parametrize(("alpha", "beta"), AB_CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_alpha_beta_is_its_formula_and_the_limits_at_0(alpha, beta, temperature):
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()
    mix = LossMix(0.7, 0.3, temperature, "alpha_beta", {"ab_alpha": alpha, "ab_beta": beta})
    losses = distillation(hidden, Head(weight), labels, teacher_hidden, Head(teacher_weight), mix)
    losses.loss.backward()
    got = [*losses, *gradients(hidden, weight)]
    expected = reference(hidden @ weight.T, teacher_hidden @ teacher_weight.T, labels, mix, torch.ones(N))
    expected[0].backward()
    assert_equal(got, [*expected, *gradients(hidden, weight)])


@pytest.mark.parametrize(("alpha", "beta"), AB_CASES)
def test_alpha_beta_is_continuous_at_its_limits(alpha, beta):
    """Parameters 1e-7 beside a limit give its value, where the formula as written has lost all digits."""
    hidden, weight, labels, teacher_hidden, teacher_weight = tensors()

    def value(a: float, b: float) -> float:
        mix = LossMix(1, 0, 2, "alpha_beta", {"ab_alpha": a, "ab_beta": b})
        teacher = Head(teacher_weight)
        return float(distillation(hidden, Head(weight), labels, teacher_hidden, teacher, mix).kd_loss)

    assert value(alpha + 1e-7, beta + 2e-7) == pytest.approx(value(alpha, beta), rel=1e-4)


@pytest.mark.parametrize(("settings", "limit"), [((1, 0), "forward_kl"), ((0, 1), "reverse_kl")])
def test_alpha_beta_has_both_kullback_leibler_divergences_as_limits(settings, limit):
    logp, logq = (torch.log_softmax(t, -1) for t in torch.randn(2, N, V, dtype=torch.float64))
    expected, expected_weighted = DIVERGENCES[limit].terms(logp, logq, logq.exp())
    value, weighted = DIVERGENCES["alpha_beta"].terms(logp, logq, logq.exp(), *map(float, settings))
    shift = logq.exp() if limit == "forward_kl" else 0  # a multiple of q vanishes in the logits' gradient
    assert_equal([value, weighted - shift], [expected, expected_weighted])


@pytest.mark.parametrize("divergence", ["total_variation", "alpha_beta"])
def test_float32_logits_far_apart_give_finite_gradients(divergence):
    """Log-probabilities down to -200, as a sure teacher and a sure student who disagree have them."""
    logits = torch.randn(2, N, V) * 50
    hidden, weight = logits[0].clone().requires_grad_(), torch.eye(V)
    labels = torch.zeros(N, dtype=torch.long)
    losses = distillation(hidden, Head(weight), labels, logits[1], Head(weight), loss_mix(divergence, 1, 0))
    losses.loss.backward()
    assert torch.isfinite(losses.loss) and torch.isfinite(hidden.grad).all() and losses.kd_grad_norm > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_runs_on_bfloat16_states_on_cuda(divergence):
    """By its kernel or, without one, by plain torch: near the exact loss either way."""
    hidden, weight, labels, teacher_hidden, teacher_weight = (t.detach() for t in tensors())
    mix = loss_mix(divergence)
    exact = distillation(hidden, Head(weight), labels, teacher_hidden, Head(teacher_weight), mix)
    half = [t.bfloat16().cuda() for t in (hidden, weight, teacher_hidden, teacher_weight)]
    rough = distillation(half[0], Head(half[1]), labels.cuda(), half[2], Head(half[3]), mix)
    assert rough.loss.dtype == torch.float32
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("divergence", KERNELS)
@pytest.mark.parametrize("columns", [(65536, 65536), (8192, 8256), (40000, 33000)])
def test_the_kernel_is_the_plain_path_on_float32_logits(divergence, columns):
    from tasks.engine.losses import plain_loss as plain
    from tasks.engine.losses import triton

    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (torch.randn(16, c, generator=generator, device="cuda") * 3 for c in columns)
    labels = torch.randint(0, min(columns), (16,), generator=generator, device="cuda")
    weights = torch.rand(16, generator=generator, device="cuda")
    for temperature, softcap in ((1.0, None), (2.0, None), (3.0, 4.0)):  # each is kernels of its own, seconds to make
        mix, head = loss_mix(divergence, temperature=temperature), Head(student, softcap)
        parts = mix.weights(student.device)
        exact = [t.double() for t in (student, weights, teacher)]
        want = plain.chunk_losses(exact[0], head, labels, exact[1], Head(exact[2], 5.0).capped(exact[2]), mix, parts)
        got = triton.chunk_losses(student.clone(), head, labels, weights, teacher, 5.0, mix, parts)
        for actual, expected in zip(got, want, strict=True):
            assert float((actual.double() - expected).norm() / expected.norm()) < 2e-5
        lse = Head(exact[2], 5.0).capped(exact[2]).div(temperature).logsumexp(-1).float()
        with_lse = triton.chunk_losses(student.clone(), head, labels, weights, teacher, 5.0, mix, parts, lse)
        for actual, expected in zip(with_lse, want, strict=True):
            assert float((actual.double() - expected).norm() / expected.norm()) < 2e-5
