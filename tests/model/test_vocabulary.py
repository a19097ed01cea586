"""Vocabularies: text to ids and back, files that describe themselves, damage that is refused."""

import json
import unicodedata
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.byte_vocabulary import ByteVocabulary
from model.sentencepiece_vocabulary import SentencePieceVocabulary
from model.vocabulary import EOS_ID, UNK_ID, Vocabulary, VocabularyError
from model.word_vocabulary import WordSplitter, WordVocabulary

SENTENCES = [
    f"{subject} {verb} {thing} ."
    for subject in ("the dog", "a cat", "the old king", "Émile")
    for verb in ("sees", "likes", "has never seen")
    for thing in ("the house", "a garden", "nothing", "the other dog", "œuvres")
]
SIZES = {"bpe": 60, "unigram": 31}


@pytest.fixture(scope="module", params=["word", "bpe", "unigram", "bytes"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    if request.param == "word":
        return WordVocabulary.from_counts(Counter(" ".join(SENTENCES).split()), 100)
    if request.param == "bytes":
        return ByteVocabulary()
    return SentencePieceVocabulary.train(SENTENCES, request.param, SIZES[request.param])


def test_known_sentences_survive_the_way_there_and_back(vocabulary: Vocabulary) -> None:
    for sentence in SENTENCES:
        ids = vocabulary.encode(sentence)
        assert all(EOS_ID < index < len(vocabulary) for index in ids)
        assert vocabulary.decode(ids) == sentence


def test_decoding_stops_at_the_end_symbol(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(SENTENCES[0])
    assert vocabulary.decode([*ids, EOS_ID, *ids]) == SENTENCES[0]


def test_the_text_of_a_special_symbol_does_not_end_a_sentence(vocabulary: Vocabulary) -> None:
    assert EOS_ID not in vocabulary.encode("a </s> b <unk>")


def test_the_two_forms_of_an_accent_are_the_same_word(vocabulary: Vocabulary) -> None:
    decomposed = unicodedata.normalize("NFD", "Émile")
    assert decomposed != "Émile"
    assert vocabulary.encode(decomposed) == vocabulary.encode("Émile")


def test_its_file_gives_the_same_vocabulary(vocabulary: Vocabulary) -> None:
    data = vocabulary.to_bytes()
    read = Vocabulary.from_bytes(data)
    assert (read.kind, len(read), read.to_bytes()) == (vocabulary.kind, len(vocabulary), data)
    assert read.sha256 == vocabulary.sha256
    assert read.encode(SENTENCES[3]) == vocabulary.encode(SENTENCES[3])


@settings(max_examples=60)
@given(at=st.integers(min_value=0), flip=st.integers(min_value=1, max_value=255))
def test_any_changed_byte_is_refused(vocabulary: Vocabulary, at: int, flip: int) -> None:
    data = bytearray(vocabulary.to_bytes())
    data[at % (len(data) - 1)] ^= flip  # the line end behind the document may change
    with pytest.raises(VocabularyError):
        Vocabulary.from_bytes(bytes(data))


@pytest.mark.parametrize("data", [b"", b"junk", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_vocabulary_is_refused(data: bytes) -> None:
    with pytest.raises(VocabularyError, match="baton prepare"):
        Vocabulary.from_bytes(data)


def test_another_version_is_named() -> None:
    document = json.loads(ByteVocabulary().to_bytes())
    document["version"] = 7
    with pytest.raises(VocabularyError, match="version 7"):
        Vocabulary.from_bytes(json.dumps(document).encode())


def test_the_most_frequent_words_are_kept_and_ties_go_by_the_word() -> None:
    counts = {"rare": 1, "b": 5, "a": 5, "often": 9, "</s>": 100}
    vocabulary = WordVocabulary.from_counts(counts, 5)
    assert len(vocabulary) == 5
    assert vocabulary.decode([2, 3, 4]) == "often a b"
    assert vocabulary.encode("a rare often") == [3, UNK_ID, 2]
    assert vocabulary.decode([3, UNK_ID]) == "a <unk>"


def test_words_do_not_depend_on_the_order_of_counting() -> None:
    counts = Counter(" ".join(SENTENCES).split())
    turned = dict(reversed(counts.items()))
    first, second = (WordVocabulary.from_counts(c, 20).to_bytes() for c in (counts, turned))
    assert first == second


def test_moses_rules_split_and_join_raw_text() -> None:
    splitter = WordSplitter("fr")
    words = splitter.split("L'homme dit: Crois-tu aux prophètes?")
    assert words == ["L'", "homme", "dit", ":", "Crois-tu", "aux", "prophètes", "?"]
    assert splitter.join(["L'", "homme", ",", "dit-il", "."]) == "L'homme, dit-il."
    assert WordSplitter("en").split('"R&D" <b>') == ['"', "R", "&", "D", '"', "<", "b", ">"]


def test_a_language_without_rules_is_refused() -> None:
    with pytest.raises(VocabularyError, match="'xx'"):
        WordVocabulary([], "xx")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_are_learnt_the_same_every_time(kind: str) -> None:
    first, second = (SentencePieceVocabulary.train(SENTENCES, kind, SIZES[kind]) for _ in range(2))
    assert len(first) == SIZES[kind]
    assert first.to_bytes() == second.to_bytes()


@pytest.mark.parametrize(("size", "sentences"), [(5000, SENTENCES), (4, SENTENCES), (60, [])])
def test_a_text_that_does_not_fit_the_size_is_refused(size: int, sentences: list[str]) -> None:
    with pytest.raises(VocabularyError, match=rf"{size} pieces.*choose another size"):
        SentencePieceVocabulary.train(sentences, "bpe", size)


def test_a_nul_character_does_not_stop_learning() -> None:
    assert len(SentencePieceVocabulary.train([*SENTENCES, "a\0b"], "bpe", 60)) == 60


def test_a_model_with_other_special_ids_is_refused() -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=31, minloglevel=3
    )
    with pytest.raises(VocabularyError, match="has ids"):
        SentencePieceVocabulary("unigram", model.getvalue())
    with pytest.raises(VocabularyError, match="damaged"):
        SentencePieceVocabulary("unigram", b"junk")


@given(st.text())
def test_bytes_spell_any_text(text: str) -> None:
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text)
    assert len(vocabulary) == 258 and all(2 <= index < 258 for index in ids)
    assert vocabulary.decode(ids) == unicodedata.normalize("NFC", text)


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert ByteVocabulary().decode([0xFF + 2, ord("a") + 2, UNK_ID]) == "\ufffda"


def test_lone_surrogates_are_unknown_characters(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("a \ud800") == vocabulary.encode("a ?")
