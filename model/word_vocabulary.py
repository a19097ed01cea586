"""The paper's vocabulary: the most frequent words of a language, every other one unknown.

Sutskever et al. (2014), section 3.1: 160,000 source and 80,000 target words, each out-of-vocabulary
word replaced by a special one. What a word is: text that is tokenised already is split at white
space; for other text, the Moses rules of a language split and join it (`sacremoses`).
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from model.vocabulary import SPECIAL_WORDS, UNK_ID, Vocabulary, VocabularyError


class WordSplitter:
    """Cuts text into words and joins words to text, by white space or by Moses's rules.

    `language` is a Moses language code such as `en`, or None for text that is tokenised already.
    """

    def __init__(self, language: str | None) -> None:
        self.language = language
        self._moses: tuple[Any, Any] | None = None
        if language is not None:
            from sacremoses import MosesDetokenizer, MosesTokenizer

            _check_moses_language(language)
            self._moses = (MosesTokenizer(language), MosesDetokenizer(language))

    def split(self, text: str) -> list[str]:
        """Return the words of a sentence in order."""
        if self._moses is None:
            return text.split()
        words: list[str] = self._moses[0].tokenize(text, escape=False)
        return words

    def join(self, words: Sequence[str]) -> str:
        """Return the sentence that the words spell."""
        if self._moses is None:
            return " ".join(words)
        return str(self._moses[1].detokenize(list(words), unescape=False))


class WordVocabulary(Vocabulary):
    """A list of words; a word's id is its place in it."""

    kind = "word"

    def __init__(self, words: Sequence[str], language: str | None = None) -> None:
        """Take the words behind the two special symbols, in the order of their ids."""
        self._words = [*SPECIAL_WORDS, *words]
        self._splitter = WordSplitter(language)
        # A sentence may hold the text "</s>": it must not end there, so it is unknown.
        self._ids = {word: index for index, word in enumerate(words, start=len(SPECIAL_WORDS))}

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], size: int, language: str | None = None
    ) -> "WordVocabulary":
        """Keep the most frequent words, `size` ids in all; equal counts go by code points."""
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        words = [word for word, _ in ranked if word not in SPECIAL_WORDS]
        return cls(words[: max(0, size - len(SPECIAL_WORDS))], language)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "WordVocabulary":
        """Read the fields of a vocabulary's document; VocabularyError when they hold no words."""
        words, language = fields.get("words"), fields.get("language")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise VocabularyError("the word vocabulary is damaged: `words` is not a list of words")
        if not (language is None or isinstance(language, str)):
            raise VocabularyError("the word vocabulary is damaged: `language` is not a name")
        if len(set(words)) != len(words) or not set(words).isdisjoint(SPECIAL_WORDS):
            raise VocabularyError("the word vocabulary is damaged: a word has two ids")
        return cls(words, language)

    def __len__(self) -> int:
        """Return the number of words, the two special symbols counted."""
        return len(self._words)

    def _encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNK_ID) for word in self._splitter.split(text)]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._splitter.join([self._words[index] for index in ids])

    def _fields(self) -> dict[str, Any]:
        return {
            "language": self._splitter.language,
            "words": self._words[len(SPECIAL_WORDS) :],
        }


@lru_cache
def _check_moses_language(language: str) -> None:
    # Moses itself would fall back to English's abbreviations without a word.
    from sacremoses.corpus import NonbreakingPrefixes

    known = sorted(set(NonbreakingPrefixes().available_langs.values()))
    if language not in known:
        raise VocabularyError(
            f"there are no Moses rules for language {language!r}; choose one of "
            f"{', '.join(known)}, or null for text that is tokenised already"
        )
