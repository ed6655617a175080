"""First pass: every row becomes a canonical line in a scratch file and 35 bytes of numbers in memory.

Files are read here, cut into blocks, and worked on by a process a core; what comes back is in file order.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
import orjson
import polars as pl

from tasks.core.errors import BadData
from tasks.core.job import Job
from tasks.core.parent_process import die_with_parent
from tasks.ingest import IngestConfig
from tasks.ingest.canonical import Kinds
from tasks.ingest.diagnose import what_is_wrong
from tasks.ingest.read import Split, Unreadable, data_files, is_lines, is_packed, line_blocks, read
from tasks.ingest.row_shapes import recognise
from tasks.ingest.worker import Block, Done, Rules, Stretch, stage_block

SAMPLE = 200
BLOCK_BYTES, BLOCK_ROWS = 4 << 20, 5000
ALONE_BYTES = 32 << 20  # less than this is done before workers have started
MOST_WORKERS = 8
# What RECORD packs, as numpy reads it.
COLUMNS = np.dtype([("file", "<u2"), ("line", "<u4"), ("question", "<u8"), ("answer", "<u8"), ("kind", "<u4"),
                    ("is_object", "u1"), ("prompt_chars", "<u4"), ("answer_chars", "<u4"),
                    ("bytes", "<u4")])  # fmt: skip


class Staged(NamedTuple):
    """What the first pass found: `rows` has a row of numbers a good row, in file order; `lines` are the scratch files
    that hold them, `counts` of them each."""

    files: list[tuple[str, Split]]
    shapes: dict[str, str]
    rows: pl.DataFrame
    lines: list[Path]
    counts: list[int]
    kinds: Kinds
    faults: int
    passed_over: list[str]


def stage_rows(config: IngestConfig, files: Path, staged: Path, quarantine: IO[bytes], job: Job) -> Staged:
    """Reads all files; good rows go to files in `staged`, faulty ones to `quarantine` with their reason."""
    paths, passed_over = data_files(files)
    if len(paths) > 1 << 16:
        raise BadData(f"{len(paths)} files are more than {1 << 16}; put several into one")
    root = files if files.is_dir() else files.parent
    names = [(str(path.relative_to(root)), split) for path, split in paths]
    sizes = [path.stat().st_size for path, _ in paths]
    for (name, _), size in zip(names, sizes, strict=True):
        if not size:
            raise BadData(f"{name} is empty (0 bytes); give a file with rows, or take it away")
    shapes: dict[str, str] = {}
    blocks = _blocks(config, [path for path, _ in paths], [name for name, _ in names], shapes)
    staged.mkdir()
    kinds, records, faults, written, counts = Kinds(), bytearray(), 0, list[Path](), list[int]()
    for number, (block, done) in enumerate(_worked(blocks, staged, sum(sizes))):
        written.append(staged / f"{number:06}")
        quarantine.write(done.quarantine)
        counts.append(len(done.records) // COLUMNS.itemsize)
        records += _renumbered(done, kinds)
        faults += done.faults
        if number % 8 == 0:
            job.progress(block.done, sum(sizes), "bytes", f"{block.name}: line {block.first}")
    job.progress(sum(sizes), sum(sizes), "bytes", "read")
    table = np.frombuffer(records, COLUMNS)
    rows = pl.DataFrame({name: pl.Series(name, np.ascontiguousarray(table[name])) for name in COLUMNS.names or ()})
    told = [str(path.relative_to(root)) for path in passed_over]
    return Staged(names, shapes, rows, written, counts, kinds, faults, told)


def _renumbered(done: Done, kinds: Kinds) -> bytes:
    """The block's records with the whole dataset's numbers of kinds."""
    places = np.array([kinds.number(kind) for kind in done.kinds], dtype="<u4")
    if len(places) == 1:
        return done.records
    table = np.frombuffer(bytearray(done.records), COLUMNS)
    table["kind"] = places[table["kind"]]
    return table.tobytes()


def _worked(blocks: Iterator[Block], staged: Path, size: int) -> Iterator[tuple[Block, Done]]:
    """Every block with what a worker made of it, in order."""
    places = (staged / f"{number:06}" for number in range(1 << 30))
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    if size < ALONE_BYTES or workers < 2:
        yield from ((block, stage_block(block, place)) for block, place in zip(blocks, places, strict=False))
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _follow, (os.getpid(),)) as pool:
        waiting: deque[tuple[Block, Future[Done]]] = deque()
        try:
            for block, place in zip(blocks, places, strict=False):
                waiting.append((block._replace(rows=b""), pool.submit(stage_block, block, place)))
                if len(waiting) > workers + 2:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _follow(parent: int) -> None:
    """A worker dies with us."""
    os.environ["STILLHOUSE_PARENT"] = str(parent)
    die_with_parent()


def _blocks(config: IngestConfig, paths: list[Path], names: list[str], shapes: dict[str, str]) -> Iterator[Block]:
    """The files' rows in blocks; a file's shape is known (and kept in `shapes`) when its first block is."""
    salt, learn_all = b"%d\n" % config.seed, config.learn_turns == "all"
    before = 0
    for file, (path, name) in enumerate(zip(paths, names, strict=True)):
        size = path.stat().st_size
        shapes[name] = _shape(config, path, name)
        rules = Rules(shapes[name], config.system_prompt, salt, learn_all)
        if is_lines(path):
            for first, place, data in line_blocks(path, name, BLOCK_BYTES):
                stretch = data if is_packed(path) else Stretch(path, place, len(data))
                yield Block(file, name, rules, first, stretch, before + min(place, size))
        else:
            rows = read(path, name)
            while some := list(islice(rows, BLOCK_ROWS)):
                yield Block(file, name, rules, some[0][0], some, before)
        before += size


def _shape(config: IngestConfig, path: Path, name: str) -> str:
    head = list(islice(read(path, name), SAMPLE))
    if not head:
        raise BadData(f"{name} holds no rows; give a file with rows, or take it away")
    if config.format != "auto":
        return config.format
    values = [_value(data) for _, data in head]
    if all(isinstance(value, Unreadable) for value in values):
        line, first = head[0][0], cast(Unreadable, values[0])
        raise BadData(f"{name}: none of the first {len(head)} rows can be read; line {line} is {first.reason}")
    return recognise(values, name)


def _value(data: object) -> object:
    if not isinstance(data, bytes):
        return data
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return Unreadable(what_is_wrong(data), "")


def staged_lines(lines: Iterable[Path]) -> Iterator[bytes]:
    """The canonical lines of the first pass, in order."""
    for path in lines:
        with path.open("rb", buffering=1 << 20) as file:
            yield from file
