"""ggml's blocks bit for bit: against gguf-py, and against llama.cpp's own quantizer in a file."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from tasks.core.errors import BadConfig
from tasks.engine.runtimes.ggml_blocks import dequantize, on_grid, quantize, snap_

KINDS = ["Q8_0", "Q4_0"]


def bits(values) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def edge_cases(rows: int = 400, width: int = 96) -> torch.Tensor:
    """Weights of many sizes, ties of the extreme, halves between two integers, constant and sparse blocks."""
    torch.manual_seed(0)
    values = torch.randn(rows, width) * torch.logspace(-4, 4, rows)[:, None]
    values[0::10] = values[0::10].round()
    values[1::10, ::7] = values[1::10].abs().amax(1, keepdim=True)
    values[2::10, 3::7] = -values[2::10].abs().amax(1, keepdim=True)
    values[3::10] = torch.randint(-8, 9, (rows // 10, width)) * 0.25
    values[4::10] = (torch.randint(-127, 128, (rows // 10, width)) + 0.5) / 127
    values[5::10] = values[5::10, :1]
    values[6::10, 1:] = 0
    values[7::10, 32:64] = 0
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_gguf_py(kind):
    values = edge_cases()
    scale, integers = quantize(values, kind)
    expected = gguf.dequantize(gguf.quantize(values.numpy(), Type[kind]), Type[kind])
    # gguf-py gives zeros the sign of a block's first zero, ggml does not: the next test has them bit for bit
    assert np.array_equal(bits(dequantize(scale, integers) + 0.0), bits(expected + np.float32(0)))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_that_llama_cpp_writes(kind, tmp_path, quantized):
    """The file's bytes, block for block, and its values for what is trained on the grid."""
    values = edge_cases()
    scale, integers = quantize(values, kind)
    raw = quantized(values, kind, tmp_path)
    assert np.array_equal(raw["scale"], scale.numpy().view(np.uint16).ravel())
    assert np.array_equal(raw["integers"], integers.numpy().reshape(-1, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_grid_values_come_back_from_llama_cpp_bit_for_bit(kind, tmp_path, quantized):
    values = torch.cat([edge_cases(), edge_cases() * 1e-9])  # the latter's scales are float16's smallest, or none
    trained = on_grid(values, kind)
    assert np.array_equal(bits(on_grid(trained, kind)), bits(trained))
    assert np.array_equal(bits(quantized(trained, kind, tmp_path)["values"]), bits(trained))
    assert (trained[400:] == 0).any() and (trained[400:] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_grid_values_are_no_further_than_half_a_step(kind):
    values = torch.randn(64, 64)
    step = values.unflatten(1, (-1, 32)).abs().amax(-1) / (127 if kind == "Q8_0" else 8)
    error = (on_grid(values, kind) - values).unflatten(1, (-1, 32)).abs().amax(-1)
    max_steps = 0.5 if kind == "Q8_0" else 1.0  # of the two extremes Q4_0 has only one on its grid
    assert (error <= step * (max_steps + 127 * 2**-11)).all()  # d itself is rounded to float16
    assert (error > step * 0.3).any()


def test_a_large_weight_is_rounded_without_a_copy(monkeypatch):
    monkeypatch.setattr("tasks.engine.runtimes.ggml_blocks.ROWS_BYTES", 96 * 4 * 7)
    weight = torch.nn.Parameter(edge_cases())
    expected, pointer = on_grid(weight.detach(), "Q4_0"), weight.data_ptr()
    snap_(weight, "Q4_0")
    assert torch.equal(weight, expected) and weight.data_ptr() == pointer


def test_rows_that_are_no_multiple_of_32_are_refused():
    with pytest.raises(BadConfig, match="multiple of 32; these have 80"):
        quantize(torch.zeros(2, 80), "Q4_0")


@pytest.fixture
def quantized():
    """llama.cpp's quantizer on one matrix: a file with a single tensor in, its blocks and values out."""
    from cyllama.llama import llama_cpp as llama

    def run(values: torch.Tensor, kind: str, directory) -> dict[str, np.ndarray]:
        source, target = directory / "source.gguf", directory / "target.gguf"
        writer = gguf.GGUFWriter(source, "llama")
        writer.add_block_count(1)
        writer.add_context_length(8)
        writer.add_embedding_length(values.shape[1])
        writer.add_feed_forward_length(len(values))
        writer.add_head_count(1)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tensor("blk.0.ffn_up.weight", values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        params = llama.LlamaModelQuantizeParams()
        params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        llama.model_quantize(str(source), str(target), params)
        tensor = gguf.GGUFReader(target).tensors[0]
        assert tensor.tensor_type == Type[kind]
        raw = np.array(tensor.data).reshape(-1, 34 if kind == "Q8_0" else 18)
        low, high = raw[:, 2:] & 15, raw[:, 2:] >> 4
        nibbles = np.concatenate([low, high], 1).astype(np.float32) - 8
        integers = raw[:, 2:].view(np.int8).astype(np.float32) if kind == "Q8_0" else nibbles
        scale = raw[:, :2].copy().view(np.uint16).ravel()
        return {
            "scale": scale,
            "integers": integers,
            "values": (integers * scale.view(np.float16).astype(np.float32)[:, None]).reshape(values.shape),
        }

    return run
