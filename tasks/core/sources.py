"""Collects a user's data from its source: a file, directory, glob, `s3://` or dataset of the Hugging Face hub.

    rows.jsonl    data/    'data/*.jsonl.gz'    s3://bucket/key.jsonl    s3://bucket/prefix/    's3://bucket/a*.jsonl'
    hub:owner/name    hub:owner/name@revision    hub:owner/name:config

Several files keep their names below a directory named after the split, so that a file named `test.jsonl` in a
directory given for training is held out, and any file given for testing is.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from tasks.core.data_files import compressed_suffix, data_suffix
from tasks.core.errors import BY_EXIT_CODE, BadConfig, BadData, StageError

WILDCARDS = set("*?[")
MAX_LOGGED = 10
UNKNOWN_SCHEME = re.compile(r"(?!s3://|hub:)[A-Za-z][A-Za-z0-9+.-]*:/")
HUB = re.compile(r"hub:(?P<name>[^:@]+)(@(?P<revision>[^:]+))?(:(?P<config>.+))?")
Log = Callable[[str], None]


def collect_source(split: str, source: str, directory: Path, log: Log) -> int:
    """Puts the data files of `source` below `directory/files`, as links where they are local; returns their bytes.

    Raises BadData for a source without data, BadConfig for one that cannot be read so, and storage errors.
    """
    if not source.strip() or UNKNOWN_SCHEME.match(source):
        raise BadConfig(f"{split}: {source!r} is no source: give a path, a pattern, s3://bucket/key or hub:owner/name")
    target = directory / "files"
    target.mkdir(exist_ok=True)
    if source.startswith("s3://"):
        files = dict(_from_s3(source, directory / "s3" / split, log))
    elif source.startswith("hub:"):
        files = dict(_from_hub(source, "" if split == "train" else split, directory / "hub" / split, log))
    else:
        files = _from_disk(split, source, log)
    if len(files) == 1 and not Path(source).expanduser().is_dir() and not source.startswith("hub:"):
        ((name, path),) = files.items()
        _link(target / (split + _suffixes(name)), path)
    else:
        for name, path in files.items():
            _link(target / split / name, path)
    return sum(path.stat().st_size for path in files.values())


def _from_disk(split: str, source: str, log: Log) -> dict[str, Path]:
    """Data files of a path, a directory or a pattern, by their names in the artifact."""
    path = Path(source).expanduser().absolute()
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    elif WILDCARDS & set(source):
        root = Path(path.anchor)
        matches = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
        files = {file.relative_to(_common_parent(matches)).as_posix(): file for file in matches}
    else:
        raise BadData(f"{split}: no file at {path}; paths are relative to {Path.cwd()}")
    visible = {name: file for name, file in files.items() if not any(p.startswith(".") for p in Path(name).parts)}
    text_suffix = ".txt" if split == "text" else None
    data = {name: file for name, file in visible.items() if data_suffix(name) or file.suffix == text_suffix}
    if not data:
        examples = f" that holds data ({', '.join(list(visible)[:3])} ...)" if visible else ""
        raise BadData(f"{split}: no file in {path}{examples}; paths are relative to {Path.cwd()}")
    for name in list(visible.keys() - data.keys())[:MAX_LOGGED]:
        log(f"{split}: {name} is skipped: it is no data file")
    return data


def _common_parent(paths: list[Path]) -> Path:
    """The deepest directory that contains all of `paths`."""
    if not paths:
        return Path()
    return next(parent for parent in paths[0].parents if all(parent in path.parents for path in paths))


def _suffixes(name: str) -> str:
    """`.jsonl.gz` of `rows.v2.jsonl.gz`."""
    compressed = compressed_suffix(name)
    return Path(name[: len(name) - len(compressed)]).suffix + compressed


def _link(link: Path, path: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(path.resolve())


def _from_s3(source: str, directory: Path, log: Log) -> Iterator[tuple[str, Path]]:
    """Downloads the data files of a key, a prefix or a pattern; yields their names in the artifact and paths."""
    from tasks.core.backends.s3 import S3Blobs  # noqa: PLC0415  (boto3: only where it is needed)

    bucket, _, pattern = source.removeprefix("s3://").partition("/")
    literal = next((index for index, letter in enumerate(pattern) if letter in WILDCARDS), len(pattern))
    s3, is_glob = S3Blobs(f"s3://{bucket}"), literal < len(pattern)
    keys = list(s3.keys(pattern[:literal]))
    if is_glob:
        keys = [key for key in keys if fnmatch(key, pattern)]
    elif pattern in keys:
        keys = [pattern]
    else:
        keys = [key for key in keys if not pattern or key.startswith(pattern.rstrip("/") + "/")]
    keys = [key for key in keys if key == pattern or data_suffix(key)]
    if not keys:
        raise BadData(f"{source}: no object there is a data file; give a key, a prefix that ends in /, or a pattern")
    start = (keys[0] if len(keys) == 1 else pattern[:literal]).rfind("/") + 1
    for key in keys:
        path = directory / key[start:]
        path.parent.mkdir(parents=True, exist_ok=True)
        log(f"fetching s3://{bucket}/{key}")
        s3.download(key, path, lambda _: None)
        yield key[start:], path


def _from_hub(source: str, split: str, directory: Path, log: Log) -> Iterator[tuple[str, Path]]:
    """Fetches a hub dataset in a child process: its split of that name alone where it has one, else all."""
    parts = HUB.fullmatch(source)
    if parts is None:
        raise BadConfig(f"{source}: write hub:owner/name, hub:owner/name@revision or hub:owner/name:config")
    log(f"loading {parts['name']} with datasets")
    command = [sys.executable, "-m", "tasks.ingest.hub", parts["name"], str(directory)]
    options = {"--config": parts["config"], "--revision": parts["revision"], "--split": split}
    command += [text for option, value in options.items() if value for text in (option, value)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True, check=False
    )
    if process.returncode:
        messages = process.stderr.strip().splitlines() or [f"{' '.join(command)} exited with {process.returncode}"]
        raise BY_EXIT_CODE.get(process.returncode, StageError)(messages[-1])
    yield from ((file.name, file) for file in sorted(directory.iterdir()) if file.is_file())
