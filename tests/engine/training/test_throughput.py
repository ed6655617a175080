"""Operations of a step, counted by hand for a pico model."""

import pytest

from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.models.trainable import trainable_model
from tasks.engine.training import throughput
from tasks.engine.training.callbacks import clock
from tasks.engine.training.throughput import ThroughputMeter, attention_pairs, peak_flops, token_cost
from tests.pico import pico_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32))


def test_a_frozen_weight_costs_four_operations_a_token_and_a_trained_one_six(base):
    hidden, query, key, ffn, vocabulary, layers, rank = 32, 64, 32, 64, 401, 2, 4
    weights = layers * (hidden * (2 * query + 2 * key) + 3 * hidden * ffn)
    low_rank = layers * rank * (hidden + query + hidden + key + hidden + key + query + hidden + 3 * (hidden + ffn))
    full = token_cost(trainable_model(TrainingConfig(), "full", base, "cpu"))
    lora = token_cost(trainable_model(TrainingConfig(rank=rank), "lora", base, "cpu"))
    qlora = token_cost(trainable_model(TrainingConfig(rank=rank), "qlora", base, "cpu"))
    assert full.layers == 6 * weights and full.head == 6 * hidden * vocabulary
    assert lora.layers == 4 * weights + 6 * low_rank and lora.head == 4 * hidden * vocabulary
    assert qlora == lora, "a 4-bit weight counts by its elements"
    assert full.pair == 12 * query * layers
    assert full.step(10, 5, 100) == 10 * full.layers + 5 * full.head + 100 * full.pair


def test_a_window_bounds_the_keys_that_a_query_meets(base):
    model = trainable_model(TrainingConfig(), "full", base, "cpu")
    model.config.sliding_window, model.config.layer_types = 4, ["sliding_attention", "full_attention"]
    assert attention_pairs([10], model) == (4 * 4 / 2 + 6 * 4) / 2 + (10 * 10 / 2) / 2


def test_a_run_s_speed_is_its_median_step_s_without_the_first(base):
    meter = ThroughputMeter(trainable_model(TrainingConfig(rank=2), "lora", base, "cpu"))
    for seconds in [9.0] * 5 + [0.5] * 8:
        speed = meter.step(seconds, 100, 50, [50, 50], processes=2)
    assert speed.pop("peak_gib") > 0.1, "a process that has imported torch"
    assert speed == {"tokens_per_second": 200.0} and peak_flops("cpu") is None
    summary = meter.summary()
    assert summary.pop("peak_gib") > 0.1
    assert summary == {"seconds_per_step": 0.5, "tokens_per_second": 200.0, "rows_per_second": 8.0}


def test_the_share_of_what_the_card_could_do_is_told_where_that_is_known(base, monkeypatch):
    model = trainable_model(TrainingConfig(rank=2), "lora", base, "cpu")
    monkeypatch.setattr(throughput, "peak_flops", lambda device: 1e9)
    speed = ThroughputMeter(model).step(0.5, 100, 50, [50, 50], processes=1)
    cost = token_cost(model)
    assert speed["mfu"] == pytest.approx(cost.step(100, 50, attention_pairs([50, 50], model)) / 0.5 / 1e9)


def test_time_left_is_read_as_a_clock():
    assert [clock(s) for s in (0, 59.6, 119.7, 187, 7387)] == ["0:00", "1:00", "2:00", "3:07", "2:03:07"]
