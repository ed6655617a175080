"""The stage's files against those of llama.cpp's converter and quantizer: the same bytes, for every architecture.

Every file is compared whole: magic, metadata in its order, names, shapes, types, offsets, padding, values.
"""

import json
from pathlib import Path

import gguf
import pytest

from tasks.core.job import Job
from tasks.engine.runtimes.ggml_types import TYPES
from tasks.gguf.conversion_plan import make_plan
from tasks.gguf.convert import open_conversion
from tasks.gguf.kinds import KINDS
from tests.gguf.architectures import ARCHITECTURES

NAMES = [architecture.__name__ for architecture in ARCHITECTURES]


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_llama_cpps(name: str, files: Path) -> None:
    oracles = sorted((files / name).glob("*.oracle"))
    planned = json.loads((files / name / "planned.json").read_text())
    assert len(oracles) == len(planned) >= 4
    for oracle in oracles:
        assert planned[oracle.stem] == oracle.stat().st_size  # known before it was written
        assert_same(oracle.with_suffix(".stage"), oracle)


def test_a_gguf_source_converts_to_the_same_files(files: Path, tmp_path: Path) -> None:
    """Quantized from the BF16 file instead of the model."""
    directory = files / "gemma3_wide"
    with open_conversion(directory / "BF16.oracle", "pico", Job(tmp_path)) as conversion:
        for kind in ("Q8_0", "Q4_K_M"):
            conversion.write(make_plan(conversion.layout, conversion.layout.options(kind)), tmp_path / "stage.gguf")
            assert_same(tmp_path / "stage.gguf", directory / f"{kind}.oracle")


def assert_same(file: Path, oracle: Path) -> None:
    if file.read_bytes() == oracle.read_bytes():
        return
    a, b = gguf.GGUFReader(file), gguf.GGUFReader(oracle)
    assert list(a.fields) == list(b.fields), oracle
    assert {k: v.contents() for k, v in a.fields.items()} == {k: v.contents() for k, v in b.fields.items()}, oracle
    assert [(t.name, t.shape.tolist(), t.tensor_type) for t in a.tensors] == [
        (t.name, t.shape.tolist(), t.tensor_type) for t in b.tensors
    ], oracle
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert x.data.tobytes() == y.data.tobytes(), (oracle, x.name)
    raise AssertionError(f"{oracle} differs in its padding or offsets")


def test_the_tables_are_gguf_pys() -> None:
    for name, type_ in TYPES.items():
        number = gguf.GGMLQuantizationType[name]
        assert (type_.id, type_.block, type_.bytes) == (int(number), *gguf.GGML_QUANT_SIZES[number])
    for name, kind in KINDS.items():
        number = gguf.LlamaFileType[f"{'ALL' if name == 'F32' else 'MOSTLY'}_{name}"]
        assert kind.id == int(number)
