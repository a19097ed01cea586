"""How good translations are: sacreBLEU's scores with their signatures."""

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from model.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Corpus BLEU and chrF, both from 0 to 100, with sacreBLEU's signatures of how they came."""

    bleu: float
    chrf: float
    bleu_signature: str
    chrf_signature: str


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """Score translations against one reference each, in the same order.

    BLEU is cased, on text that sacreBLEU tokenises itself (`13a`), so both sides are plain text.
    Raises UserError when there is nothing to score or the numbers of lines differ.
    """
    if len(hypotheses) != len(references):
        raise UserError(
            f"{len(hypotheses)} translations cannot be scored against {len(references)} "
            "references; give one reference a line"
        )
    if not hypotheses:
        raise UserError("there are no translations to score; give at least one line")
    # `force` silences the warning that a corpus may be tokenised, which short ones often draw.
    bleu, chrf = BLEU(force=True), CHRF()
    translations, references_of_line = list(hypotheses), [list(references)]
    bleu_score = bleu.corpus_score(translations, references_of_line)
    chrf_score = chrf.corpus_score(translations, references_of_line)
    return Scores(
        float(bleu_score.score),
        float(chrf_score.score),
        str(bleu.get_signature()),
        str(chrf.get_signature()),
    )
