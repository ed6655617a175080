"""Quantization-aware distillation: what is trained is what the GGUF file holds, bit for bit."""

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tasks.core.errors import BadConfig, Preempted
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.distill import DistillConfig
from tasks.distill.grid import GgufGrid, block_kinds
from tasks.distill.run import distil
from tasks.engine.models.load import load_model
from tasks.engine.runtimes.ggml_blocks import on_grid
from tasks.gguf import GgufConfig
from tasks.gguf.run import convert
from tasks.merge import MergeConfig
from tasks.merge.run import merge
from tests.engine.rows import example_dataset, example_rows
from tests.pico import pico_model
from tests.rows import write_rows

SETTINGS = dict(learning_rate=1e-3, batch_size=8, micro_batch_size=4, max_steps=6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = example_dataset(tmp_path_factory.mktemp("dataset"), train=16, validation=4)
    write_rows(directory / "test.jsonl", example_rows(4, start=30))
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("teacher"), hidden=64, seed=3))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Six layers: llama.cpp has no Gemma 3 without a global one."""
    return ModelDir(pico_model(tmp_path_factory.mktemp("student"), hidden=64, layers=6, seed=1))


def run(student, teacher, dataset, directory, job=None, **settings):
    out = directory / "out"
    out.mkdir(parents=True, exist_ok=True)
    config = DistillConfig(**(SETTINGS | settings))
    report = distil(config, student, teacher, dataset, out, job or Job(directory / "work"))
    return out, report


@pytest.mark.parametrize(("kind", "embedding"), [("Q4_0", "Q8_0"), ("Q4_0", "Q4_0")])
def test_the_file_holds_the_trained_weights_bit_for_bit(student, teacher, dataset, tmp_path, kind, embedding):
    """Distilled, merged, converted by llama.cpp, read back by gguf-py."""
    out, report = run(student, teacher, dataset, tmp_path, grid=kind, grid_embedding=embedding)
    merged, file = tmp_path / "merged", tmp_path / "gguf"
    merged.mkdir(), file.mkdir()
    merge(MergeConfig(), ModelDir(out), dataset, merged, Job(tmp_path / "merge.work"))
    config = GgufConfig(kind=kind, embedding_type=embedding, min_top1=0.3, proof_rows=4)
    proven = convert(config, ModelDir(merged), file, Job(tmp_path / "gguf.work"), dataset)
    assert proven.metrics["mean_kl"] < 1e-3  # not 0: llama.cpp rounds activations besides

    trained = load_file(merged / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 6)
    by_name = {names.get_name(name, try_suffixes=(".weight",)): name for name in trained}
    before, block_types = load_file(student.base / "model.safetensors"), set()
    for tensor in gguf.GGUFReader(file / "model.gguf").tensors:
        name = by_name.pop(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        expected = trained[name] if trained[name].dim() == 2 else 1 + trained[name]  # Gemma's norms are stored so
        assert np.array_equal(values.view(np.uint32), expected.numpy().view(np.uint32)), tensor.name
        assert not torch.equal(trained[name], before[name].float())
        if trained[name].dim() == 2:
            assert tensor.tensor_type.name == report.details["grid"][name]
            block_types.add(tensor.tensor_type.name)
    assert not by_name and block_types == {kind, embedding}


def test_the_loss_sees_the_grid_late_and_the_optimizer_never(student):
    model = load_model(student, "float32", "cpu")
    trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = DistillConfig(grid="Q4_0", grid_fraction=0.25)
    grid, kinds = GgufGrid(model, config, steps=8), block_kinds(model, "Q4_0", "Q8_0")
    with grid.swapped_in(step=5):
        assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())
    with grid.swapped_in(step=6):
        for name, parameter in model.named_parameters():
            expected = on_grid(trained[name], kinds[name]) if name in kinds else trained[name]
            assert torch.equal(parameter, expected)
            assert (name in kinds) == (not torch.equal(parameter, trained[name]))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())


def test_a_stopped_run_resumes_to_the_same_weights(teacher, dataset, tmp_path):
    """Checkpoints hold the trained weights, not the rounded ones that the loss sees."""
    student, settings = teacher, dict(grid="Q4_0", max_steps=8, save_every_steps=2)
    uninterrupted, _ = run(student, teacher, dataset, tmp_path / "uninterrupted", **settings)

    class Stopping(Job):
        def metrics(self, step, **values):
            super().metrics(step, **values)
            self.stop_requested |= step == 6 and "loss" in values

    with pytest.raises(Preempted):
        run(student, teacher, dataset, tmp_path / "stopped", Stopping(tmp_path / "stopped" / "work"), **settings)
    resumed, _ = run(student, teacher, dataset, tmp_path / "stopped", **settings)
    events = (tmp_path / "stopped" / "work" / "events.jsonl").read_text()
    assert "resumes from checkpoint-6" in events
    models = [load_file(directory / "model.safetensors") for directory in (uninterrupted, resumed)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_validation_measures_the_rounded_student(teacher, dataset, tmp_path):
    """After no step at all on the grid the report's loss is that of the saved file, not of the trained weights."""
    settings = dict(max_steps=1, learning_rate=1e-9)
    _, plain = run(teacher, teacher, dataset, tmp_path / "plain", **settings)
    _, rounded = run(teacher, teacher, dataset, tmp_path / "grid", grid="Q4_0", **settings)
    assert abs(plain.metrics["validation_loss"] - rounded.metrics["validation_loss"]) > 1e-4


@pytest.mark.parametrize("setting", [{"grid": "Q4_0"}, {"vocabulary": 1024}])
def test_adapters_are_refused(setting):
    with pytest.raises(ValidationError, match=r"needs method=full.*merging an adapter would leave the grid"):
        DistillConfig(method="lora", **setting)


def test_other_files_are_refused(tmp_path):
    untied = load_model(ModelDir(pico_model(tmp_path / "untied", tie_word_embeddings=False)), "float32", "cpu")
    with pytest.raises(BadConfig, match=r"known for .*gemma3_text with tied embeddings.*set grid=none"):
        block_kinds(untied, "Q4_0", "Q8_0")
    narrow = load_model(ModelDir(pico_model(tmp_path / "narrow", hidden=48)), "float32", "cpu")
    with pytest.raises(BadConfig, match="have 48 values, no multiple of 32"):
        block_kinds(narrow, "Q4_0", "Q8_0")
