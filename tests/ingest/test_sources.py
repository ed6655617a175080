"""Where data can come from: local files, a real S3 server, and the hub's layouts through `datasets`."""

import gzip
import json
from pathlib import Path

import pytest

from tasks.core.errors import BadConfig, BadData
from tasks.core.sources import collect_source
from tasks.ingest.source_files import data_files
from tests.conftest import Bucket

ROW = {"question": "Why?", "answer": "Because."}
LINE = json.dumps(ROW).encode() + b"\n"


def put(path: Path, data: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def imported(tmp_path: Path, **sources: str) -> dict[str, str]:
    """Names below the artifact with the split that ingest reads from them."""
    target = tmp_path / "imported"
    target.mkdir()
    for split, source in sources.items():
        assert collect_source(split, source, target, lambda _: None) > 0
    files, skipped = data_files(target / "files")
    assert not skipped
    return {path.relative_to(target / "files").as_posix(): split for path, split in files}


def test_files_keep_their_suffix_and_get_their_splits_name(tmp_path: Path) -> None:
    rows = put(tmp_path / "my.rows.jsonl")
    compressed = put(tmp_path / "held.csv.gz", gzip.compress(b"question,answer\nq,a\n"))
    assert imported(tmp_path, train=str(rows), test=str(compressed)) == {"train.jsonl": "train", "test.csv.gz": "test"}


def test_a_directory_is_split_by_names_and_one_for_testing_is_all_held_out(tmp_path: Path) -> None:
    names = ("a.jsonl", "deep/b.jsonl", "test.jsonl", "data/validation-00000-of-00001.jsonl", ".hidden.jsonl")
    for name in (*names, "model/weights.safetensors"):  # what is no data is not hashed and stored
        put(tmp_path / "in" / name)
    put(tmp_path / "other/train.jsonl")
    assert imported(tmp_path, train=str(tmp_path / "in"), test=str(tmp_path / "other")) == {
        "test/train.jsonl": "test",
        "train/a.jsonl": "train",
        "train/data/validation-00000-of-00001.jsonl": "validation",
        "train/deep/b.jsonl": "train",
        "train/test.jsonl": "test",
    }


def test_a_glob(tmp_path: Path) -> None:
    for name in ("2024/a.jsonl", "2025/a.jsonl", "2025/a.txt"):
        put(tmp_path / "in" / name)
    files = imported(tmp_path, train=str(tmp_path / "in/*/*.jsonl"))
    assert files == {"train/2024/a.jsonl": "train", "train/2025/a.jsonl": "train"}


@pytest.mark.parametrize("source", ["", " ", "gs://bucket/rows.jsonl", "https://example.org/rows.jsonl", "s3:/b/key"])
def test_an_unknown_source_is_refused_with_the_known_ones(tmp_path: Path, source: str) -> None:
    with pytest.raises(BadConfig, match="give a path, a pattern, s3://bucket/key or hub:owner/name"):
        collect_source("train", source, tmp_path, print)


@pytest.mark.parametrize("source", ["none.jsonl", "none/*.jsonl"])
def test_a_missing_file_is_reported_with_its_path(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData, match=f"train: no file .*{tmp_path}"):
        collect_source("train", source, tmp_path, print)


def test_s3_key_prefix_and_pattern(tmp_path: Path, s3: Bucket) -> None:
    for key in ("team/a.jsonl", "team/b.jsonl.gz", "team/deep/test.jsonl", "team/readme.txt", "teammate/c.jsonl"):
        body = gzip.compress(LINE) if key.endswith(".gz") else LINE
        s3.client.put_object(Bucket=s3.name, Key=key, Body=body)
    for number, (source, expected) in enumerate(
        [
            ("team/a.jsonl", {"train.jsonl": "train"}),
            ("team/", {"train/a.jsonl": "train", "train/b.jsonl.gz": "train", "train/deep/test.jsonl": "test"}),
            ("team/*.gz", {"train.jsonl.gz": "train"}),
        ]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        assert imported(directory, train=f"s3://{s3.name}/{source}") == expected
    assert (tmp_path / "0/imported/files/train.jsonl").read_bytes() == LINE
    with pytest.raises(BadData, match="no object there is a data file"):
        collect_source("train", f"s3://{s3.name}/nothing/", tmp_path, print)


def test_a_hub_dataset_in_the_hubs_layouts(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    put(copy / "data/train.jsonl", LINE * 3)
    put(copy / "data/test.jsonl")
    put(copy / "small/rows.jsonl")
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train.jsonl}\n"
    card += "  - {split: test, path: data/test.jsonl}\n- config_name: small\n  data_files: small/*.jsonl\n"
    put(copy / "README.md", f"---\n{card}---\n".encode())
    files = imported(tmp_path, train=f"hub:{copy}", validation=f"hub:{copy}:small", test=f"hub:{copy}")
    assert files == {
        "test/test.jsonl": "test",
        "train/test.jsonl": "test",
        "train/train.jsonl": "train",
        "validation/train.jsonl": "validation",
    }
    assert (tmp_path / "imported/files/train/train.jsonl").read_bytes() == LINE * 3


def test_a_hub_name_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadConfig, match="write hub:owner/name"):
        collect_source("train", "hub:", tmp_path, print)
    (tmp_path / "empty").mkdir()
    with pytest.raises((BadConfig, BadData), match="empty"):
        collect_source("train", f"hub:{tmp_path / 'empty'}", tmp_path, print)
