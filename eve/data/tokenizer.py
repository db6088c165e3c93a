"""A sentencepiece model as the stream and the masking need it. tools/train_tokenizer.py trains one.

Shape suffixes: V vocabulary, N token of one text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from eve.errors import UserError

SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
WORD_START = "▁"


class Tokenizer:
    """Text <-> ids. Ids of the special pieces are read from the model by name, not assumed.

    `word_start_V`: the piece begins a word (it starts with '▁'; sentencepiece puts one before the first
    word as well), so the words of a text are the runs from one such piece to the next. `special_V`: one of
    SPECIALS. `fingerprint`: sha256 of the model file. Pickles as the model's bytes.
    """

    def __init__(self, model_bytes: bytes, where: str = "the tokenizer") -> None:
        if not model_bytes:
            raise UserError(
                f"{where} is empty, as where weights were converted without a tokenizer; convert them again "
                "with --tokenizer FILE, or put their sentencepiece model there"
            )
        self.model_bytes = model_bytes
        self._processor = SentencePieceProcessor()
        try:
            loaded = self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise UserError(f"{where} is not a sentencepiece model")
        self.vocab_size: int = self._processor.GetPieceSize()
        pieces = [self._processor.IdToPiece(index) for index in range(self.vocab_size)]
        missing = [special for special in SPECIALS if special not in pieces]
        if missing:
            raise UserError(
                f"{where} lacks the pieces {' '.join(missing)}; train a model with tools/train_tokenizer.py"
            )
        self.pad_id, self.cls_id, self.sep_id, self.mask_id, self.unk_id = map(pieces.index, SPECIALS)
        self.word_start_V = np.array([piece.startswith(WORD_START) for piece in pieces])
        self.special_V = np.isin(np.arange(self.vocab_size), [pieces.index(special) for special in SPECIALS])

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Raises UserError where the file is missing, no sentencepiece model, or lacks a special piece."""
        try:
            model_bytes = Path(path).read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"there is no tokenizer {path}; tools/train_tokenizer.py trains one from shards"
            ) from None
        except OSError as error:
            raise UserError(f"the tokenizer {path} cannot be read: {error.strerror}") from None
        return cls(model_bytes, where=str(path))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self.model_bytes,)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text: str, max_length: int) -> np.ndarray:
        """[CLS] pieces [SEP] as int64 (N,), N <= max_length (at least 2): pieces are cut, never [SEP].

        The text of a special piece, such as "[MASK]", is spelled with ordinary pieces.
        """
        pieces = self._processor.EncodeAsIds(text)[: max_length - 2]
        return np.array([self.cls_id, *pieces, self.sep_id], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; [PAD] [CLS] [SEP] [MASK] leave no trace."""
        return self._processor.DecodeIds([int(index) for index in ids])

    def piece(self, index: int) -> str:
        return self._processor.IdToPiece(int(index))


def cut(tokens_N: np.ndarray, max_length: int) -> np.ndarray:
    """What `Tokenizer.encode` gives for that length, of the whole text's (N,)."""
    if len(tokens_N) <= max_length:
        return tokens_N
    return np.append(tokens_N[: max_length - 1], tokens_N[-1])
