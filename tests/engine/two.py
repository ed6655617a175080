"""What the tests of several processes run in each of them.

python -m tasks.core.launch 2 tests.engine.two BASE DATASET WORK
"""

import json
import os
import signal
import sys
from pathlib import Path

from safetensors.torch import save_file

from tasks.core.errors import Preempted
from tasks.core.refs import ModelDir
from tasks.engine import processes
from tasks.engine.batches import encode_file
from tasks.engine.load import load_tokenizer
from tasks.engine.trainer import train
from tests.engine.test_trainer import plan, weights

# A row whose micro-batches differ in size: 6 rows a process in micro-batches of 3, of different lengths.
SETTINGS = dict(dropout=0, batch_size=12, micro_batch_size=3, max_steps=8, scheduler="constant")
METHODS = {"ddp": "lora", "fsdp2": "full"}


def main(base: ModelDir, dataset: Path, work: Path) -> None:
    """Whole runs, runs stopped by SIGTERM to process 0 alone, and the going on from one process's checkpoint."""
    processes.join()
    rows = encode_file(load_tokenizer(base), dataset / "train.jsonl", 256, print)

    def stop(call: int) -> None:
        if call == 5 and processes.rank() == 0:  # two micro-batches a step: in step 3
            os.kill(os.getpid(), signal.SIGTERM)

    def made(name: str, strategy: str, at_micro_batch=None):
        found = plan(base, rows, work / name, method=METHODS[strategy], at_micro_batch=at_micro_batch, **SETTINGS)
        found.strategy = strategy
        return found

    for strategy in METHODS:
        _tell(work / f"{strategy}.json", *train(made(f"{strategy}-whole", strategy)))
        stopped = made(f"{strategy}-stopped", strategy, stop)
        try:
            train(stopped)
        except Preempted:
            processes.wait()
        _tell(work / f"{strategy}-resumed.json", *train(made(f"{strategy}-one", strategy)))
    processes.leave()


def _tell(path: Path, model, history) -> None:
    if processes.rank() == 0:
        path.write_text(json.dumps(history.steps))
        save_file(weights(model), path.with_suffix(".safetensors"))


if __name__ == "__main__":
    main(ModelDir(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
