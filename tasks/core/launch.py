"""A stage's command in several processes of this host, one a GPU: torchrun, which dies with whoever started it.

    python -m tasks.core.launch 2 tasks.teacher.run config.json --base DIR --dataset DIR --out DIR

`torchrun --standalone --nproc-per-node 2 -m tasks.teacher.run ...` and `accelerate launch` start the same command.
"""

import os
import runpy
import sys

from tasks.core.parent_process import die_with_parent, name_process


def main(arguments: list[str]) -> None:
    """Becomes torchrun over `arguments`: the number of processes, a module, the module's own arguments."""
    count, module, *rest = arguments
    die_with_parent()
    name_process("stage:torchrun")
    os.environ["STILLHOUSE_PARENT"] = str(os.getpid())  # so that the processes die with torchrun
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))
    sys.argv = ["torchrun", "--standalone", "--nproc-per-node", count, "-m", module, *rest]
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
