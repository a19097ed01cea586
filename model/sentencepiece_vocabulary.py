"""Pieces of words learnt by SentencePiece: byte-pair encoding or a unigram language model.

With pieces, hardly a word is unknown, and no tokeniser of a language is needed. Training is
deterministic: one thread, no sampling of its own, text already in NFC and left as it is.
"""

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from model.vocabulary import EOS_ID, UNK_ID, Vocabulary, VocabularyError

# Rarer characters than the last hundred-thousandth of the text become unknown, so that stray
# scripts do not take the places of pieces.
_CHARACTER_COVERAGE = 0.99999
_MAX_SENTENCE_BYTES = 4192  # SentencePiece's own default; longer sentences are not learnt from


class SentencePieceVocabulary(Vocabulary):
    """A trained SentencePiece model whose ids 0 and 1 are the unknown piece and the end symbol."""

    def __init__(self, kind: str, model: bytes) -> None:
        """Take the kind, `bpe` or `unigram`, and the serialised model of SentencePiece.

        Raises VocabularyError when the model cannot be read or its special ids are not ours.
        """
        from sentencepiece import SentencePieceProcessor

        self.kind = kind
        self._model = model
        try:
            self._pieces: Any = SentencePieceProcessor(model_proto=model)
            special = (self._pieces.unk_id(), self._pieces.eos_id())
        except (RuntimeError, ValueError, OSError):
            raise VocabularyError(
                "the SentencePiece model is damaged; run `baton prepare` again"
            ) from None
        if special != (UNK_ID, EOS_ID):
            raise VocabularyError(
                f"the SentencePiece model has ids {special} for <unk> and </s> where "
                f"{(UNK_ID, EOS_ID)} are needed; train it with `baton prepare`"
            )

    @classmethod
    def train(cls, sentences: Iterable[str], kind: str, size: int) -> "SentencePieceVocabulary":
        """Learn `size` pieces (the two special ones counted) from sentences.

        Raises VocabularyError when the text is too small for so many pieces.
        """
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_learnable(sentences),
                model_writer=model,
                model_type=kind,
                vocab_size=size,
                unk_id=UNK_ID,
                eos_id=EOS_ID,
                bos_id=-1,
                pad_id=-1,
                byte_fallback=False,
                hard_vocab_limit=True,
                normalization_rule_name="identity",
                character_coverage=_CHARACTER_COVERAGE,
                max_sentence_length=_MAX_SENTENCE_BYTES,
                shuffle_input_sentence=False,
                num_threads=1,
                minloglevel=3,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise VocabularyError(
                f"SentencePiece cannot learn a {kind} vocabulary of {size} pieces from this "
                f"corpus ({_reason(error)}); choose another size or a larger corpus"
            ) from None
        return cls(kind, model.getvalue())

    def __len__(self) -> int:
        """Return the number of pieces, the two special symbols counted."""
        return int(self._pieces.get_piece_size())

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(text)
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._pieces.decode([int(index) for index in ids]))

    def _fields(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self._model).decode("ascii")}


def _learnable(sentences: Iterable[str]) -> Iterator[str]:
    # The trainer refuses the whole text for one NUL character.
    return (sentence for sentence in sentences if sentence and "\0" not in sentence)


def _reason(error: Exception) -> str:
    # Behind the place in its source and the condition stands, at best, what is wrong.
    reason = str(error).replace("\n", " ").rpartition("] ")[2].strip()[:120]
    return reason.rstrip(".") or "it has no sentences to learn from"
