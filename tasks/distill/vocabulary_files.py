"""Writes a model directory with fewer pieces: weights, tokenizer.model, tokenizer.json, and every id in the configs.

The pieces stay in their order, so a piece's new id is its index in `piece_ids`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tasks.core.errors import BadConfig
from tasks.core.refs import ModelDir
from tasks.distill.vocabulary import Pieces
from tasks.engine.data.tokenizers import TOKENIZER_FILES
from tasks.engine.models.family_registry import FAMILIES, family_of
from tasks.engine.weights.safetensors_reader import stored_tensors

TABLES = ("embed_tokens.weight", "lm_head.weight")


def write_trimmed(student: Path, pieces: Pieces, piece_ids: list[int], out: Path) -> ModelDir:
    """Writes `student` with the pieces `piece_ids` alone to `out`. Raises BadConfig for unsupported architectures."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    kind = str(config.get("model_type"))
    if kind not in family_of(kind).trimmable_vocabulary:
        supported = [name for family in FAMILIES for name in family.trimmable_vocabulary]
        raise BadConfig(f"vocabulary: known for {', '.join(supported)}, not for {kind}: set it to null")
    tensors = {
        name: stored.rows()[piece_ids].contiguous() if name.endswith(TABLES) else stored.rows()
        for name, stored in stored_tensors(student).items()
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for name in TOKENIZER_FILES:
        if (student / name).is_file():
            shutil.copyfile(student / name, out / name)
    new_ids = {old: index for index, old in enumerate(piece_ids)}
    _write(out / "config.json", _renumbered(config, new_ids) | {"vocab_size": len(piece_ids)})
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (student / name).is_file():
            values = json.loads((student / name).read_text(encoding="utf-8"))
            _write(out / name, _renumbered(values, new_ids))
    if (added := out / "added_tokens.json").is_file():
        by_token = json.loads(added.read_text(encoding="utf-8"))
        _write(added, {token: new_ids[index] for token, index in by_token.items() if index in new_ids})
    (out / "tokenizer.model").write_bytes(trimmed_model(pieces, piece_ids))
    if (fast := out / "tokenizer.json").is_file():
        _write(fast, trimmed_json(json.loads(fast.read_text(encoding="utf-8")), new_ids))
    return ModelDir(out)


def trimmed_model(pieces: Pieces, piece_ids: list[int]) -> bytes:
    """The SentencePiece model with the pieces `piece_ids`, their scores and types unchanged."""
    proto = type(pieces.proto)()
    proto.CopyFrom(pieces.proto)
    del proto.pieces[:]
    proto.pieces.extend(pieces.proto.pieces[index] for index in piece_ids if index < len(pieces.text))
    spec = proto.trainer_spec
    spec.vocab_size = len(proto.pieces)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        if (index := getattr(spec, name)) >= 0:
            setattr(spec, name, piece_ids.index(index) if index in piece_ids else -1)
    return bytes(proto.SerializeToString(deterministic=True))


def trimmed_json(tokenizer: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """A `tokenizer.json` with the pieces whose ids are in `new_ids`, and the merges among them in their order."""
    model = tokenizer["model"]
    vocabulary = {token: new_ids[index] for token, index in model["vocab"].items() if index in new_ids}
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    model = model | {
        "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        "merges": [[a, b] for a, b in merges if a in vocabulary and b in vocabulary and a + b in vocabulary],
    }
    added_tokens = [
        token | {"id": new_ids[token["id"]]} for token in tokenizer["added_tokens"] if token["id"] in new_ids
    ]
    changed = tokenizer | {"model": model, "added_tokens": added_tokens}
    if padding := tokenizer.get("padding"):
        changed["padding"] = padding | {"pad_id": new_ids[padding["pad_id"]]}
    for processor in _processors(changed.get("post_processor")):
        for token in processor.get("special_tokens", {}).values():
            token["ids"] = [new_ids[index] for index in token["ids"]]
    return changed


def config_ids(student: Path, rows: int) -> set[int]:
    """Ids below `rows` that a model's configs name: padding, begin and end of a text, ends of a turn."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (student / name).is_file():
            for key, value in json.loads((student / name).read_text(encoding="utf-8")).items():
                if _names_ids(key):
                    ids.update(index for index in (value if isinstance(value, list) else [value]) if index is not None)
    return {index for index in ids if 0 <= index < rows}


def _processors(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if processor is None:
        return []
    return (
        [leaf for inner in processor["processors"] for leaf in _processors(inner)]
        if "processors" in processor
        else [processor]
    )


def _names_ids(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids", "_token_index", "suppress_tokens"))


def _renumbered(values: dict[str, Any], new_ids: dict[int, int]) -> dict[str, Any]:
    """The values with ids renumbered under the keys that name ids; ids of removed pieces leave the lists."""
    changed = {}
    for key, value in values.items():
        if key == "added_tokens_decoder":
            value = {str(new_ids[int(index)]): token for index, token in value.items() if int(index) in new_ids}
        elif _names_ids(key) and isinstance(value, list):
            value = [new_ids[index] for index in value if index in new_ids]
        elif _names_ids(key) and isinstance(value, int):
            value = new_ids.get(value)
        changed[key] = value
    return changed


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
