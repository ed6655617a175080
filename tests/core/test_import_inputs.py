"""Only complete models are imported: what copies of models often lack is reported before anything runs."""

import json
from pathlib import Path

import numpy
import pytest
from prefect.logging import disable_run_logger
from safetensors.numpy import save_file

from tasks.core.errors import BadConfig
from tasks.core.import_inputs import import_model
from tasks.core.store import open_store

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files of a model, without a usable one."""
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STILLHOUSE_STORE", raising=False)
    directory = tmp_path / "model"
    directory.mkdir()
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for name in ("config.json", "training_args.bin", "README.md"):
        (directory / name).write_bytes(b"{}")
    for name in files.values():
        save_file({"weight": numpy.ones(300)}, directory / name)
    return directory


def test_weights_config_and_tokenizer_are_imported_and_no_pickle(model: Path, tmp_path: Path) -> None:
    ref = import_model.fn(str(model))
    names = [file.name for file in open_store(ref.uri).manifest(ref.digest).files]
    assert names == ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]


def test_an_incomplete_model_is_refused_with_the_remedy(model: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(BadConfig, match=r"is a file; give the directory .*a GGUF cannot be"):
        import_model.fn(str(gguf))
    weights = (model / "model-2.safetensors").read_bytes()
    for data, message in (
        (LFS, "is a pointer of git-lfs.*git lfs pull"), (weights[:-100], "is cut off"), (weights[:20], "is cut off"),
        (b"\x40" + bytes(7) + weights, "is no safetensors file: its header"),
    ):  # fmt: skip
        (model / "model-2.safetensors").write_bytes(data)
        with pytest.raises(BadConfig, match=f"model-2.safetensors {message}"):
            import_model.fn(str(model))
    (model / "model-2.safetensors").unlink()
    with pytest.raises(BadConfig, match=r"lacks model-2.safetensors \(1 of 2 files\)"):
        import_model.fn(str(model))
    (model / "config.json").write_bytes(b"{")
    with pytest.raises(BadConfig, match="config.json is not JSON"):
        import_model.fn(str(model))
    (model / "model-1.safetensors").unlink()
    with pytest.raises(BadConfig, match="pickles are refused"):
        import_model.fn(str(model))
    (model / "config.json").unlink()
    with pytest.raises(BadConfig, match="holds no config.json"):
        import_model.fn(str(model))


@pytest.mark.parametrize("source", ["no/such-model", "./no/such-model", "/no/such-model"])
def test_neither_a_directory_nor_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it would wait for the hub to answer
    with disable_run_logger(), pytest.raises(BadConfig, match=f"base model '{source}' is neither a directory here"):
        import_model.fn(source)
