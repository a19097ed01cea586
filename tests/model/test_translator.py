"""Translation of text: order, odd input, limits, and the probabilities that go with it."""

from pathlib import Path

import pytest

from model.batching import make_batch
from model.beam_search import BeamSearchError
from model.byte_vocabulary import ByteVocabulary
from model.checkpoint import CheckpointInfo, Cursor
from model.checkpoint_writer import commit, prepare_staging, write_part
from model.errors import UserError
from model.precision import Precision
from model.seq2seq import ModelConfig, Seq2Seq
from model.translator import MAX_SENTENCE_WORDS, Translation, TranslationError, Translator
from model.vocabulary import Vocabulary
from model.word_vocabulary import WordVocabulary

SOURCE = WordVocabulary(["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "left"])
TARGET = WordVocabulary(["le", "chat", "est", "sur", "un", "tapis", "et", "puis", "il", "part"])
SENTENCES = [
    "the cat sat on the mat",
    "",
    "it left",
    "   \t ",
    "the cat sat on a mat and then it left and left and left",
    "unheard-of words only",
    "it",
]


def translator(
    source: Vocabulary = SOURCE, target: Vocabulary = TARGET, seed: int = 5, scale: float = 2.0
) -> Translator:
    config = ModelConfig(
        len(source), len(target), num_layers=2, hidden_size=8, embedding_size=6, init_scale=scale
    )
    return Translator(Seq2Seq(config, Precision("float64"), seed=seed), source, target)


def test_translations_keep_the_order_of_the_sentences() -> None:
    given = translator()
    together = given.translate(SENTENCES, beam_size=3, max_length=8, batch_size=2)
    assert len(together) == len(SENTENCES)
    for sentence, [found] in zip(SENTENCES, together, strict=True):
        [[alone]] = given.translate([sentence], beam_size=3, max_length=8)
        assert found.text == alone.text
        assert found.score == pytest.approx(alone.score, abs=1e-10)
    assert len({best.text for [best] in together}) > 2


def test_blank_sentences_have_the_empty_translation() -> None:
    found = translator().translate(["", " \u00a0\t"], n_best=2)
    assert found == [[Translation("", 0.0)], [Translation("", 0.0)]]
    assert translator().translate([]) == []


def test_the_n_best_come_best_first() -> None:
    [found] = translator().translate(["the cat"], beam_size=5, n_best=4, max_length=6)
    scores = [translation.score for translation in found]
    assert len(found) == 4
    assert scores == sorted(scores, reverse=True)


def test_scores_are_the_log_probabilities_of_the_translations() -> None:
    given = translator()
    sentences = [sentence for sentence in SENTENCES if sentence.strip()]
    found = given.translate(sentences, beam_size=2, max_length=5)
    for sentence, [best] in zip(sentences, found, strict=True):
        if "<unk>" not in best.text:
            loss = given.log_probability([(sentence, best.text)])
            assert best.score == pytest.approx(-loss.total, abs=1e-10)


def test_the_log_probability_does_not_depend_on_the_batches() -> None:
    given = translator()
    pairs = [
        (sentence, " ".join(TARGET.decode([2 + n] * n).split()))
        for n, sentence in enumerate(SENTENCES)
    ]
    whole = given.log_probability(pairs)
    cut = given.log_probability(pairs, batch_size=1)
    assert whole.num_tokens == cut.num_tokens == sum(n + 1 for n in range(len(pairs)))
    assert whole.total == pytest.approx(cut.total, abs=1e-9)
    encoded = [(SOURCE.encode(source), TARGET.encode(target)) for source, target in pairs]
    assert whole.total == pytest.approx(given.model.loss(make_batch(encoded)).total, abs=1e-9)


def test_progress_counts_every_sentence_once() -> None:
    calls: list[tuple[int, int]] = []
    translator().translate(
        SENTENCES,
        beam_size=2,
        max_length=4,
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(4, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    "sentence",
    ["\0", "a\0b", "\ud800", "\u2028", "e\u0301", "🜁" * 50, "\x85", "</s> <unk>", "\ufeffit"],
)
def test_odd_characters_are_translated(sentence: str) -> None:
    for source in (SOURCE, ByteVocabulary()):
        given = translator(source, ByteVocabulary())
        [[found]] = given.translate([sentence], beam_size=2, max_length=5)
        found.text.encode("utf-8")
        assert given.log_probability([(sentence, sentence)]).total > 0


def test_long_sentences_are_translated_up_to_the_stated_limit() -> None:
    given = translator()
    longest = "cat " * MAX_SENTENCE_WORDS
    [[found], _] = given.translate([longest, "it"], beam_size=1, max_length=3)
    assert found.score < 0
    with pytest.raises(TranslationError, match="source sentence 2 has 10001 words"):
        given.translate(["it", longest + "cat"])
    with pytest.raises(TranslationError, match="target sentence 1 has 10001 words"):
        given.log_probability([("it", longest + "cat")])


def test_settings_out_of_range_are_refused_even_for_no_sentences() -> None:
    with pytest.raises(BeamSearchError, match="beam_size"):
        translator().translate([], beam_size=0)
    with pytest.raises(UserError, match="batch_size is 0"):
        translator().translate(["it"], batch_size=0)


def test_vocabularies_of_another_model_are_refused() -> None:
    with pytest.raises(TranslationError, match="the model has 12 source"):
        Translator(translator().model, ByteVocabulary(), TARGET)


@pytest.mark.parametrize("reverse_source", [True, False])
def test_a_checkpoint_translates_as_its_model_did(tmp_path: Path, reverse_source: bool) -> None:
    trained = translator(seed=3)
    trained.reverse_source = reverse_source
    expected = trained.translate(SENTENCES, beam_size=3, max_length=6)
    info = CheckpointInfo(
        step=4,
        cursor=Cursor(0, 4),
        model=trained.model.config,
        reverse_source=reverse_source,
        precision="float64",
        seed=1,
        corpus_fingerprint="",
    )
    staging = prepare_staging(tmp_path, 4, 0)
    held = [(p.rows, p.value) for p in trained.model.parameters().values()]
    part = write_part(staging, "part-00000-of-00001.safetensors", held)
    files = {
        "source_vocabulary.json": SOURCE.to_bytes(),
        "target_vocabulary.json": TARGET.to_bytes(),
    }
    path = commit(staging, tmp_path / "step-00000004", info, [part], files)
    loaded = Translator.from_checkpoint(path)
    assert loaded.translate(SENTENCES, beam_size=3, max_length=6) == expected


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    test_a_checkpoint_translates_as_its_model_did(tmp_path, True)
    with pytest.raises(UserError, match="no CUDA device"):
        Translator.from_checkpoint(tmp_path, device="cuda")
