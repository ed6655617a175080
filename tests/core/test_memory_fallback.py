"""What training gives up after out-of-memory errors, level by level."""

from itertools import product

import pytest

from tasks.core.errors import BadConfig
from tasks.core.memory_fallback import config_at_level, fallback_levels, is_lossless, micro_batch
from tasks.distill import DistillConfig
from tasks.teacher import FineTuneConfig


def texts(config) -> list[str]:
    return [text for text, _ in fallback_levels(config)]


def test_the_seeds_protocol_from_the_first_level_to_the_last():
    config = FineTuneConfig(
        method="qlora", rank=64, alpha=32, use_dora=True, max_length=4096, batch_size=4, micro_batch_size=4,
        allow_quality_loss=True,
    )  # fmt: skip
    assert texts(config) == [
        "micro-batch 4 -> 2, accumulated to 4 as before",
        "micro-batch 2 -> 1, accumulated to 4 as before",
        "recompute on",
        "optimizer adamw -> paged_adamw_8bit",
        "max_length 4096 -> 2048, longer rows left out",
        "rank 64 -> 32",
        "DoRA off",
        "adapters on q_proj and v_proj only",
    ]
    last = config_at_level(config, 8)
    assert (last.micro_batch_size, last.gradient_checkpointing, last.optimizer) == (1, True, "paged_adamw_8bit")
    assert (last.max_length, last.rank, last.use_dora, last.target_modules) == (2048, 32, False, ["q_proj", "v_proj"])
    assert last.alpha / last.rank == config.alpha / config.rank
    assert [is_lossless(config, level) for level in range(9)] == [True] * 5 + [False] * 4
    with pytest.raises(
        BadConfig, match=r"last of 8 memory fallback levels \(micro-batch 4 -> 2.*smaller max_length \(now 4096\)"
    ):
        config_at_level(config, 9)


def test_every_level_of_every_config_changes_something_and_none_touches_the_rest():
    micro, recompute, optimizers = (1, 3, 8), (False, True), ("adamw", "paged_adamw_8bit")
    methods, quality, dora = ("full", "lora", "qlora"), (False, True), (False, True)
    free = {
        "micro_batch_size", "gradient_checkpointing", "optimizer", "max_length", "rank", "alpha", "use_dora",
        "target_modules",
    }  # fmt: skip
    for size, on, optimizer, method, may, use_dora in product(micro, recompute, optimizers, methods, quality, dora):
        config = FineTuneConfig(
            method=method, batch_size=24, micro_batch_size=size, gradient_checkpointing=on, optimizer=optimizer,
            allow_quality_loss=may, use_dora=use_dora,
        )  # fmt: skip
        assert config_at_level(config, 0) is config
        before = config
        for level, (_, settings) in enumerate(fallback_levels(config), start=1):
            assert settings == config_at_level(config, level) != before
            changed = {k for k, v in settings.model_dump().items() if v != before.model_dump()[k]}
            assert changed <= free and settings.batch_size == 24
            assert settings.micro_batch_size <= before.micro_batch_size
            assert may or is_lossless(config, level)
            before = settings
        with pytest.raises(BadConfig, match="out of memory on the last of"):
            config_at_level(config, len(texts(config)) + 1)


def test_without_leave_quality_is_not_touched_and_the_error_says_how_to_give_it():
    config = DistillConfig(batch_size=2, micro_batch_size=2, gradient_checkpointing=True, optimizer="paged_adamw_8bit")
    assert texts(config) == ["micro-batch 2 -> 1, accumulated to 2 as before"]
    with pytest.raises(BadConfig, match="allow_quality_loss=true"):
        config_at_level(config, 2)
    assert texts(config.model_copy(update={"allow_quality_loss": True}))[1:] == [
        "max_length 2048 -> 1024, longer rows left out"
    ]  # the student is trained whole: it has no rank


def test_micro_batches_divide_the_batch():
    assert [micro_batch(12, most) for most in (1, 5, 7, 8, 11, 12, 99)] == [1, 4, 6, 6, 6, 12, 12]
