"""Names of data files: the suffixes that ingest can read, plain or compressed."""

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED_SUFFIXES = (".gz", ".zst")


def compressed_suffix(name: str) -> str:
    """`.gz` or `.zst` as the file's name has it; empty for a file that is not compressed."""
    return next((name[-len(suffix) :] for suffix in COMPRESSED_SUFFIXES if name.lower().endswith(suffix)), "")


def data_suffix(name: str) -> str:
    """The suffix of a data file in small letters, without that of its compression; empty for any other file."""
    plain = name[: len(name) - len(compressed_suffix(name))].lower()
    return next((suffix for suffix in DATA_SUFFIXES if plain.endswith(suffix)), "")
