"""Importance matrices: kinds that need one, what it changes, and files that do not fit the model."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from tasks.core.errors import BadConfig
from tasks.core.job import Job
from tasks.engine.runtimes.ggml import to_type
from tasks.engine.runtimes.ggml_types import TYPES
from tasks.engine.runtimes.llama_logits import LlamaInput, llama_logits
from tasks.gguf import GgufConfig
from tasks.gguf.audit_verdict import verdict_warnings
from tasks.gguf.conversion_plan import make_plan
from tasks.gguf.convert import Conversion, open_conversion
from tasks.gguf.header import read_header
from tasks.gguf.imatrix import read_imatrix
from tasks.gguf.kind_choice import candidate_plans
from tests.gguf.architectures import gemma3_wide

HEAVY = 8
"""The first columns of every matrix, to which the test's importance matrix gives nearly all of the weight."""


class _Writer(gguf.GGUFWriter):
    def add_architecture(self) -> None:
        pass  # an importance matrix has none


def write_imatrix(path: Path, widths: dict[str, int], infinite: bool = False) -> Path:
    """As llama-imatrix writes it: sums of squares and counts; the first columns count 10 000 times the others."""
    writer = _Writer(path, arch="")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration.jsonl"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, width in widths.items():
        sums = np.full((1, width), 5.0, np.float32)
        sums[0, :HEAVY] = np.inf if infinite else 50_000
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.array([[5.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256: K- and IQ-types fit."""
    directory = tmp_path_factory.mktemp("wide")
    model = gemma3_wide(directory / "model", layers=6)
    with open_conversion(model, "pico", Job(directory / "work")) as conversion:
        conversion.write(make_plan(conversion.layout, conversion.layout.options("BF16")), directory / "BF16.gguf")
    return directory / "BF16.gguf"


def matrices(conversion: Conversion) -> dict[str, int]:
    shapes = conversion.layout.shapes
    return {name: shape[0] for name, shape in shapes.items() if name.startswith("blk.") and len(shape) == 2}


def values(file: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == name)
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def test_important_columns_have_smaller_errors(bf16: Path, tmp_path: Path) -> None:
    """With the matrix the heavy columns' errors shrink; the file says that it was used, and is as long as planned."""
    with open_conversion(bf16, "pico", Job(tmp_path)) as conversion:
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", matrices(conversion))
        assert read_imatrix(imatrix).weights["blk.0.attn_q.weight"][[0, HEAVY]].tolist() == [10_000, 1]
        errors = {}
        for used in (None, imatrix):
            options = conversion.layout.options("Q4_K_M", imatrix=used is not None)
            plan = make_plan(conversion.layout, options, imatrix=used)
            target = tmp_path / f"{bool(used)}.gguf"
            conversion.write(plan, target)
            assert plan.bytes == target.stat().st_size and len(plan.weighed) == (6 * 7 if used else 0)
            exact = values(bf16, "blk.3.ffn_up.weight")
            errors[used] = ((values(target, "blk.3.ffn_up.weight") - exact)[:, :HEAVY] ** 2).mean()
    assert errors[imatrix] < 0.7 * errors[None]
    header = read_header(tmp_path / "True.gguf")
    assert header.get("quantize.imatrix.entries_count") == 6 * 7
    assert header.get("quantize.imatrix.dataset") == "calibration.jsonl"
    assert header.get("quantize.imatrix.chunks_count") == 3
    np.testing.assert_array_equal(  # no importance for the embedding: as without
        values(tmp_path / "True.gguf", "token_embd.weight"), values(tmp_path / "False.gguf", "token_embd.weight")
    )


def test_types_that_ggml_does_not_weigh_are_not_counted_as_weighed(bf16: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows, weights = random.normal(size=(4, 256)).astype(np.float32), random.uniform(size=256).astype(np.float32) ** 4
    for type_ in [name for name, type_ in TYPES.items() if not type_.needs_imatrix]:
        same = np.array_equal(to_type(rows, type_), to_type(rows, type_, weights))
        assert same == (not TYPES[type_].weighs), type_
    with open_conversion(bf16, "pico", Job(tmp_path)) as conversion:
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", matrices(conversion))
        assert not make_plan(
            conversion.layout, conversion.layout.options("Q8_0", imatrix=True), imatrix=imatrix
        ).weighed


@pytest.mark.parametrize("kind", ["IQ2_XXS", "Q2_K_S"])
def test_low_kinds_need_an_imatrix_and_run_in_llama_cpp(kind: str, bf16: Path, tmp_path: Path) -> None:
    overrides = {"ffn|attn_q|attn_output": "Q4_0"}  # the low types are slow to make
    config = GgufConfig(kind=kind, overrides=overrides)
    with open_conversion(bf16, "pico", Job(tmp_path)) as conversion:
        with pytest.raises(ValueError, match=f"{kind} needs an importance matrix.*--outliers DIR"):
            candidate_plans(config, conversion.layout, {}, None)
        imatrix = write_imatrix(tmp_path / "imatrix.gguf", matrices(conversion))
        (plan,) = candidate_plans(config, conversion.layout, {}, imatrix)
        conversion.write(plan, tmp_path / "low.gguf")
    assert plan.bytes == (tmp_path / "low.gguf").stat().st_size
    (output,) = llama_logits(tmp_path / "low.gguf", [LlamaInput("Close", [2, 9, 30], 1)], tmp_path / "log")
    assert np.isfinite(output.logits).all()


def test_an_imatrix_of_another_model_is_refused(bf16: Path, tmp_path: Path) -> None:
    with open_conversion(bf16, "pico", Job(tmp_path)) as conversion:
        other = write_imatrix(tmp_path / "imatrix.gguf", dict.fromkeys(matrices(conversion), 64))
        plan = make_plan(conversion.layout, conversion.layout.options("Q4_0", imatrix=True), imatrix=other)
        with pytest.raises(BadConfig, match=r"has 64 values for blk.*another model"):
            conversion.write(plan, tmp_path / "x.gguf")
    with pytest.raises(BadConfig, match="is no importance matrix"):
        read_imatrix(bf16)
    with pytest.raises(BadConfig, match="not finite"):
        read_imatrix(write_imatrix(tmp_path / "infinite.gguf", {"blk.0.attn_q.weight": 64}, infinite=True))


def test_an_override_can_need_an_imatrix(bf16: Path, tmp_path: Path) -> None:
    config = GgufConfig(kind="Q4_K_M", overrides={"ffn_up": "IQ2_XS"})
    with (
        open_conversion(bf16, "pico", Job(tmp_path)) as conversion,
        pytest.raises(ValueError, match=r"IQ2_XS for blk\.0\.ffn_up.weight needs an importance matrix"),
    ):
        candidate_plans(config, conversion.layout, {}, None)


def test_the_verdict_warns(tmp_path: Path) -> None:
    assert "65504" in verdict_warnings("F16", None)[0]
    assert not verdict_warnings("Q8_0", None)
    safe, unsafe = ({"verdict": word, "because": ["peak 1e5"], "do": ["use BF16"]} for word in ("safe", "unsafe"))
    targets = {"gguf_cpu": safe, "gguf_fp16": unsafe, "fp16": unsafe}
    verdict = {"focus": "student", "models": {"student": {"targets": targets}}}
    (tmp_path / "verdict.json").write_text(json.dumps(verdict))
    assert verdict_warnings("Q8_0", tmp_path) == [
        "student is unsafe on a backend that multiplies in float16: peak 1e5. use BF16"
    ]
    assert len(verdict_warnings("F16", tmp_path)) == 2
