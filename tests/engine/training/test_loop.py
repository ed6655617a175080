import os
import signal
from pathlib import Path

import pytest
import torch

from tasks.core.errors import Diverged, Preempted
from tasks.core.job import Job
from tasks.core.memory_fallback import config_at_level
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.dataset import encode_file
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training import checkpoint
from tasks.engine.training.objective import Objective, label_count
from tasks.engine.training.spec import TrainingSpec
from tasks.engine.training.train import train
from tests.engine.rows import example_dataset
from tests.pico import pico_model

SETTINGS = dict(
    rank=4, dropout=0.1, learning_rate=5e-3, batch_size=8, micro_batch_size=4, max_steps=10, save_every_steps=2
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32))


@pytest.fixture(scope="module")
def rows(base, tmp_path_factory):
    dataset = example_dataset(tmp_path_factory.mktemp("dataset"))
    return encode_file(load_tokenizer(base), dataset / "train.jsonl", 256, warn=pytest.fail)


@pytest.fixture(autouse=True)
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def training_spec(
    base,
    rows,
    work: Path,
    level: int = 0,
    method="lora",
    at_micro_batch=None,
    at_hidden=None,
    fingerprint="run",
    **settings,
) -> TrainingSpec:
    """`at_micro_batch(n)` is called before the nth loss: it may send signals, or return what to add to the loss.

    `at_hidden(n, hidden, rows)` comes after the nth forward and may return what to add, with a gradient.
    """
    calls = iter(range(1, 10_000))

    def loss_sums(model, batch):
        call = next(calls)
        extra = at_micro_batch(call) if at_micro_batch else None
        hidden = hidden_states(model, batch)
        if at_hidden:
            extra = at_hidden(call, hidden, batch["rows"])
        return LossSums(cross_entropy(hidden, head_of(model), batch["labels"]) + (0.0 if extra is None else extra))

    config = config_at_level(TrainingConfig(**(SETTINGS | settings)), level)
    job = Job(work, memory_level=level)
    job.catch_sigterm()
    objective = Objective(loss_sums)
    return TrainingSpec(
        lambda: trainable_model(config, method, base, "cpu"), rows, [], objective, config, job, fingerprint
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(actual, expected, **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], msg=name, **(tolerance or dict(rtol=1e-6, atol=1e-7)))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_sigterm_saves_a_checkpoint_and_the_same_call_goes_on_to_the_same_weights(base, rows, tmp_path, method):
    uninterrupted, history = train(training_spec(base, rows, tmp_path / "uninterrupted", method=method))
    assert history.steps["loss"][-1] < history.steps["loss"][0]

    def stop(call: int) -> None:
        if call == 9:  # the first micro-batch of step 5
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = training_spec(base, rows, tmp_path / "stopped", method=method, at_micro_batch=stop)
    with pytest.raises(Preempted, match="run the same command again"):
        train(stopped)
    assert checkpoint.newest(stopped.checkpoints, "run", pytest.fail).name == "checkpoint-5"
    resumed, resumed_history = train(training_spec(base, rows, tmp_path / "stopped", method=method))
    assert resumed_history.steps["loss"] == pytest.approx(history.steps["loss"], rel=1e-6)
    assert resumed_history.steps["learning_rate"] == history.steps["learning_rate"]
    assert_equal(weights(resumed), weights(uninterrupted))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(base, rows, tmp_path):
    uninterrupted, _ = train(training_spec(base, rows, tmp_path))
    damaged = training_spec(base, rows, tmp_path)
    file = damaged.checkpoints / "checkpoint-10" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    resumed, history = train(damaged)
    assert_equal(weights(resumed), weights(uninterrupted))
    events = (tmp_path / "events.jsonl").read_text()
    assert "checkpoint-10 is not used: optimizer.safetensors is not what was written" in events
    assert "resumes from checkpoint-8 of 10 steps" in events
    assert len(history) == 10


def test_a_finished_run_is_read_back_not_trained_again(base, rows, tmp_path):
    uninterrupted, _ = train(training_spec(base, rows, tmp_path))
    reread, _ = train(training_spec(base, rows, tmp_path, at_micro_batch=lambda call: pytest.fail("trained again")))
    assert_equal(weights(reread), weights(uninterrupted))


def test_another_run_s_checkpoints_are_not_continued(base, rows, tmp_path):
    train(training_spec(base, rows, tmp_path))
    calls: list[int] = []
    train(training_spec(base, rows, tmp_path, fingerprint="other rows", at_micro_batch=calls.append))
    assert len(calls) == 20


def test_a_smaller_micro_batch_gives_the_same_steps(base, rows, tmp_path):
    settings = dict(micro_batch_size=8, dropout=0)
    large, history = train(training_spec(base, rows, tmp_path / "large", **settings))
    small_spec = training_spec(base, rows, tmp_path / "small", level=2, **settings)
    assert small_spec.micro_batch == 2
    small, other = train(small_spec)
    assert other.steps["loss"] == pytest.approx(history.steps["loss"], rel=1e-4)
    assert other.steps["grad_norm"][0] == pytest.approx(history.steps["grad_norm"][0], rel=1e-4)


def test_the_next_memory_fallback_level_goes_on_from_the_larger_micro_batch_s_checkpoint(base, rows, tmp_path):
    settings = dict(micro_batch_size=8, dropout=0)
    _, history = train(training_spec(base, rows, tmp_path / "large", **settings))

    def run_out(call: int) -> None:
        if call == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        train(training_spec(base, rows, tmp_path / "short", at_micro_batch=run_out, **settings))
    calls: list[int] = []
    _, other = train(training_spec(base, rows, tmp_path / "short", level=1, at_micro_batch=calls.append, **settings))
    assert len(calls) == 2 * 4  # steps 7 to 10, two micro-batches each
    assert other.steps["loss"] == pytest.approx(history.steps["loss"], rel=1e-4)


def test_gradients_are_clipped_to_the_norm_asked_for(base, rows, tmp_path):
    """AdamW cannot see a gradient that is far smaller than its 1e-8, and the norm told is the one before."""
    free, history = train(training_spec(base, rows, tmp_path / "free", max_grad_norm=0, dropout=0, max_steps=4))
    clipped_model, clipped = train(
        training_spec(base, rows, tmp_path / "clipped", max_grad_norm=1e-13, dropout=0, max_steps=4)
    )
    moved = [
        max(float(w.abs().max()) for n, w in weights(model).items() if "lora_B" in n) for model in (free, clipped_model)
    ]
    assert moved[0] > 1e-3 and moved[1] < 1e-5
    assert clipped.steps["grad_norm"][0] == history.steps["grad_norm"][0] > 1e-3


def test_one_bad_step_is_rolled_back_with_half_the_learning_rate(base, rows, tmp_path):
    model, history = train(
        training_spec(
            base, rows, tmp_path, at_micro_batch=lambda call: float("nan") if call == 13 else None, scheduler="constant"
        )
    )
    assert len(history) == 10
    assert history.steps["learning_rate"][5] == pytest.approx(5e-3)
    assert history.steps["learning_rate"][6] == pytest.approx(2.5e-3)  # step 7 began from checkpoint-6
    assert all(bool(value.isfinite().all()) for value in weights(model).values())
    assert "step 7: loss is nan" in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_absurd_learning_rate_ends_as_diverged_and_names_step_rows_and_rate(base, rows, tmp_path, method):
    bad = training_spec(
        base, rows, tmp_path, method=method, learning_rate=1e6, max_steps=60, rollbacks=1, scheduler="constant"
    )
    with pytest.raises(Diverged, match=r"step \d+: .* learning rate 500000, training rows \d.*lower learning_rate"):
        train(bad)


def test_a_loss_is_divided_by_its_normalizer_over_all_micro_batches(base, rows, tmp_path):
    """A mean over pairs of rows: every micro-batch is divided by the pairs of its step."""
    token_sums, pair_sums = [], []

    def run(normalizer, sums, **settings):
        spec = training_spec(base, rows, tmp_path / f"{len(pair_sums)}{settings}", dropout=0, max_steps=1, **settings)
        loss_sums = spec.objective.loss_sums

        def recorded(model, batch):
            parts = loss_sums(model, batch)
            sums.append((float(parts.loss.detach()), len(batch["labels"])))
            return parts._replace(metrics={"rows": torch.tensor(float(len(batch["rows"])))})

        spec.objective = Objective(recorded, normalizer)
        return train(spec)[1].steps

    pairs = run(lambda batch: len(batch["rows"]) // 2, pair_sums)
    assert len(pair_sums) == 2 and pairs["rows"] == [8 / 4]
    assert pairs["loss"][0] == pytest.approx(sum(loss for loss, _ in pair_sums) / 4, rel=1e-6)
    tokens = run(label_count, token_sums, micro_batch_size=2)
    labels = sum(count for _, count in token_sums)
    assert len(token_sums) == 4 and tokens["loss"][0] == pytest.approx(pairs["loss"][0] * 4 / labels, rel=1e-5)
    assert tokens["grad_norm"][0] == pytest.approx(pairs["grad_norm"][0] * 4 / labels, rel=1e-4)
