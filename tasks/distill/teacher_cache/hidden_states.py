"""States on disk: rows found by what they hold, tensors memory-mapped, `states.json` written last.

states.json         which teacher, what is kept (hidden states or top-k logits), how many rows and labels
index.safetensors   a key for each row (R, 16), and where its labels begin: starts (R + 1,)
states.bin          hidden states (N, G); or logits.bin and ids.bin (N, k)
lse.bin             log-sum-exps of its logits / T (N, temperatures)
loss.bin, said.bin  the teacher's own cross-entropy with a label, and the token it finds most likely (N, 1)
head.safetensors    the teacher's output projection (W, G), which turns a state into logits
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.core.errors import BadConfig, Corrupted
from tasks.core.refs import ModelDir
from tasks.distill.teacher_cache import TEMPERATURES, StatesConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.losses.loss_mix import Head

FORMAT = 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Kept(NamedTuple):
    """What is kept of a label: a state of `width` values in `dtype`, or, with `top_k`, so many logits instead."""

    width: int
    dtype: str
    top_k: int = 0

    @property
    def files(self) -> dict[str, tuple[torch.dtype, int]]:
        """Files with their dtype and values a label."""
        answers = {"loss.bin": (torch.float32, 1), "said.bin": (torch.int32, 1)}
        answers |= {"lse.bin": (torch.float32, len(TEMPERATURES))}
        if not self.top_k:
            return {"states.bin": (DTYPES[self.dtype], self.width)} | answers
        return {"logits.bin": (torch.float32, self.top_k), "ids.bin": (torch.int32, self.top_k)} | answers

    @property
    def bytes_per_label(self) -> int:
        """Bytes on disk of one label."""
        return sum(dtype.itemsize * values for dtype, values in self.files.values())


class States:
    """A directory of states, opened. `tensors` are (labels, values) by file name."""

    def __init__(self, directory: Path) -> None:
        about = directory / "states.json"
        if not about.is_file():
            raise BadConfig(f"{directory} holds no teacher states: states.json is missing; give what `remember` wrote")
        self.about: dict[str, Any] = json.loads(about.read_text())
        if self.about["format"] != FORMAT:
            raise BadConfig(f"{directory}: states of format {self.about['format']}, this is {FORMAT}; make them anew")
        self.directory = directory
        self.teacher: str = self.about["teacher"]
        self.kept = Kept(*self.about["kept"])
        index = load_file(directory / "index.safetensors")
        self.starts: list[int] = index["starts"].tolist()
        self.places = {bytes(key): row for row, key in enumerate(index["keys"].numpy())}
        self.tensors = mapped(directory, self.kept, self.starts[-1])

    def head(self) -> Head:
        """The teacher's head."""
        return Head(load_file(self.directory / "head.safetensors")["weight"], self.about["softcap"])

    def labels(self, key: bytes) -> slice:
        """Where a row's labels lie. KeyError for a row that is not there."""
        row = self.places[key]
        return slice(self.starts[row], self.starts[row + 1])


def is_older(directory: Path) -> bool:
    """Whether these are states of another format, which cannot be read any more."""
    about = directory / "states.json"
    return about.is_file() and json.loads(about.read_text())["format"] != FORMAT


def mapped(directory: Path, kept: Kept, labels: int) -> dict[str, Tensor]:
    """The tensors of a directory, shared with its files, which are made or have to be as large as `labels` need."""
    found = {}
    for name, (dtype, values) in kept.files.items():
        path, size = directory / name, labels * values
        if path.is_file() and path.stat().st_size != size * dtype.itemsize:
            raise Corrupted(f"{path} has {path.stat().st_size} bytes, not {size * dtype.itemsize}: remove {directory}")
        found[name] = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(labels, values)
    return found


def row_key(example: Example) -> bytes:
    """What a row is found by: a hash of its ids and of which of them are labels."""
    digest = hashlib.sha256(torch.tensor(example.input_ids, dtype=torch.int32).numpy().tobytes())
    digest.update(torch.tensor(example.labels, dtype=torch.int32).numpy().tobytes())
    return digest.digest()[:16]


def teacher_key(teacher: ModelDir, config: StatesConfig) -> str:
    """A hash of all that a teacher's answers come from: weights, configs, clipping, and what they are computed in."""
    digest = hashlib.sha256(f"{config.teacher_precision} {config.clip_norms}".encode())
    for directory in (directory for directory in teacher if directory):
        for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")]):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def finish(directory: Path, teacher: str, kept: Kept, head: Head, keys: Sequence[bytes], starts: list[int]) -> States:
    """Writes what goes with the tensors, `states.json` last, and opens the directory."""
    table = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
    save_file({"keys": table, "starts": torch.tensor(starts)}, directory / "index.safetensors")
    save_file({"weight": head.weight.detach().cpu().contiguous()}, directory / "head.safetensors")
    about = {"format": FORMAT, "teacher": teacher, "kept": list(kept), "softcap": head.softcap, "rows": len(keys)}
    sync(directory)
    temporary = directory / "states.tmp"
    temporary.write_text(json.dumps(about | {"labels": starts[-1]}, indent=1))
    temporary.replace(directory / "states.json")
    return States(directory)


def sync(directory: Path) -> None:
    """Has everything in a directory on the disk itself."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
