"""Chooses the pieces of a smaller SentencePiece BPE vocabulary, so that text of these pieces is tokenized as before.

Gemma's tokenizer merges the neighbours whose merge has the best score, until no merge is a piece. A piece's own text
takes the same merges wherever it stands, so every piece brings all pieces of its merges: then text whose pieces are all
in the vocabulary is tokenized as before, and bytes spell everything else.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from tasks.core.errors import BadConfig

UNUSED = re.compile(r"<unused\d+>")
ASCII = {chr(code) for code in range(33, 127)} | {"▁"}  # SentencePiece writes a space as ▁


class Pieces:
    """The pieces of a `tokenizer.model`: text, score and id, and the merges that make each.

    Raises BadConfig for a tokenizer that is not BPE with byte fallback.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise BadConfig(f"vocabulary: {file} is not there, and only SentencePiece tokenizers (Gemma's) are trimmed")
        form: Any = sentencepiece_model_pb2
        self.proto = form.ModelProto.FromString(file.read_bytes())
        piece_type = form.ModelProto.SentencePiece
        if self.proto.trainer_spec.model_type != form.TrainerSpec.BPE or not self.proto.trainer_spec.byte_fallback:
            raise BadConfig(
                f"vocabulary: {file} is not a BPE tokenizer with byte fallback, as Gemma's is: set it to null"
            )
        pieces = self.proto.pieces
        self.text = [str(piece.piece) for piece in pieces]
        self.score = [float(piece.score) for piece in pieces]
        self.normal = [index for index, piece in enumerate(pieces) if piece.type == piece_type.NORMAL]
        mergeable = {piece_type.NORMAL, piece_type.USER_DEFINED}
        self.id = {self.text[index]: index for index, piece in enumerate(pieces) if piece.type in mergeable}
        self.required = {
            index
            for index, piece in enumerate(pieces)
            if (piece.type != piece_type.NORMAL and not UNUSED.fullmatch(piece.piece)) or piece.piece in ASCII
        }

    def merge_path(self, index: int) -> set[int]:
        """The piece and all that its text is merged from, characters included; none for one that text never gives."""
        symbols = list(self.text[index])
        path = {self.id[symbol] for symbol in symbols if symbol in self.id}
        while len(symbols) > 1:
            merges = [self.id.get(a + b) for a, b in zip(symbols, symbols[1:], strict=False)]
            scored = [(-self.score[merge], position) for position, merge in enumerate(merges) if merge is not None]
            if not scored:
                return set()
            position = min(scored)[1]
            symbols[position : position + 2] = [symbols[position] + symbols[position + 1]]
            path.add(self.id[symbols[position]])
        return path | {index}


def choose_pieces(pieces: Pieces, used: Iterable[int], preferred: Iterable[int], size: int, rows: int) -> list[int]:
    """Ids of at most `size` pieces below `rows`, ascending: those `used`, then `preferred` in order, then by score.

    Control, byte and user-defined pieces and ASCII are always among them. Raises BadConfig for a `size` too small for
    these and the used ones, or no smaller than the tokenizer's.
    """
    if size >= min(rows, len(pieces.text)):
        raise BadConfig(f"vocabulary={size} is no less than the tokenizer's {len(pieces.text)} pieces: set it to null")
    chosen = {index for index in pieces.required if index < rows}
    for index in set(used) - chosen:
        chosen |= {index} | (pieces.merge_path(index) if index < len(pieces.text) else set())
    if len(chosen) > size:
        raise BadConfig(
            f"vocabulary={size}: the data, bytes, digits and control tokens take {len(chosen)} pieces; raise it"
        )
    by_score = sorted(pieces.normal, key=lambda index: -pieces.score[index])
    for index in [*preferred, *by_score]:
        if len(chosen) == size:
            break
        if index not in chosen and index < rows:
            added = pieces.merge_path(index) - chosen
            if len(chosen) + len(added) <= size:
                chosen |= added
    return sorted(chosen)
