"""Fetches a dataset of the Hugging Face hub, or a local copy of one, through `datasets`.

A dataset of JSON, CSV or Parquet files is fetched as these files, so that rows are read as their file has them; any
other as a Parquet file a split.

python -m tasks.ingest.hub owner/name OUT [--config NAME] [--revision REVISION] [--split SPLIT]

A process of its own (tasks.core.sources starts it), so that a flow never imports `datasets`. It exits with the codes of
tasks.core.errors, with the message in the last line on stderr.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from tasks.core.data_files import compressed_suffix, data_suffix
from tasks.core.errors import BadConfig, BadData, StageError, StorageUnavailable

FORMATS = ("json", "csv", "parquet")


def fetch(name: str, out: Path, config: str | None, revision: str | None, split: str | None) -> None:
    """Writes files named after their split below `out`: the split of that name where the dataset has one, else all."""
    try:
        import datasets  # noqa: PLC0415  (its absence is an error of its own)
    except ImportError as error:
        raise BadConfig(f"{name}: the library datasets is not installed: pip install 'stillhouse[gpu]'") from error
    from huggingface_hub import errors  # noqa: PLC0415

    datasets.disable_progress_bars()
    missing = (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError, FileNotFoundError)
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision, cache_dir=str(out / "cache"))
        if files := _plain_files(builder):
            _copy_files(files, out, split, datasets.DownloadManager())
            return
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except errors.GatedRepoError as error:
        raise BadConfig(f"{name} is gated: accept its terms on the hub and set HF_TOKEN ({error})") from error
    except missing as error:
        message = f"{name} is neither a dataset on the hub nor a directory with data; for a private one set HF_TOKEN"
        raise BadConfig(f"{message} ({error})") from error
    except (ConnectionError, errors.HfHubHTTPError) as error:
        raise StorageUnavailable(f"{name}: the hub does not answer: {error}") from error
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise BadData(f"{name}: datasets cannot load it: {error.__cause__ or error}") from error
    for name_of_split in [split] if split in loaded else list(loaded):
        loaded[name_of_split].to_parquet(str(out / f"{name_of_split}.parquet"))


def _plain_files(builder: Any) -> dict[str, list[str]]:
    """The dataset's own files by split; empty where one is of a format, or has options, that ingest does not read."""
    options = builder.config
    if builder.__module__.rpartition(".")[2] not in FORMATS or getattr(options, "field", None):
        return {}
    if getattr(options, "column_names", None) or getattr(options, "sep", ",") != ",":
        return {}
    files = {str(split): [str(path) for path in paths] for split, paths in (options.data_files or {}).items()}
    names = [Path(path).name for paths in files.values() for path in paths]
    return files if all(data_suffix(name) for name in names) else {}


def _copy_files(files: dict[str, list[str]], out: Path, split: str | None, downloads: Any) -> None:
    """Copies a split's files (all splits' where it has none) to `out`, as `train.jsonl` or `train-00000.jsonl`."""
    for name in [split] if split in files else files:
        for number, path in enumerate(files[name]):
            local = path if Path(path).is_file() else downloads.download(path)
            suffix = data_suffix(Path(path).name) + compressed_suffix(path).lower()
            part = f"-{number:05}" if len(files[name]) > 1 else ""
            shutil.copyfile(local, out / f"{name}{part}{suffix}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    for option in ("--config", "--revision", "--split"):
        parser.add_argument(option)
    arguments = vars(parser.parse_args())
    arguments["out"].mkdir(parents=True, exist_ok=True)
    try:
        fetch(**arguments)
    except StageError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
