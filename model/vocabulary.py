"""What every vocabulary does: text to word ids and back, and to a file that describes itself.

A word is whatever the vocabulary's kind makes it: a token, a piece of a word, or a byte. All kinds
share two special symbols and nothing else: the unknown word and the end of a sentence. There is no
padding symbol, since positions behind the end are never read, and no symbol for the beginning,
since the decoder's first input is the end symbol (Sutskever et al. 2014, figure 1).
"""

import base64
import binascii
import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from model.errors import UserError

UNK_ID = 0
EOS_ID = 1
SPECIAL_WORDS = ("<unk>", "</s>")

_FORMAT = "baton-vocabulary"
_VERSION = 1


class VocabularyError(UserError):
    """A vocabulary cannot be built as asked, or its file is not one of ours or is damaged."""


class Vocabulary(ABC):
    """Words and their ids; `<unk>` is 0 and `</s>` is 1 in every kind."""

    kind: str

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of ids, the two special symbols counted."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: Sequence[int]) -> str: ...

    @abstractmethod
    def _fields(self) -> dict[str, Any]: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a sentence in natural order, without the end symbol.

        The text is brought to Unicode's NFC first, so that training and translation agree. Lone
        surrogates, which no file holds but a server may be sent, count as unknown characters.
        """
        return self._encode(normalise(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first end symbol; ids must be below `len(self)`."""
        until = list(ids)
        if EOS_ID in until:
            del until[until.index(EOS_ID) :]
        return self._decode(until)

    def to_bytes(self) -> bytes:
        """Return the vocabulary as a JSON document, byte for byte the same for the same words."""
        document = {"format": _FORMAT, "version": _VERSION, "kind": self.kind, **self._fields()}
        document["sha256"] = _document_sha256(document)
        return _canonical_json(document) + b"\n"

    @property
    def sha256(self) -> str:
        """The fingerprint: SHA-256 of `to_bytes()`."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @staticmethod
    def from_bytes(data: bytes) -> "Vocabulary":
        """Read what `to_bytes` wrote.

        Raises VocabularyError when the data is no vocabulary, is of another version, or is damaged:
        the document carries a checksum of itself.
        """
        # The kinds need this module, so it learns of them only when it is asked for one.
        from model.byte_vocabulary import ByteVocabulary
        from model.sentencepiece_vocabulary import SentencePieceVocabulary
        from model.word_vocabulary import WordVocabulary

        document = _checked_document(data)
        kind = document["kind"]
        if kind == WordVocabulary.kind:
            return WordVocabulary.from_fields(document)
        if kind == ByteVocabulary.kind:
            return ByteVocabulary()
        return SentencePieceVocabulary(kind, decode_base64(document.get("model")))


def normalise(text: str) -> str:
    """Return text in Unicode's canonical composed form (NFC), without lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-8", "replace").decode("utf-8")
    return unicodedata.normalize("NFC", text)


def decode_base64(value: object) -> bytes:
    """Return the bytes of a base64 field; VocabularyError when it is none."""
    try:
        return base64.b64decode(value if isinstance(value, str) else "", validate=True)
    except binascii.Error:
        raise _damaged("its SentencePiece model is not base64") from None


def _checked_document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise _damaged("it is not a JSON document") from None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise _damaged(f"it does not say that its format is {_FORMAT}")
    if document.get("version") != _VERSION:
        raise VocabularyError(
            f"the vocabulary has format version {document.get('version')!r} and this program "
            f"reads version {_VERSION}; run `baton prepare` again"
        )
    if document.pop("sha256", None) != _document_sha256(document):
        raise _damaged("its contents do not match its checksum")
    if document.get("kind") not in ("word", "bpe", "unigram", "bytes"):
        raise _damaged(f"its kind is {document.get('kind')!r}")
    return document


def _damaged(fact: str) -> VocabularyError:
    return VocabularyError(f"the vocabulary is damaged: {fact}; run `baton prepare` again")


def _canonical_json(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8")


def _document_sha256(document: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(_canonical_json(document)).hexdigest()
    except UnicodeEncodeError:
        raise _damaged("it holds lone surrogates") from None
