"""Scores are sacreBLEU's, with its signatures; perplexity never overflows."""

import math
from statistics import fmean

import pytest
import sacrebleu

from model.errors import UserError
from model.evaluation import corpus_scores
from model.loss import LossSum

REFERENCES = ["the cat sat on the mat .", "there is no other way to do this ."]


def test_scores_are_sacrebleus() -> None:
    hypotheses = ["the cat sat on a mat .", "there is no way to do this ."]
    scores = corpus_scores(hypotheses, REFERENCES)
    assert scores.bleu == sacrebleu.corpus_bleu(hypotheses, [REFERENCES], force=True).score
    assert scores.chrf == sacrebleu.corpus_chrf(hypotheses, [REFERENCES]).score
    assert 0 < scores.bleu < 100
    assert "tok:13a" in scores.bleu_signature
    assert "case:mixed" in scores.bleu_signature
    assert f"version:{sacrebleu.__version__}" in scores.chrf_signature


def test_perfect_and_empty_translations_have_the_extreme_scores() -> None:
    assert corpus_scores(REFERENCES, REFERENCES).bleu == pytest.approx(100)
    assert corpus_scores(REFERENCES, REFERENCES).chrf == pytest.approx(100)
    assert corpus_scores(["", ""], REFERENCES).bleu == 0


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="1 translations cannot be scored against 2"):
        corpus_scores(["one"], REFERENCES)
    with pytest.raises(UserError, match="no translations"):
        corpus_scores([], [])


def test_perplexity_is_e_to_the_mean_loss() -> None:
    losses = [math.log(2), math.log(8)]
    assert LossSum(sum(losses), 2).perplexity == pytest.approx(math.exp(fmean(losses)))
    assert LossSum(1e9, 1).perplexity == math.inf
    assert math.isnan(LossSum(0.0, 0).perplexity)
    assert math.isnan(LossSum(math.nan, 3).perplexity)
