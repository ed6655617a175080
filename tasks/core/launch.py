"""Runs a stage's command in several processes of this host, one a GPU, through torchrun.

    python -m tasks.core.launch 2 tasks.teacher.run config.json --base DIR --dataset DIR --out DIR

torchrun starts `tasks.core.rank_process`, which gives each process its own GPU before it imports the stage. It ends
when the process that started it ends.
"""

import os
import runpy
import sys

from tasks.core.errors import BadConfig
from tasks.core.gpu_selection import require_gpu_each
from tasks.core.parent_process import die_with_parent, name_process


def main(arguments: list[str]) -> None:
    """Becomes torchrun over `arguments`: the number of processes, a module, the module's own arguments."""
    count, module, *options = arguments
    die_with_parent()
    name_process("stage:torchrun")
    try:
        require_gpu_each(int(count))
    except BadConfig as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    os.environ["STILLHOUSE_PARENT"] = str(os.getpid())  # so that the processes die with torchrun
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(count))))
    sys.argv = ["torchrun", "--standalone", "--nproc-per-node", count, "-m", "tasks.core.rank_process", module]
    sys.argv += options
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
