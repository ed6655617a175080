"""Divergence, injected: the run goes back, halves its learning rate, and says what was worst."""

import json

import pytest

from tasks.core.errors import Diverged
from tasks.engine.training.history import EXPLODED, IN_A_ROW, WINDOW, History
from tasks.engine.training.train import train
from tests.engine.training.test_loop import base, rows, sigterm, training_spec, weights  # noqa: F401


def log_messages(work) -> list[str]:
    lines = map(json.loads, (work / "events.jsonl").read_text().splitlines())
    return [event["message"] for event in lines if event["event"] == "log"]


def test_a_loss_of_0_with_a_nan_gradient_is_noticed_and_its_worst_layer_named(base, rows, tmp_path):  # noqa: F811
    def broken(call, hidden, _):
        return (hidden * 0).sum().abs().sqrt() if call >= 9 else None  # value 0, gradient 0 * inf

    bad = training_spec(base, rows, tmp_path, at_hidden=broken, rollbacks=1)
    with pytest.raises(Diverged, match=r"step 5: loss is .* and the gradient's norm nan") as error:
        train(bad)
    message = str(error.value)
    assert "worst rows" in message and "largest gradients in layers." in message and "(nan)" in message
    assert "after going back 1 times. Set a lower learning_rate than 0.005" in message
    assert any(
        "back to the last good checkpoint with 0.5 of the learning rate" in text for text in log_messages(tmp_path)
    )
    assert sorted(path.name for path in bad.checkpoints.iterdir())[-1] == "checkpoint-4"


def test_the_row_that_breaks_the_step_is_named(base, rows, tmp_path):  # noqa: F811
    def broken(call, hidden, some):
        return hidden.sum() * float("inf") if 7 in some else None

    with pytest.raises(Diverged, match=r"worst rows 7 \(loss (nan|inf|-inf)\)"):
        train(training_spec(base, rows, tmp_path, at_hidden=broken, rollbacks=0))


def test_gradients_that_explode_and_stay_so_go_back_to_before_they_did():
    history, numbers = History(), {"loss": 2.0, "learning_rate": 1e-3}
    for _ in range(WINDOW):
        assert history.add({**numbers, "grad_norm": 1.0}, 1000) is None
    for _ in range(IN_A_ROW - 1):
        assert history.add({**numbers, "grad_norm": 2.0 * EXPLODED}, 1000) is None  # clipping mends a single one
    problem = history.add({**numbers, "grad_norm": 3.0 * EXPLODED}, 1000)
    assert problem and problem.steps == IN_A_ROW and "200, 200, 300 in the last steps and 1 before" in problem.text


def test_a_loss_far_above_guessing_is_noticed_at_once_and_one_above_its_start_after_a_while():
    numbers = {"grad_norm": 1.0, "learning_rate": 1e-3}
    history = History()
    assert history.add({**numbers, "loss": 6.0}, 400) is None  # guessing costs ln(400) = 5.99
    assert history.add({**numbers, "loss": 17.9}, 400) is None
    problem = history.add({**numbers, "loss": 18.1}, 400)
    assert problem and problem.steps == 1 and "cross-entropy is 18.1, guessing costs 5.99" in problem.text
    history = History()
    for _ in range(WINDOW - 1):
        assert history.add({**numbers, "loss": 7.1}, 400) is None  # its start
    assert history.add({**numbers, "loss": 7.1}, 400) is None
    for _ in range(WINDOW - 2):
        assert history.add({**numbers, "loss": 8.2}, 400) is None
    problem = history.add({**numbers, "loss": 8.2}, 400)
    assert problem and problem.steps == WINDOW and "is 8.145, it began with 7.1" in problem.text


def test_a_run_whose_gradients_explode_is_taken_back_past_its_suspect_checkpoints(base, rows, tmp_path):  # noqa: F811
    def amplified(call, hidden, _):
        first, last = 2 * (WINDOW + 4) + 1, 2 * (WINDOW + 4 + IN_A_ROW)  # two micro-batches a step
        return ((hidden - hidden.detach()) * 1e4).sum() if first <= call <= last else None  # value 0

    exploding = training_spec(
        base, rows, tmp_path, at_hidden=amplified, max_steps=32, save_every_steps=2, learning_rate=1e-4
    )
    model, history = train(exploding)
    assert f"resumes from checkpoint-{WINDOW + 4} of 32 steps" in log_messages(tmp_path)
    message = next(text for text in log_messages(tmp_path) if "back to the last good" in text)
    assert f"step {WINDOW + 4 + IN_A_ROW}: the gradient's norm was" in message
    assert len(history) == 32 and all(bool(value.isfinite().all()) for value in weights(model).values())
