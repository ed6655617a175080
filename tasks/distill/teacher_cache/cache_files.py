"""Files of a teacher cache: memory-mapped tensors, rows by a hash of their ids, `states.json` written last.

states.json         teacher, layout (hidden states or top-k logits), number of rows and of labels
index.safetensors   a key of each row (R, 16), and the index of its first label: starts (R + 1,)
states.bin          hidden states (N, G); or logits.bin and ids.bin (N, K)
lse.bin             log-sum-exps of its logits / T (N, temperatures)
loss.bin, said.bin  the teacher's cross-entropy with a label, and its most likely token (N, 1)
head.safetensors    the teacher's LM head (W, G), which turns a hidden state into logits
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
from tasks.distill.teacher_cache import TEMPERATURES, TeacherCacheConfig
from tasks.engine.data.chat_template import Example
from tasks.engine.losses.loss_mix import Head

FORMAT = 2
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CacheLayout(NamedTuple):
    """What is cached of a label: a hidden state of `width` values in `dtype`, or, with `top_k`, as many logits."""

    width: int
    dtype: str
    top_k: int = 0

    @property
    def files(self) -> dict[str, tuple[torch.dtype, int]]:
        """File names with their dtype and values a label."""
        summaries = {"loss.bin": (torch.float32, 1), "said.bin": (torch.int32, 1)}
        summaries |= {"lse.bin": (torch.float32, len(TEMPERATURES))}
        if not self.top_k:
            return {"states.bin": (DTYPES[self.dtype], self.width)} | summaries
        return {"logits.bin": (torch.float32, self.top_k), "ids.bin": (torch.int32, self.top_k)} | summaries

    @property
    def bytes_per_label(self) -> int:
        """Bytes on disk of one label."""
        return sum(dtype.itemsize * values for dtype, values in self.files.values())


class TeacherCache:
    """A teacher cache, opened. `tensors` are (labels, values) by file name.

    Raises BadConfig for a directory that is none, or has an older format.
    """

    def __init__(self, directory: Path) -> None:
        about = directory / "states.json"
        if not about.is_file():
            raise BadConfig(
                f"{directory} is no teacher cache: states.json is missing; give what tasks.distill.teacher_cache wrote"
            )
        self.about: dict[str, Any] = json.loads(about.read_text())
        if self.about["format"] != FORMAT:
            raise BadConfig(f"{directory} has format {self.about['format']}, not {FORMAT}: run the teacher again")
        self.directory = directory
        self.teacher: str = self.about["teacher"]
        self.layout = CacheLayout(*self.about["kept"])
        index = load_file(directory / "index.safetensors")
        self.starts: list[int] = index["starts"].tolist()
        self.row_indices = {bytes(key): row for row, key in enumerate(index["keys"].numpy())}
        self.tensors = map_tensors(directory, self.layout, self.starts[-1])

    def head(self) -> Head:
        """The teacher's LM head."""
        return Head(load_file(self.directory / "head.safetensors")["weight"], self.about["softcap"])

    def labels(self, key: bytes) -> slice:
        """Indices of a row's labels. Raises KeyError for a row that is not cached."""
        row = self.row_indices[key]
        return slice(self.starts[row], self.starts[row + 1])


def has_older_format(directory: Path) -> bool:
    """Whether this is a teacher cache of an older format, which cannot be read any more."""
    about = directory / "states.json"
    return about.is_file() and json.loads(about.read_text())["format"] != FORMAT


def map_tensors(directory: Path, layout: CacheLayout, labels: int) -> dict[str, Tensor]:
    """Memory-mapped tensors of a cache's files, which are created where they are missing.

    Raises Corrupted for a file whose size does not fit `labels`.
    """
    tensors = {}
    for name, (dtype, values) in layout.files.items():
        path, size = directory / name, labels * values
        if path.is_file() and path.stat().st_size != size * dtype.itemsize:
            raise Corrupted(f"{path} has {path.stat().st_size} bytes, not {size * dtype.itemsize}: remove {directory}")
        tensors[name] = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(labels, values)
    return tensors


def row_key(example: Example) -> bytes:
    """A row's key in the cache: a hash of its ids and labels."""
    digest = hashlib.sha256(torch.tensor(example.input_ids, dtype=torch.int32).numpy().tobytes())
    digest.update(torch.tensor(example.labels, dtype=torch.int32).numpy().tobytes())
    return digest.digest()[:16]


def teacher_key(teacher: ModelDir, config: TeacherCacheConfig) -> str:
    """A hash of all that decides a teacher's outputs: weights, configs, clipping and precision."""
    digest = hashlib.sha256(f"{config.teacher_precision} {config.clip_norms}".encode())
    for directory in (directory for directory in teacher if directory):
        for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")]):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_index(
    directory: Path, teacher: str, layout: CacheLayout, head: Head, keys: Sequence[bytes], starts: list[int]
) -> TeacherCache:
    """Completes a cache whose tensors are written: index, head, and `states.json` last. Returns it opened."""
    table = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
    save_file({"keys": table, "starts": torch.tensor(starts)}, directory / "index.safetensors")
    save_file({"weight": head.weight.detach().cpu().contiguous()}, directory / "head.safetensors")
    about = {"format": FORMAT, "teacher": teacher, "kept": list(layout), "softcap": head.softcap, "rows": len(keys)}
    sync(directory)
    temporary = directory / "states.tmp"
    temporary.write_text(json.dumps(about | {"labels": starts[-1]}, indent=1))
    temporary.replace(directory / "states.json")
    return TeacherCache(directory)


def sync(directory: Path) -> None:
    """Flushes a directory's files to disk."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
