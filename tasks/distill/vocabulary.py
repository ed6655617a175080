"""Which of a SentencePiece BPE tokenizer's pieces a smaller student keeps, so that kept text is split as before.

Gemma's tokenizer joins the neighbours whose join has the best score, until none has a piece. A piece's own text takes
the same joins wherever it stands, so with every piece goes each piece on its way: then text whose pieces are all kept
is split into the same pieces, and bytes spell whatever else there is.
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
    """The pieces of a `tokenizer.model`, and how each comes together."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise BadConfig(f"vocabulary: {file} is not there, and only SentencePiece tokenizers (Gemma's) are trimmed")
        form: Any = sentencepiece_model_pb2
        self.proto = form.ModelProto.FromString(file.read_bytes())
        kind = form.ModelProto.SentencePiece
        if self.proto.trainer_spec.model_type != form.TrainerSpec.BPE or not self.proto.trainer_spec.byte_fallback:
            raise BadConfig(
                f"vocabulary: {file} is not a BPE tokenizer with byte fallback, as Gemma's is: set it to null"
            )
        pieces = self.proto.pieces
        self.text = [str(piece.piece) for piece in pieces]
        self.score = [float(piece.score) for piece in pieces]
        self.normal = [index for index, piece in enumerate(pieces) if piece.type == kind.NORMAL]
        joined = {kind.NORMAL, kind.USER_DEFINED}
        self.id = {self.text[index]: index for index, piece in enumerate(pieces) if piece.type in joined}
        self.always = {
            index
            for index, piece in enumerate(pieces)
            if (piece.type != kind.NORMAL and not UNUSED.fullmatch(piece.piece)) or piece.piece in ASCII
        }

    def way(self, index: int) -> set[int]:
        """The piece and all that its text is joined from, characters included; none for one that text never gives."""
        symbols = list(self.text[index])
        found = {self.id[symbol] for symbol in symbols if symbol in self.id}
        while len(symbols) > 1:
            joins = [self.id.get(a + b) for a, b in zip(symbols, symbols[1:], strict=False)]
            known = [(-self.score[join], place) for place, join in enumerate(joins) if join is not None]
            if not known:
                return set()
            place = min(known)[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            found.add(self.id[symbols[place]])
        return found | {index}


def choose(pieces: Pieces, needed: Iterable[int], wanted: Iterable[int], size: int, rows: int) -> list[int]:
    """Ids of at most `size` pieces below `rows`, ascending: what must stay, then `wanted` in order, then by score.

    Control, byte and user-defined pieces and ASCII always stay. Raises BadConfig when `size` is too small or too large.
    """
    if size >= min(rows, len(pieces.text)):
        raise BadConfig(f"vocabulary={size} is no less than the tokenizer's {len(pieces.text)} pieces: set it to null")
    kept = {index for index in pieces.always if index < rows}
    for index in set(needed) - kept:
        kept |= {index} | (pieces.way(index) if index < len(pieces.text) else set())
    if len(kept) > size:
        raise BadConfig(
            f"vocabulary={size}: the data, bytes, digits and control tokens take {len(kept)} pieces; raise it"
        )
    by_score = sorted(pieces.normal, key=lambda index: -pieces.score[index])
    for index in [*wanted, *by_score]:
        if len(kept) == size:
            break
        if index not in kept and index < rows:
            new = pieces.way(index) - kept
            if len(kept) + len(new) <= size:
                kept |= new
    return sorted(kept)
