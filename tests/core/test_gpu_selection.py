"""Each process of torchrun's sees one card, from the moment on that our package is imported."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "started, sees",
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3,GPU-5"}, "GPU-5"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "GPU-5"}, "GPU-5"),  # chosen by the parent
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "3,5"}, "3,5"),
        ({}, "None"),
    ],
)
def test_importing_tasks_chooses_the_card_before_torch_is_there(started, sees):
    plain = {
        name: os.environ[name] for name in os.environ.keys() - {"CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "LOCAL_RANK"}
    }
    code = "import sys, os, tasks; print(os.environ.get('CUDA_VISIBLE_DEVICES'), 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], env=plain | started, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [sees, "False"]
