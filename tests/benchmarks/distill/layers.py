"""The written-out layers' gradients against transformers' layers under autograd, on a GPU."""

import contextlib
import copy

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tasks.engine.data.chat_template import Example
from tasks.engine.data.collator import Batch, to_device
from tasks.engine.data.micro_batches import MicroBatchDataset
from tasks.engine.losses.chunked import cross_entropy
from tasks.engine.losses.loss_sums import LossSums
from tasks.engine.models.lm_head import head_of, hidden_states
from tasks.engine.speed.cuda_graphs import CudaGraphs, padded_label_counts
from tasks.engine.speed.packing_support import enable_packing
from tests.benchmarks.distill.shapes import DEVICE

CASES = {  # hidden, ffn, layers, heads, of keys and values, head dimension, window, rows' tokens
    "270M, short rows": (640, 2048, 18, 4, 1, 256, 512, range(90, 180, 4)),
    "270M, 6 layers, rows beyond the window": (640, 2048, 6, 4, 1, 256, 512, (600, 900, 700)),
    "two heads of keys, window 64": (320, 1000, 6, 4, 2, 64, 64, (5, 130, 77, 300, 33, 2)),
}


def objective(model: Gemma3ForCausalLM, batch: Batch, half: bool = DEVICE == "cuda") -> LossSums:
    """Cross-entropy, in bfloat16 where there is a GPU."""
    head = head_of(model)
    head = head._replace(weight=batch.get("head_weight", head.weight))
    with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
        return LossSums(
            cross_entropy(hidden_states(model, batch), head, batch["labels"], head_grad=batch.get("head_grad"))
        )


def layers() -> None:
    """A line for each kind of weight: its gradient's largest error over the layers, ours and autograd's in bfloat16."""
    for name, (hidden, ffn, count, heads, kv_heads, width, window, lengths) in CASES.items():
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=8192, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=count, sliding_window=window,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, query_pre_attn_scalar=width,
            max_position_embeddings=4096,
            layer_types=[("sliding_attention", "full_attention")[i % 3 == 2] for i in range(count)],
        )  # fmt: skip
        with torch.device(DEVICE):
            model = Gemma3ForCausalLM(config).float().train()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.normal_(0, 0.2)
        enable_packing(model, torch.bfloat16 if DEVICE == "cuda" else torch.float32)
        rows = []
        for n in lengths:
            ids = torch.randint(4, 8192, (n,)).tolist()
            rows.append(Example(ids, [-100] * (n // 2) + ids[n // 2 :]))
        feed = MicroBatchDataset(
            rows, list(range(len(rows))), len(rows), len(rows), packed=True, shapes=1, multiple=128
        )
        batch = to_device(feed[0], model.device)
        exact, rough = copy.deepcopy(model), copy.deepcopy(model)
        if DEVICE == "cuda":
            exact.set_attn_implementation("packed_padded")
        objective(exact, batch, half=False).loss.backward()
        objective(rough, batch).loss.backward()
        graphs = CudaGraphs(model, objective, padded_label_counts(feed))
        assert graphs.decoder is not None
        for _ in range(3 if DEVICE == "cuda" else 1):  # the first runs, the second captures, the third replays
            graphs.begin_step()
            graphs.run(batch) if DEVICE == "cuda" else graphs._forward_backward(batch)
        worst: dict[str, tuple[float, float]] = {}
        both = zip(exact.named_parameters(), graphs.grads, rough.parameters(), strict=True)
        for (key, want), ours, autograds in both:
            errors = [float((got - want.grad).norm() / want.grad.norm()) for got in (ours, autograds.grad)]
            kind = key.split(".")[-2]
            worst[kind] = max(worst.get(kind, (0.0, 0.0)), (errors[0], errors[1]))
        for kind, (ours, autograds) in worst.items():
            print(f"| {name} | {kind} | {ours:.2e} | {autograds:.2e}", flush=True)
