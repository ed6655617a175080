"""What a user's data can be: a file, a directory, a glob, `s3://`, or a dataset of the Hugging Face hub.

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

from tasks.core.errors import BY_EXIT_CODE, BadConfig, BadData, StageError

WILD = set("*?[")
DATA = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MOST_TOLD = 10
SCHEME = re.compile(r"(?!s3://|hub:)[A-Za-z][A-Za-z0-9+.-]*:/")
HUB = re.compile(r"hub:(?P<name>[^:@]+)(@(?P<revision>[^:]+))?(:(?P<config>.+))?")
Log = Callable[[str], None]


def gather(split: str, source: str, directory: Path, log: Log) -> int:
    """Puts `source` below `directory/files`, as links where it is local; returns its bytes.

    Raises BadData where there is nothing, BadConfig for a source that cannot be read so, and storage errors.
    """
    if not source.strip() or SCHEME.match(source):
        raise BadConfig(f"{split}: {source!r} is no source: give a path, a pattern, s3://bucket/key or hub:owner/name")
    target = directory / "files"
    target.mkdir(exist_ok=True)
    if source.startswith("s3://"):
        found = dict(_from_s3(source, directory / "s3" / split, log))
    elif source.startswith("hub:"):
        found = dict(_from_hub(source, "" if split == "train" else split, directory / "hub" / split, log))
    else:
        found = _local(split, source, log)
    if len(found) == 1 and not Path(source).expanduser().is_dir() and not source.startswith("hub:"):
        ((name, path),) = found.items()
        _link(target / (split + "".join(_suffixes(name))), path)
    else:
        for name, path in found.items():
            _link(target / split / name, path)
    return sum(path.stat().st_size for path in found.values())


def _local(split: str, source: str, log: Log) -> dict[str, Path]:
    path = Path(source).expanduser().absolute()
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        found = {one.relative_to(path).as_posix(): one for one in sorted(path.rglob("*")) if one.is_file()}
    elif WILD & set(source):
        root = Path(path.anchor)
        places = sorted(one for one in root.glob(str(path.relative_to(root))) if one.is_file())
        found = {one.relative_to(_common(places)).as_posix(): one for one in places}
    else:
        raise BadData(f"{split}: no file at {path}; paths are relative to {Path.cwd()}")
    found = {name: one for name, one in found.items() if not any(p.startswith(".") for p in Path(name).parts)}
    data = {name: one for name, one in found.items() if _is_data(name) or (split == "text" and name.endswith(".txt"))}
    if not data:
        others = f" that holds data ({', '.join(list(found)[:3])} ...)" if found else ""
        raise BadData(f"{split}: no file in {path}{others}; paths are relative to {Path.cwd()}")
    for name in list(found.keys() - data.keys())[:MOST_TOLD]:
        log(f"{split}: {name} is passed over: it is no data file")
    return data


def _common(places: list[Path]) -> Path:
    """The deepest directory that holds all of them."""
    if not places:
        return Path()
    return next(parent for parent in places[0].parents if all(parent in one.parents for one in places))


def _suffixes(name: str) -> list[str]:
    """`.jsonl.gz` of `rows.v2.jsonl.gz`."""
    suffixes = Path(name).suffixes
    return suffixes[-2:] if suffixes and suffixes[-1] in (".gz", ".zst") else suffixes[-1:]


def _link(place: Path, path: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(path.resolve())


def _from_s3(source: str, directory: Path, log: Log) -> Iterator[tuple[str, Path]]:
    from tasks.core.s3 import S3Blobs  # noqa: PLC0415  (boto3: only where it is needed)

    bucket, _, key = source.removeprefix("s3://").partition("/")
    fixed = next((at for at, letter in enumerate(key) if letter in WILD), len(key))
    s3 = S3Blobs(f"s3://{bucket}")
    keys = [one for one in s3.keys(key[:fixed]) if fnmatch(one, key)] if fixed < len(key) else list(s3.keys(key))
    if fixed == len(key) and key in keys:
        keys = [key]
    elif fixed == len(key):
        keys = [one for one in keys if not key or one.startswith(key.rstrip("/") + "/")]
    keys = [one for one in keys if one == key or _is_data(one)]
    if not keys:
        raise BadData(f"{source}: no object there is a data file; give a key, a prefix that ends in /, or a pattern")
    start = (keys[0] if len(keys) == 1 else key[:fixed]).rfind("/") + 1
    for one in keys:
        path = directory / one[start:]
        path.parent.mkdir(parents=True, exist_ok=True)
        log(f"fetching s3://{bucket}/{one}")
        s3.download(one, path, lambda _: None)
        yield one[start:], path


def _is_data(name: str) -> bool:
    plain = name.removesuffix(".gz").removesuffix(".zst")
    return plain.lower().endswith(DATA)


def _from_hub(source: str, only: str, directory: Path, log: Log) -> Iterator[tuple[str, Path]]:
    """The dataset's splits as Parquet; all of them, or `only` the one of that name where there is one."""
    parts = HUB.fullmatch(source)
    if parts is None:
        raise BadConfig(f"{source}: write hub:owner/name, hub:owner/name@revision or hub:owner/name:config")
    log(f"loading {parts['name']} with datasets")
    command = [sys.executable, "-m", "tasks.ingest.hub", parts["name"], str(directory)]
    wanted = {"--config": parts["config"], "--revision": parts["revision"], "--only": only}
    command += [text for option, value in wanted.items() if value for text in (option, value)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True, check=False
    )
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"{' '.join(command)} exited with {ran.returncode}"]
        raise BY_EXIT_CODE.get(ran.returncode, StageError)(said[-1])
    yield from ((file.name, file) for file in sorted(directory.glob("*.parquet")))
