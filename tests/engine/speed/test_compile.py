from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3ForCausalLM

from tasks.engine.memory.__main__ import shape
from tasks.engine.speed import offload
from tasks.engine.speed.compile import break_even_micro_batches, compiling_pays, configure_layers, seconds_saved
from tasks.engine.speed.fused_lora.fused_layers import fuse_adapters
from tests.engine.speed.test_fused_lora import adapted, outcome


@pytest.mark.parametrize("fused", [True, False])
def test_offloaded_activations_give_the_same_gradients(monkeypatch, fused):
    """Through AOTAutograd's graphs, which is where kept tensors are handed to the hooks."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    slots = []
    monkeypatch.setattr(offload.Offload, "_host_buffer", _counting(offload.Offload._host_buffer, slots))
    model = adapted("gemma3")
    if fused:
        fuse_adapters(model, save_gate_up=False)
    expected = outcome(model)
    configure_layers(
        model, recompute=True, compiled=True, offload_activations=True, backend="aot_eager", warn=pytest.fail
    )
    for _ in range(2):  # the second step uses the first one's host memory
        loss, gradients = outcome(model)
        torch.testing.assert_close(loss, expected[0], rtol=1e-9, atol=0)
        for name, value in gradients.items():
            torch.testing.assert_close(value, expected[1][name], rtol=1e-6, atol=1e-9, msg=name)
    assert {layer for layer, _ in slots} == {0}  # of two layers the last keeps its own


@pytest.mark.parametrize("fp8", [True, False])
def test_layers_that_recompute_uncompiled_have_the_same_gradients(fp8):
    model = adapted("gemma3").float()
    fuse_adapters(model, save_gate_up=False, fp8=fp8)
    expected = outcome(model)
    configure_layers(model, recompute=True, compiled=False, warn=pytest.fail)
    loss, gradients = outcome(model)
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("size", "tokens", "recompute", "milliseconds"),
    [("270M", 1024, False, 6.4), ("270M", 8192, False, 27.1), ("1B", 1024, False, 11.1), ("1B", 8192, False, 53.3),
     ("1B", 8192, True, 90.3), ("4B", 1024, True, 41.3), ("4B", 4096, True, 144.6)],
)  # fmt: skip
def test_estimated_compile_savings_are_near_measured_ones(size, tokens, recompute, milliseconds):
    """`python -m tests.benchmarks.compiling` on an H200."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(shape(size))
    assert 0.6 * milliseconds < 1e3 * seconds_saved(model, tokens, recompute) < 1.1 * milliseconds


def test_a_run_is_compiled_that_is_long_enough_to_pay_for_it():
    """The numbers of docs/training.md, and never on a CPU."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(shape("1B"))
    assert (
        round(break_even_micro_batches(model, 8192, False), -1) == 740
        and round(break_even_micro_batches(model, 8192, True), -1) == 430
    )
    model.parameters = lambda: iter([SimpleNamespace(is_cuda=True)])
    assert not compiling_pays(model, 730, 8192, False) and compiling_pays(model, 740, 8192, False)
    assert not compiling_pays(adapted("llama"), 10**9, 8192, False)


def _counting(allocate, slots):
    def host(self, slot, tensor):
        slots.append(slot)
        return allocate(self, slot, tensor)

    return host


def test_the_host_s_free_memory_is_respected():
    assert offload.fits_host_memory(1 << 20)
    assert not offload.fits_host_memory(1 << 50)


def test_layers_that_cannot_be_compiled_warn_and_run_uncompiled():
    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    model, warnings = adapted("llama"), []
    expected = outcome(model)
    configure_layers(model, recompute=True, compiled=True, backend=broken, warn=warnings.append)
    loss, gradients = outcome(model)
    torch.testing.assert_close(loss, expected[0], rtol=1e-9, atol=0)
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-6, atol=1e-9, msg=name)
    assert [text.partition(" runs")[0] for text in warnings] == ["LlamaDecoderLayer", "LlamaRMSNorm"]
    assert all("no such instruction" in text for text in warnings)
