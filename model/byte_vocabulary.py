"""Bytes as words: the vocabulary that needs no corpus and can spell any serialised sequence."""

from collections.abc import Sequence
from typing import Any

from model.vocabulary import SPECIAL_WORDS, Vocabulary

_FIRST_BYTE_ID = len(SPECIAL_WORDS)


class ByteVocabulary(Vocabulary):
    """The 256 byte values of UTF-8 behind the two special symbols."""

    kind = "bytes"

    def __len__(self) -> int:
        """Return 258."""
        return 256 + _FIRST_BYTE_ID

    def _encode(self, text: str) -> list[int]:
        return [byte + _FIRST_BYTE_ID for byte in text.encode("utf-8")]

    def _decode(self, ids: Sequence[int]) -> str:
        known = bytes(index - _FIRST_BYTE_ID for index in ids if index >= _FIRST_BYTE_ID)
        return known.decode("utf-8", errors="replace")

    def _fields(self) -> dict[str, Any]:
        return {}
