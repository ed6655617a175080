"""What the tests of several processes run in each of them: this process forks the two, and dies as they do.

python -m tests.engine.distributed.two_processes BASE DATASET WORK
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tasks.core.errors import Preempted
from tasks.core.refs import ModelDir
from tasks.engine.data.dataset import encode_file
from tasks.engine.data.tokenizers import load_tokenizer
from tasks.engine.distributed import fsdp, ranks
from tasks.engine.speed.cuda_graphs import CudaGraphs
from tasks.engine.training.acceleration import accelerate_layers, training_batches
from tasks.engine.training.train import train
from tests.engine.training.test_loop import training_spec, weights

# A row whose micro-batches differ in size: 6 rows a process in micro-batches of 3, of different lengths.
SETTINGS = dict(dropout=0, batch_size=12, micro_batch_size=3, max_steps=4, scheduler="constant", validate_every_steps=2)
PRECISION = {"ddp": "float32", "fsdp2-full": "bfloat16", "fsdp2-lora": "float32"}  # of the gradients in one buffer
RUNS = {"ddp": ("ddp", "lora"), "fsdp2-full": ("fsdp2", "full"), "fsdp2-lora": ("fsdp2", "lora")}


def main(base: ModelDir, dataset: Path, work: Path) -> None:
    """Whole runs, runs stopped by SIGTERM to process 0 alone, and the going on from one process's checkpoint."""
    ranks.init_processes()
    rows = encode_file(load_tokenizer(base), dataset / "train.jsonl", 256, print)

    def stop(call: int) -> None:
        if call == 7 and ranks.rank() == 0:  # two micro-batches a step, two of the validation: in step 3
            os.kill(os.getpid(), signal.SIGTERM)

    def spec_of(run: str, kind: str, at_micro_batch=None, **overrides):
        strategy, method = RUNS[run]
        directory, settings = work / f"{run}-{kind}", SETTINGS | overrides
        spec = training_spec(base, rows, directory, method=method, at_micro_batch=at_micro_batch, **settings)
        spec.strategy, spec.validation = strategy, rows[:4]  # which one process does without, and must change nothing
        return spec

    unit = fsdp.UNIT_BYTES
    for run in RUNS:
        fsdp.UNIT_BYTES = 1 if run == "fsdp2-full" else unit  # each layer by itself, and all together
        _write_run(work / f"{run}.json", *train(spec_of(run, "whole")))
        try:
            train(spec_of(run, "stopped", stop))
        except Preempted:
            ranks.barrier()
        _write_run(work / f"{run}-resumed.json", *train(spec_of(run, "one")))
        _write_gradients(work / f"{run}-gradients.safetensors", spec_of(run, "gradients", precision=PRECISION[run]))
    ranks.end_processes()


def _write_run(path: Path, model, history) -> None:
    if ranks.rank() == 0:
        path.write_text(json.dumps(history.steps))
        save_file(weights(model), path.with_suffix(".safetensors"))


def _write_gradients(path: Path, spec) -> None:
    """Those of the first step in one buffer, clipped to a norm of 0.1, as graphs hold them."""
    model = spec.build()
    batches = training_batches(spec, model)
    accelerate_layers(spec, model, batches)
    graphs = CudaGraphs(model, spec.loss_sums, {}, use_gemma3_decoder=False)
    for _ in range(2):  # a step begins at 0 whatever the last one left
        graphs.begin_step()
        for batch in (batches[0], batches[1]):
            graphs._forward_backward(batch)
    labels = ranks.sum_over_ranks(torch.tensor(float(len(batches[0]["labels"]) + len(batches[1]["labels"]))))
    norm = graphs.finish_step(labels, 0.1)
    grads = {name: fsdp.full_tensor(p.grad).contiguous() for name, p in model.named_parameters() if p.requires_grad}
    if ranks.rank() == 0:
        save_file({"norm": norm, **grads}, path)


def fork(count: int) -> int:
    """This process `count` times, with the environment that torchrun would give each; its parent's exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            torch.set_num_threads(1)
            os.environ.update(where, RANK=str(rank), LOCAL_RANK=str(rank))
            return -1
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    exit_code = fork(2)
    if exit_code >= 0:
        sys.exit(exit_code)
    main(ModelDir(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
