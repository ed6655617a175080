"""An earlier adapter: trained on as it is, by every method and on a base in 4 bits, or refused with the reason."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.core.refs import ModelDir
from tasks.core.training_config import TrainingConfig
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.models.load import load_model
from tasks.engine.models.load_adapter import ignored_settings
from tasks.engine.models.save_trained import save_trained
from tasks.engine.models.trainable import trainable_model
from tasks.merge import MergeConfig
from tasks.merge.run import merge
from tasks.teacher import FineTuneConfig
from tasks.teacher.run import fine_tune
from tests.engine.rows import example_dataset
from tests.pico import pico_model

SETTINGS = dict(rank=4, learning_rate=1e-2, batch_size=8, micro_batch_size=8, max_steps=10)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ModelDir(pico_model(tmp_path_factory.mktemp("base"), hidden=32))


@pytest.fixture(scope="module")
def in_four_bits(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("four") / "base"
    shutil.copytree(base.base, directory)
    (directory / "model.safetensors").unlink()
    load_model(base, "float32", "cpu", four_bit=True).save_pretrained(directory)
    return ModelDir(directory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = example_dataset(tmp_path_factory.mktemp("dataset"))
    shutil.copy(directory / "validation.jsonl", directory / "test.jsonl")
    return directory


def run(model, dataset, directory, **settings):
    """The report and the first step's loss."""
    out, job = directory / "out", Job(directory / "work")
    out.mkdir(parents=True)
    report = fine_tune(FineTuneConfig(**(SETTINGS | settings)), model, dataset, out, job)
    events = map(json.loads, (directory / "work" / "events.jsonl").read_text().splitlines())
    return report, next(event["values"]["loss"] for event in events if "grad_norm" in event.get("values", {}))


def adapter(base, directory, **settings):
    model = trainable_model(TrainingConfig(**({"rank": 2} | settings)), "lora", base, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    save_trained(model, "lora", base, "model", directory)
    return ModelDir(base.base, directory)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora and rslora"])
@pytest.mark.parametrize("bits", ["16 bits", "4 bits"])
def test_training_continues_from_an_earlier_adapter_and_the_result_can_be_merged(
    base, in_four_bits, dataset, tmp_path, bits, kind
):
    on = in_four_bits if bits == "4 bits" else base
    first, before = run(on, dataset, tmp_path / "first", method="lora", **kind)
    earlier = ModelDir(on.base, tmp_path / "first" / "out")
    for method in ("qlora",) if on is in_four_bits else ("lora", "qlora", "full"):
        second, after = run(earlier, dataset, tmp_path / method, method=method, seed=1)
        assert after < before - 0.5 * (before - first.metrics["validation_loss"])
        assert second.metrics["validation_loss"] < 1.01 * first.metrics["validation_loss"]  # few steps on few rows
        warning = "use_dora=False is not used: the earlier adapter has use_dora=True"
        assert (warning in second.warnings) == (bool(kind) and method != "full")
    merged, loose = tmp_path / "merged", MergeConfig(max_mean_kl=0.01, min_top1=0.9)
    merged.mkdir()
    merge(loose, ModelDir(on.base, tmp_path / "qlora" / "out"), dataset, merged, Job(tmp_path / "work"))
    assert load_file(merged / "model.safetensors").keys() == load_file(base.base / "model.safetensors").keys()
    if on is base:
        assert type(load_model(ModelDir(tmp_path / "full" / "out"), "float32", "cpu")).__name__ == "Gemma3ForCausalLM"


def test_an_adapter_brings_its_chat_template(base, dataset, tmp_path):
    run(base, dataset, tmp_path / "first", max_steps=1, chat_template="gemma")
    earlier = ModelDir(base.base, tmp_path / "first" / "out")
    run(earlier, dataset, tmp_path / "second", max_steps=1)
    second = ModelDir(base.base, tmp_path / "second" / "out")
    templates = [load_tokenizer(model).chat_template for model in (base, earlier, second)]
    assert templates[1] == templates[2] != templates[0]
    assert (second.adapter / "tokenizer.model").is_file()


def test_another_model_s_adapter_is_refused(base, tmp_path):
    earlier = adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for sizes, trains, loads in [
        (dict(hidden=64), r"is \[64, 64\] in the base and \[64, 32\]", "is no adapter of .*q_proj.*shape"),
        (dict(hidden=32, layers=1), "matches no tensor of the base", "2 of its 4 tensors have no place there"),
        (dict(hidden=32, layers=3), *["it has nothing for layers.2.self_attn.q_proj.lora_A"] * 2),
    ]:
        other = ModelDir(pico_model(tmp_path / "other", **sizes), earlier.adapter)
        with pytest.raises(BadConfig, match=trains):
            trainable_model(TrainingConfig(), "lora", other, "cpu")
        with pytest.raises(BadConfig, match=f"{loads}.*Take the base"):
            load_model(other, "float32", "cpu")


def test_an_adapter_whose_tensors_are_not_loaded_is_refused(base, tmp_path):
    earlier = adapter(base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {k.replace(".model.model.", ".model.model.language_model."): v for k, v in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadConfig, match="28 of its 28 tensors have no place there"):
        load_model(earlier, "float32", "cpu")


def test_other_kinds_of_adapters_are_refused_before_training(base, dataset, tmp_path):
    earlier = adapter(base, tmp_path / "adapter")
    file = earlier.adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    for change, message in [({"peft_type": "IA3"}, "is a IA3 adapter"), ({"lora_bias": True}, "lora_bias=True cannot")]:
        file.write_text(json.dumps(settings | change))
        with pytest.raises(BadConfig, match=message):
            run(earlier, dataset, tmp_path / message)
    with pytest.raises(BadConfig, match="adapter_config.json is missing"):
        run(ModelDir(base.base, tmp_path / "nowhere"), dataset, tmp_path / "missing")


def test_dropout_is_the_config_s_and_not_the_adapter_s(base, tmp_path):
    earlier = adapter(base, tmp_path, dropout=0.5)
    for dropout in (0.0, 0.25):
        model = trainable_model(TrainingConfig(dropout=dropout), "lora", earlier, "cpu")
        drops = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
        assert len(drops) == 14 and {getattr(drop, "p", 0.0) for drop in drops} == {dropout}


def test_ignored_settings_are_listed(base, tmp_path):
    earlier = adapter(base, tmp_path, target_modules=["q_proj", "v_proj"])
    assert ignored_settings(TrainingConfig(rank=2), earlier) == []
    assert ignored_settings(TrainingConfig(rank=2, target_modules=["v_proj", "q_proj"]), earlier) == []
    assert ignored_settings(TrainingConfig(rank=3, target_modules="up_proj"), earlier) == [
        "rank=3 is not used: the earlier adapter has rank=2",
        "target_modules=up_proj is not used: the earlier adapter has target_modules=['q_proj', 'v_proj']",
    ]


def test_an_adapter_s_files_are_the_same_from_every_process(base, tmp_path):
    """peft writes its sets as Python's hashes have them, which are others in each."""
    for target_modules in ("all-linear", ["v_proj", "k_proj", "q_proj", "o_proj", "up_proj"]):
        earlier = adapter(base, tmp_path, target_modules=target_modules)
        names = json.loads((earlier.adapter / "adapter_config.json").read_text())["target_modules"]
        assert len(names) >= 5 and names == sorted(names)
