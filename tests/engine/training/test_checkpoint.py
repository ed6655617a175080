import json

import pytest
import torch

from tasks.engine.training import checkpoint
from tasks.engine.training.optimizer_state import flatten, restore


@pytest.fixture
def root(tmp_path):
    for step in (2, 4, 6):
        tensors = {"model": {"w": torch.full((3,), float(step))}}
        checkpoint.write(tmp_path, step, tensors, {"state": {"scale": 1.0}}, fingerprint="run")
    return tmp_path


def test_the_newest_of_two_checkpoints_is_resumed(root):
    warnings: list[str] = []
    directory = checkpoint.newest(root, "run", warnings.append)
    assert directory.name == "checkpoint-6" and not warnings
    assert sorted(path.name for path in root.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert checkpoint.read(directory, "model")["w"].tolist() == [6, 6, 6]


def test_a_flipped_byte_a_missing_manifest_and_another_run_s_are_passed_over(root):
    warnings: list[str] = []
    file = root / "checkpoint-6" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert checkpoint.newest(root, "run", warnings.append).name == "checkpoint-4"
    assert "checkpoint-6 is not used: model.safetensors is not what was written" in warnings[0]
    (root / "checkpoint-4" / "manifest.json").write_text('{"step"')
    assert checkpoint.newest(root, "run", warnings.append) is None
    assert "its writing did not end" in warnings[1]
    checkpoint.write(root, 8, {}, {}, fingerprint="other settings")
    assert checkpoint.newest(root, "run", warnings.append) is None
    assert "another run made it" in warnings[2]


def test_an_optimizer_s_state_survives_safetensors_and_json(tmp_path):
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    batches = torch.randn(4, 5, 3)

    def step(i: int, batch: torch.Tensor) -> None:
        optimizers[i].zero_grad()
        models[i](batch).square().mean().backward()
        optimizers[i].step()

    for batch in batches[:2]:
        step(0, batch)
    models[1].load_state_dict(models[0].state_dict())
    tensors, settings = flatten(optimizers[0])
    directory = checkpoint.write(tmp_path, 2, {"optimizer": tensors}, {"state": settings}, fingerprint="run")
    tensors, settings = checkpoint.read(directory, "optimizer"), checkpoint.read_state(directory)
    restore(optimizers[1], tensors, settings)
    for batch in batches[2:]:
        step(0, batch)
        step(1, batch)
    assert torch.equal(models[0].weight, models[1].weight)


def test_random_generators_go_on_where_they_were():
    tensors, state = checkpoint.random_state()
    expected = torch.rand(3)
    torch.rand(10)
    checkpoint.restore_random_state(tensors, json.loads(json.dumps(state)))
    assert torch.equal(torch.rand(3), expected)
