"""Entry point of each process that torchrun starts: chooses its GPU, then runs a module as the main program.

    torchrun --standalone --nproc-per-node 2 -m tasks.core.rank_process tasks.teacher.run config.json ...

`tasks.core.launch` writes that line; `accelerate launch -m tasks.core.rank_process ...` does the same.
"""

import runpy
import sys

from tasks.core.gpu_selection import select_gpu


def main(arguments: list[str]) -> None:
    """Runs the module that the first argument names, with the others as its command line."""
    select_gpu()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
