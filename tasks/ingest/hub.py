"""Fetches a dataset of the Hugging Face hub, or a local copy of one, as a Parquet file a split, through `datasets`.

python -m tasks.ingest.hub owner/name OUT [--config NAME] [--revision REVISION] [--split SPLIT]

A process of its own (tasks.core.sources starts it), so that a flow never imports `datasets`. It exits with the codes of
tasks.core.errors, with the message in the last line on stderr.
"""

import argparse
import sys
from pathlib import Path

from tasks.core.errors import BadConfig, BadData, StageError, StorageUnavailable


def fetch(name: str, out: Path, config: str | None, revision: str | None, split: str | None) -> None:
    """Writes `out/<split>.parquet`: the split of that name where the dataset has one, else all of them."""
    try:
        import datasets  # noqa: PLC0415  (its absence is an error of its own)
    except ImportError as error:
        raise BadConfig(f"{name}: the library datasets is not installed: pip install 'stillhouse[gpu]'") from error
    from huggingface_hub import errors  # noqa: PLC0415

    datasets.disable_progress_bars()
    missing = (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError, FileNotFoundError)
    try:
        loaded = datasets.load_dataset(name, config, revision=revision, cache_dir=str(out / "cache"))
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
