"""The GPU slot without a Prefect server: held by one run at a time, and free when its holder was killed."""

import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.core.gpu_slot import gpu_slot
from tasks.core.settings import Settings

HOLD = """
import logging, sys, time
from pathlib import Path
from prefect.settings import PREFECT_API_URL, temporary_settings
from tasks.core.gpu_slot import gpu_slot
from tasks.core.settings import Settings

with temporary_settings(restore_defaults={PREFECT_API_URL}), gpu_slot(Settings(home=Path(sys.argv[1])), logging):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_s_slot_is_free_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True) as waiting:
            holder.send_signal(signal.SIGKILL)
            assert waiting.stdout is not None and waiting.stdout.readline() == "held\n"
            waiting.kill()
    one, two = Settings(home=tmp_path, gpu_slots=2), Settings(home=tmp_path, gpu_slots=2)
    with temporary_settings(restore_defaults={PREFECT_API_URL}), gpu_slot(one, logging), gpu_slot(two, logging):
        assert "waiting" not in caplog.text
