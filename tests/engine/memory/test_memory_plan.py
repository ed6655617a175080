"""The memory plan: sizes counted before loading, what is chosen for a card, and the refusal with the numbers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.memory.__main__ import ALL, REPORTED, published, shape, table
from tasks.engine.memory.fit import fit_settings, largest_micro_batch
from tasks.engine.memory.model_sizes import count_sizes, sizes_of
from tasks.engine.memory.predict import GIB, NF4, predict
from tasks.engine.memory.teacher_memory import cached_teacher, live_teacher
from tasks.engine.memory.workload import workload_of
from tasks.engine.models.model_config import read_config
from tasks.engine.models.trainable import count_parameters, trainable_model
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
from tests.engine.rows import example_dataset
from tests.pico import pico_model

# Measured on one H200 (torch 2.11, transformers 5.17): python -m tests.benchmarks.memory, half of the tokens labelled.
RECOMPUTE = {"gradient_checkpointing": True}
MEASURED = [
    ("270M", "lora", 16, 512, {}, 5.41),
    ("270M", "qlora", 4, 2048, {}, 5.26),
    ("270M", "full", 8, 1024, {}, 7.54),
    ("270M", "full", 1, 8192, RECOMPUTE, 5.15),
    ("270M", "full", 4, 4096, {"optimizer": "paged_adamw_8bit"}, 18.81),
    ("1B", "lora", 8, 1024, RECOMPUTE, 3.58),
    ("1B", "lora", 8, 1024, {}, 15.03),
    ("1B", "lora", 1, 8192, {**RECOMPUTE, "rank": 64}, 4.10),
    ("1B", "lora", 8, 1024, {**RECOMPUTE, "compile": "on"}, 3.49),
    ("1B", "lora", 2, 2048, {"use_dora": True, "rank": 16}, 19.46),
    ("1B", "lora", 4, 1024, {"dropout": 0.05}, 13.73),
    ("1B", "lora", 2, 4096, {"target_modules": ["q_proj", "v_proj"]}, 16.73),
    ("1B", "qlora", 8, 1024, RECOMPUTE, 2.60),
    ("1B", "qlora", 4, 512, {}, 4.79),
    ("1B", "qlora", 2, 2048, {"use_dora": True}, 25.77),
    ("1B", "full", 4, 1024, {}, 21.76),
    ("1B", "full", 4, 1024, RECOMPUTE, 17.48),
    ("1B", "full", 4, 1024, {"optimizer": "adamw_8bit"}, 22.69),
    ("4B", "lora", 4, 1024, RECOMPUTE, 9.75),
    ("4B", "lora", 8, 1024, {}, 39.41),
    ("4B", "qlora", 8, 512, {}, 19.53),
    ("4B", "qlora", 4, 512, {**RECOMPUTE, "use_dora": True}, 5.93),
    ("4B", "qlora", 1, 4096, {**RECOMPUTE, "rank": 64}, 6.33),
    ("4B", "full", 1, 512, {**RECOMPUTE, "optimizer": "paged_adamw_8bit"}, 31.64),
]
# python -m tests.benchmarks.sft, 8 x 1024 tokens, all labelled, compiled.
COMPILED = [
    ("1B", "lora", 8, 1024, RECOMPUTE, 3.35),
    ("1B", "lora", 8, 1024, {}, 12.29),
    ("1B", "qlora", 8, 1024, RECOMPUTE, 2.35),
    ("4B", "lora", 8, 1024, {}, 32.2),
    ("4B", "lora", 8, 1024, RECOMPUTE, 10.37),
    ("4B", "qlora", 8, 1024, RECOMPUTE, 5.92),
]
# python -m tests.benchmarks.architectures, Gemma 3n's text model, 4 x 1024 tokens, half labelled.
GEMMA_3N_E2B = [("lora", 14.42), ("qlora", 11.74)]
# python -m tests.benchmarks.distill peers, 1B to 270M with the teacher's states: rows at once, their tokens and labels,
# MiB of logits.
DISTILLED = [
    (32, 4455, 1528, 512, 7.0),
    (64, 8769, 2880, 1024, 8.7),
    (128, 17263, 5762, 1280, 11.3),
    (128, 17263, 5762, 1792, 11.8),
    (2, 4096, 1513, 512, 6.8),
    (8, 16384, 5200, 1280, 11.0),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32))


@pytest.mark.parametrize("size, method, rows, length, settings, gib", [*MEASURED, *COMPILED])
def test_predictions_are_within_a_tenth_of_measured_peaks(size, method, rows, length, settings, gib):
    compiled = (size, method, rows, length, settings, gib) in COMPILED
    compile = "on" if compiled else "off"
    defaults = {"rank": 32, "precision": "bfloat16", "compile": compile, "target_modules": ALL}
    config = TrainingConfig(**(defaults | settings))
    tokens = rows * length
    work = workload_of(config, method, tokens, tokens if compiled else tokens // 2)
    assert predict(count_sizes(shape(size), config, method), work).peak == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize("method, gib", GEMMA_3N_E2B)
def test_four_streams_in_float32_are_counted(method, gib):
    config = TrainingConfig(rank=32, precision="bfloat16", compile="off", gradient_checkpointing=True)
    sizes = count_sizes(shape("E2B").get_text_config(), config, method)
    assert predict(sizes, workload_of(config, method, 4096, 2048)).peak == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("rows, tokens, labels, mib, gib", DISTILLED)
def test_a_distillation_s_prediction_counts_the_teacher_s_head_and_states(rows, tokens, labels, mib, gib):
    config = TrainingConfig(precision="bfloat16", loss_chunk_mib=mib)
    extra = cached_teacher(torch.empty((262144, 1152), device="meta"), 1152)
    work = workload_of(config, "full", tokens, labels)._replace(extra=extra.fixed, per_label=extra.per_label)
    assert predict(count_sizes(shape("270M"), config, "full"), work).peak == pytest.approx(gib, rel=0.03)


def test_a_live_teacher_needs_its_weights_and_memory_for_each_token(gemma_1b):
    half, four_bit = live_teacher(gemma_1b, "auto"), live_teacher(gemma_1b, "4bit")
    assert half.fixed / GIB == pytest.approx(1.86, rel=0.01) and four_bit.fixed < 0.5 * half.fixed
    config = TrainingConfig(precision="bfloat16", batch_size=32, micro_batch_size=8)
    _, plan = fit_settings(config, "full", gemma_1b, [1024] * 64, 0.5, 80.0, extra=half)
    _, without_teacher = fit_settings(config, "full", gemma_1b, [1024] * 64, 0.5, 80.0)
    difference = plan.candidates[0].parts.peak - without_teacher.candidates[0].parts.peak
    assert difference * GIB > half.fixed + 8 * 1024 * half.per_token
    assert plan.chosen.parts.table()["extra"] > 0 and "extra" not in without_teacher.chosen.parts.table()


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_sizes_counted_without_weights_are_those_of_the_loaded_model(base, method):
    config = TrainingConfig(rank=4, use_dora=method == "lora", target_modules=r".*\.(q_proj|up_proj)")
    sizes = sizes_of(base, config, method)
    model = trainable_model(config, method, base, "cpu")
    counted = count_parameters(model)
    assert sizes.trainable == counted["trainable_parameters"]
    adapters = sizes.trainable if method != "full" else 0
    assert sizes.quantizable + sizes.unquantizable == counted["parameters"] - adapters
    four_bit = sum(p.numel() * 2 for p in model.parameters() if type(p).__name__ == "Params4bit")
    assert four_bit == (sizes.quantizable if method == "qlora" else 0)


def test_an_earlier_adapter_is_counted_with_its_rank_and_modules(base, tmp_path):
    from tasks.engine.models.save_trained import save_trained

    earlier = TrainingConfig(rank=2, target_modules=["q_proj"])
    save_trained(trainable_model(earlier, "lora", base, "cpu"), "lora", base, "model", tmp_path)
    config = TrainingConfig(rank=64)
    adapted = ModelDir(base.base, tmp_path)
    assert sizes_of(adapted, config, "lora").trainable == count_sizes(read_config(base.base), earlier, "lora").trainable


def test_an_nf4_element_is_half_a_byte_and_its_scales():
    config = TrainingConfig(precision="bfloat16")
    sizes = count_sizes(shape("1B"), config, "qlora")
    parts = predict(sizes, workload_of(config, "qlora", 1))
    assert parts.weights * GIB == pytest.approx(sizes.quantizable * 0.5159 + sizes.unquantizable * 2, rel=1e-3)
    assert pytest.approx(0.5159, rel=1e-3) == NF4


def test_the_largest_micro_batch_is_that_of_the_run_s_row_order():
    lengths = [10] * 30 + [100, 100]
    assert largest_micro_batch(lengths, 8, 8, 0) >= 100 and largest_micro_batch(lengths, 32, 32, 0) == sum(lengths)
    assert largest_micro_batch(lengths, 8, 1, 0) == 100


def choose(base, gib, **settings):
    config = FineTuneConfig(**{"batch_size": 32, "micro_batch_size": 32, "precision": "bfloat16", **settings})
    return fit_settings(config, config.method, base, [1024] * 64, 0.5, gib)


@pytest.fixture(scope="module")
def gemma_1b(tmp_path_factory):
    """The 1B's config without weights: the plan needs no more."""
    directory = tmp_path_factory.mktemp("1b")
    shape("1B").save_pretrained(directory)
    assert AutoConfig.from_pretrained(directory).hidden_size == 1152
    return ModelDir(directory)


def test_a_large_card_changes_no_setting_and_smaller_ones_trade_speed_first(gemma_1b):
    large, _ = choose(gemma_1b, 139.0)
    assert (large.micro_batch_size, large.gradient_checkpointing, large.optimizer) == (32, False, "adamw")
    small, plan = choose(gemma_1b, 24.0)
    assert small.batch_size == 32 and small.rank == large.rank and plan.chosen.parts.card <= 24
    assert small.micro_batch_size < 32 or small.gradient_checkpointing
    tiny, _ = choose(gemma_1b, 5.0)
    assert tiny.gradient_checkpointing and tiny.max_length == large.max_length
    page = plan.markdown()
    assert "| **chosen** |" in page and "| no |" in page and page.count("\n") > len(plan.candidates)


def test_a_run_that_fits_no_candidate_is_refused_with_the_numbers(gemma_1b):
    with pytest.raises(BadConfig, match=r"2.0 GiB .*micro-batch 1 \(1024 tokens\).*weights 1.9.*method=qlora"):
        choose(gemma_1b, 2.0, method="lora")


def test_the_command_refuses_before_it_loads_and_writes_the_plan_where_it_fits(base, tmp_path):
    dataset = example_dataset(tmp_path / "dataset")
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    config = FineTuneConfig(rank=2, max_steps=1, batch_size=4, micro_batch_size=4, memory_gib=0.5)
    with pytest.raises(BadConfig, match=r"0.5 GiB of device memory are not enough"):
        fine_tune(config, base, dataset, tmp_path / "small", Job(tmp_path / "work"))
    roomy = config.model_copy(update={"memory_gib": 4.0})
    report = fine_tune(roomy, base, dataset, tmp_path / "large", Job(tmp_path / "work"))
    document = json.loads((tmp_path / "large" / "report" / "memory_plan.json").read_text())
    assert document["candidates"][document["chosen"]]["micro_batch"] == 4
    assert (tmp_path / "large" / "report" / "memory_plan.md").read_text().startswith("# Memory plan for 4.0 GiB")
    assert report.details["memory_plan"]["predicted_gib"] >= 0
    assert "memory plan: micro-batch 4" in (tmp_path / "work" / "events.jsonl").read_text()


def test_reported_setups_are_printed_with_predictions():
    rows = published()
    page = Path(__file__).parents[3] / "docs" / "training.md"
    assert table(rows) in page.read_text(), "python -m tasks.engine.memory prints the table of docs/training.md"
    assert [row["setup"] for row in rows] == [setup.title for setup in REPORTED]
    cards = {row["setup"]: float(row["card"]) for row in rows}
    trinity = [float(row["card"]) for row in rows[:5]]
    assert trinity == sorted(trinity, reverse=True), "each of the reported changes frees memory"
    assert float(rows[0]["peak"]) * 1.0737 == pytest.approx(15.6, rel=0.1), "the one figure to the digit, in GB"
    assert max(cards.values()) < 24, "the others ran on their cards"
    assert torch.get_default_device() == torch.device("cpu")
