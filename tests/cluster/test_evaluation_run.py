"""Evaluation of a checkpoint on a prepared corpus: scores, baseline, samples, and what must fit."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import Config
from cluster.corpus.files import CorpusError
from cluster.corpus.prepared import (
    FileEntry,
    Manifest,
    RowGroupEntry,
    SplitEntry,
    VocabularyEntry,
)
from cluster.evaluation_run import EvaluationError, evaluate_checkpoint
from model.batching import make_batch
from model.beam_search import BeamSearchError
from model.checkpoint import CheckpointError, CheckpointInfo, Cursor
from model.checkpoint_writer import commit, prepare_staging, write_part
from model.durable_files import file_sha256
from model.evaluation import corpus_scores
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from model.translator import Translator
from model.vocabulary import Vocabulary
from model.word_vocabulary import WordVocabulary

WORDS = ["one", "two", "three", "four", "five"]
SOURCE = WordVocabulary(WORDS)
TARGET = WordVocabulary([f"{word}e" for word in WORDS])
# The translation says every word in the same order, with an e behind it.
PAIRS = [(f"{a} {b} {c}", f"{a}e {b}e {c}e") for a in WORDS for b in WORDS for c in WORDS if a != c]
TEST = PAIRS[::5]

YAML = """
name: tiny
seed: 5
corpus:
  directory: {directory}
  train: {{source: a, target: b}}
  test: {{source: a, target: b}}
  source_vocabulary: {{kind: word, size: 7}}
  target_vocabulary: {{kind: word, size: 7}}
model: {{num_layers: 1, hidden_size: 16, embedding_size: 8}}
pipeline: {{placement: single}}
checkpoint: {{directory: {directory}/checkpoints}}
evaluation: {{beam_size: 2, max_length: 8}}
"""


def write_corpus(directory: Path, source: Vocabulary = SOURCE) -> Path:
    (directory / "test").mkdir(parents=True)
    vocabularies: dict[Literal["source", "target"], VocabularyEntry] = {}
    sides: list[tuple[Literal["source", "target"], Vocabulary]] = [
        ("source", source),
        ("target", TARGET),
    ]
    for side, vocabulary in sides:
        name = f"{side}_vocabulary.json"
        (directory / name).write_bytes(vocabulary.to_bytes())
        vocabularies[side] = VocabularyEntry(
            file=name, sha256=vocabulary.sha256, size=len(vocabulary), kind="word"
        )
    sources, targets = zip(*TEST, strict=True)
    path = directory / "test" / "part-00000.parquet"
    pq.write_table(
        pa.table({"source_text": sources, "target_text": targets}),
        path,
        write_page_checksum=True,
    )
    group = RowGroupEntry(num_rows=len(TEST), max_source_length=3, max_target_length=3)
    entry = SplitEntry(
        num_pairs=len(TEST),
        num_source_tokens=3 * len(TEST),
        num_target_tokens=3 * len(TEST),
        source_unknown_fraction=0.0,
        target_unknown_fraction=0.0,
        dropped={},
        files=[
            FileEntry(file="test/part-00000.parquet", sha256=file_sha256(path), row_groups=[group])
        ],
    )
    manifest = Manifest(
        format_version=1,
        fingerprint="f",
        corpus={},
        vocabularies=vocabularies,
        splits={"test": entry},
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return directory


def trained_model(config: Config) -> Seq2Seq:
    model = Seq2Seq(config.model_config_for(len(SOURCE), len(TARGET)), seed=config.seed)
    pairs = [(SOURCE.encode(source), TARGET.encode(target)) for source, target in PAIRS]
    trainer, batch = Trainer(model), make_batch(pairs)
    for _ in range(150):
        trainer.step(batch, 2.0)
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("evaluation") / "prepared")


@pytest.fixture(scope="module")
def checkpoint(corpus: Path) -> Path:
    yaml = YAML.format(directory=corpus)
    (corpus / "config.yaml").write_text(yaml)
    config = Config.load(corpus / "config.yaml")
    model = trained_model(config)
    info = CheckpointInfo(
        step=150,
        cursor=Cursor(0, 150),
        model=model.config,
        reverse_source=True,
        precision="float32",
        seed=config.seed,
        corpus_fingerprint="f",
    )
    directory = corpus / "checkpoints"
    staging = prepare_staging(directory, 150, 0)
    held = [(parameter.rows, parameter.value) for parameter in model.parameters().values()]
    part = write_part(staging, "part-00000-of-00001.safetensors", held)
    files = {
        "source_vocabulary.json": SOURCE.to_bytes(),
        "target_vocabulary.json": TARGET.to_bytes(),
        "config.yaml": yaml.encode(),
    }
    return commit(staging, directory / "step-00000150", info, [part], files)


def test_a_trained_checkpoint_is_scored_beside_an_untrained_network(checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = evaluate_checkpoint(
        checkpoint,
        split="test",
        num_samples=3,
        untrained_baseline=True,
        progress=lambda done, total: calls.append((done, total)),
    )
    translator = Translator.from_checkpoint(checkpoint)
    found = translator.translate([source for source, _ in TEST], beam_size=2, max_length=8)
    scores = corpus_scores([best[0].text for best in found], [target for _, target in TEST])
    assert result.metrics == {
        "bleu": scores.bleu,
        "chrf": scores.chrf,
        "perplexity": translator.log_probability(TEST).perplexity,
        "num_sentences": len(TEST),
        "num_target_tokens": 4 * len(TEST),
    }
    assert result.signatures == {"bleu": scores.bleu_signature, "chrf": scores.chrf_signature}
    assert result.baseline_metrics is not None
    assert result.baseline_metrics.keys() == result.metrics.keys()
    # Without training every one of the 7 words is about equally probable.
    assert result.baseline_metrics["perplexity"] == pytest.approx(7, abs=0.5)
    assert result.metrics["perplexity"] < 4
    assert result.metrics["chrf"] > result.baseline_metrics["chrf"]
    assert calls[-1] == (2 * len(TEST), 2 * len(TEST))
    assert calls == sorted(calls)


def test_samples_are_spread_over_the_split_and_the_same_every_time(checkpoint: Path) -> None:
    result = evaluate_checkpoint(checkpoint, num_samples=4)
    sources = [sample["source"] for sample in result.samples]
    assert sources == [TEST[index][0] for index in (2, 7, 12, 17)]
    assert [sample["reference"] for sample in result.samples] == [
        TEST[index][1] for index in (2, 7, 12, 17)
    ]
    assert evaluate_checkpoint(checkpoint, num_samples=4).samples == result.samples
    everything = evaluate_checkpoint(checkpoint, num_samples=1000).samples
    assert [sample["source"] for sample in everything] == [source for source, _ in TEST]
    assert evaluate_checkpoint(checkpoint, num_samples=0).samples == []


def test_a_limit_takes_the_first_sentences(checkpoint: Path) -> None:
    result = evaluate_checkpoint(checkpoint, limit=3, num_samples=3)
    assert result.metrics["num_sentences"] == 3
    assert [sample["source"] for sample in result.samples] == [source for source, _ in TEST[:3]]


def test_a_folder_of_checkpoints_is_evaluated_at_its_newest(checkpoint: Path) -> None:
    assert evaluate_checkpoint(checkpoint.parent) == evaluate_checkpoint(checkpoint)


def test_another_corpus_needs_the_same_vocabularies(checkpoint: Path, tmp_path: Path) -> None:
    same = write_corpus(tmp_path / "same")
    assert evaluate_checkpoint(checkpoint, corpus=same) == evaluate_checkpoint(checkpoint)
    other = write_corpus(tmp_path / "other", WordVocabulary(WORDS[::-1]))
    with pytest.raises(EvaluationError, match="source vocabulary") as caught:
        evaluate_checkpoint(checkpoint, corpus=other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"split": "valid"}, CorpusError),
        ({"corpus": Path("nowhere")}, CorpusError),
        ({"beam_size": 0}, BeamSearchError),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    checkpoint: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        evaluate_checkpoint(checkpoint, **options)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        evaluate_checkpoint(tmp_path)
