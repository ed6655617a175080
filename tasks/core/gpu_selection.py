"""One GPU for each process that torchrun or `accelerate launch` started, chosen before any library asks the driver.

The CUDA driver reads CUDA_VISIBLE_DEVICES once, and peft, bitsandbytes and torchao ask it while they are imported.
So `tasks.core.rank_process` chooses first and imports the stage afterwards.
"""

import os
import sys

from tasks.core.errors import BadConfig


def select_gpu() -> bool:
    """Leaves this process the visible GPU of its LOCAL_RANK; whether that changed what it sees.

    A process that sees one GPU already keeps it: whoever started it has chosen.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    rank, visible = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(rank)] * (rank + 1)
    if rank >= len(devices) or devices[rank] == visible:
        return False
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank]
    return True


def restart_on_selected_gpu() -> None:
    """Runs this process's command again with its own GPU, where torchrun started the stage itself and it sees all."""
    if select_gpu():
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, sys.orig_argv)


def require_gpu_each(processes: int) -> None:
    """Raises BadConfig when CUDA_VISIBLE_DEVICES names fewer GPUs than there will be processes: they would share one.

    Empty and -1 hide every GPU: the processes train on the CPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = [device for device in visible.split(",") if device and device != "-1"]
    if devices and len(devices) < processes:
        raise BadConfig(
            f"{processes} processes, and CUDA_VISIBLE_DEVICES={visible} names {len(devices)}: "
            "set processes to the number of GPUs, or name more of them"
        )
