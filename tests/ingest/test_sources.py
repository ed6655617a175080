"""Where data can come from: local files, a real S3 server, and the hub's layouts through `datasets`."""

import gzip
import json
from pathlib import Path

import pytest

from tasks.core.errors import BadConfig, BadData
from tasks.core.sources import gather
from tasks.ingest.read import data_files
from tests.conftest import Bucket

ROW = {"question": "Why?", "answer": "Because."}
LINE = json.dumps(ROW).encode() + b"\n"


def put(path: Path, data: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def taken(tmp_path: Path, **sources: str) -> dict[str, str]:
    """Names below the artifact with the split that ingest reads from them."""
    target = tmp_path / "taken"
    target.mkdir()
    for split, source in sources.items():
        assert gather(split, source, target, lambda _: None) > 0
    found, passed_over = data_files(target / "files")
    assert not passed_over
    return {path.relative_to(target / "files").as_posix(): split for path, split in found}


def test_files_keep_their_suffix_and_get_their_splits_name(tmp_path: Path) -> None:
    rows = put(tmp_path / "my.rows.jsonl")
    packed = put(tmp_path / "held.csv.gz", gzip.compress(b"question,answer\nq,a\n"))
    assert taken(tmp_path, train=str(rows), test=str(packed)) == {"train.jsonl": "train", "test.csv.gz": "test"}


def test_a_directory_is_split_by_names_and_one_for_testing_is_all_held_out(tmp_path: Path) -> None:
    names = ("a.jsonl", "deep/b.jsonl", "test.jsonl", "data/validation-00000-of-00001.jsonl", ".hidden.jsonl")
    for name in (*names, "model/weights.safetensors"):  # what is no data is not hashed and stored
        put(tmp_path / "in" / name)
    put(tmp_path / "other/train.jsonl")
    assert taken(tmp_path, train=str(tmp_path / "in"), test=str(tmp_path / "other")) == {
        "test/train.jsonl": "test",
        "train/a.jsonl": "train",
        "train/data/validation-00000-of-00001.jsonl": "validation",
        "train/deep/b.jsonl": "train",
        "train/test.jsonl": "test",
    }


def test_a_glob(tmp_path: Path) -> None:
    for name in ("2024/a.jsonl", "2025/a.jsonl", "2025/a.txt"):
        put(tmp_path / "in" / name)
    found = taken(tmp_path, train=str(tmp_path / "in/*/*.jsonl"))
    assert found == {"train/2024/a.jsonl": "train", "train/2025/a.jsonl": "train"}


@pytest.mark.parametrize("source", ["", " ", "gs://bucket/rows.jsonl", "https://example.org/rows.jsonl", "s3:/b/key"])
def test_what_is_no_source_is_refused_by_what_there_is(tmp_path: Path, source: str) -> None:
    with pytest.raises(BadConfig, match="give a path, a pattern, s3://bucket/key or hub:owner/name"):
        gather("train", source, tmp_path, print)


@pytest.mark.parametrize("source", ["none.jsonl", "none/*.jsonl"])
def test_nothing_there_says_where_it_looked(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadData, match=f"train: no file .*{tmp_path}"):
        gather("train", source, tmp_path, print)


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
        place = tmp_path / str(number)
        place.mkdir()
        assert taken(place, train=f"s3://{s3.name}/{source}") == expected
    assert (tmp_path / "0/taken/files/train.jsonl").read_bytes() == LINE
    with pytest.raises(BadData, match="no object there is a data file"):
        gather("train", f"s3://{s3.name}/nothing/", tmp_path, print)


def test_a_hub_dataset_in_the_hubs_layouts(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    put(copy / "data/train.jsonl", LINE * 3)
    put(copy / "data/test.jsonl")
    put(copy / "small/rows.jsonl")
    card = "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train.jsonl}\n"
    card += "  - {split: test, path: data/test.jsonl}\n- config_name: small\n  data_files: small/*.jsonl\n"
    put(copy / "README.md", f"---\n{card}---\n".encode())
    found = taken(tmp_path, train=f"hub:{copy}", validation=f"hub:{copy}:small", test=f"hub:{copy}")
    assert found == {
        "test/test.parquet": "test",
        "train/test.parquet": "test",
        "train/train.parquet": "train",
        "validation/train.parquet": "validation",
    }


def test_a_hub_name_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadConfig, match="write hub:owner/name"):
        gather("train", "hub:", tmp_path, print)
    (tmp_path / "empty").mkdir()
    with pytest.raises((BadConfig, BadData), match="empty"):
        gather("train", f"hub:{tmp_path / 'empty'}", tmp_path, print)
