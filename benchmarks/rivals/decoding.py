"""Beam search against nn.LSTM: `python -m benchmarks.rivals.decoding CHECKPOINT CORPUS`.

Both translate the same sentences with the same weights, on the same number of threads, in turns;
the speeds are medians over the rounds. Time is the processor's (of all threads), so that other
programs on the machine count little. The outputs are compared line by line.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rivals.decoding_models import enlarged
from benchmarks.rivals.decoding_rival import EOS_ID, LstmTranslator, Options
from benchmarks.rivals.decoding_tuning import joined
from model.best_words import BestWords
from model.checkpoint import Checkpoint
from model.decoder import Decoder
from model.evaluation import corpus_scores
from model.seq2seq import Seq2Seq
from model.translator import Translator, load_model
from model.vocabulary import Vocabulary

Arm = Callable[[], list[str]]


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("corpus", type=Path, help="folder with test.en and test.fr")
    parser.add_argument("--size", choices=["small", "large"], default="small")
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--beam-size", type=int, default=12)
    parser.add_argument("--max-length", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ablation", action="store_true", help="also measure what lies between")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = joined(args.corpus, "test")[: args.sentences]
    checkpoint = Checkpoint.open(args.checkpoint)
    model = load_model(checkpoint)
    if args.size == "large":
        model = enlarged(model, num_layers=4, hidden_size=1000, num_words=32_000)
    vocabularies = (checkpoint.vocabulary("source"), checkpoint.vocabulary("target"))
    search = Search(model, vocabularies, [source for source, _ in pairs], args)
    print(f"{len(pairs)} sentences, {args.threads} threads, beam {args.beam_size}")
    arms = search.arms(args.ablation)
    outputs, seconds = measure(arms, args.rounds)
    report(outputs, seconds, [target for _, target in pairs])


class Search:
    """The sentences, and every way to translate them."""

    def __init__(
        self,
        model: Seq2Seq,
        vocabularies: tuple[Vocabulary, Vocabulary],
        sentences: list[str],
        args: argparse.Namespace,
    ) -> None:
        self._source, self._target = vocabularies
        self._sentences = sentences
        self._beam_size, self._max_length = args.beam_size, args.max_length
        self._batch_size = args.batch_size
        tensors = {name: parameter.value for name, parameter in model.parameters().items()}
        self._rival = LstmTranslator(tensors, model.config.num_layers)
        # A large model has more words than its vocabularies, and never says those.
        self._model = model

    def arms(self, ablation: bool) -> dict[str, Arm]:
        """Return what is measured, by name; the first one is the plain rival."""
        between: dict[str, Arm] = {
            "nn.LSTM, sorted by length": lambda: self.rival(Options(sorts=True)),
            "  and stops when the best is found": lambda: self.rival(Options(True, True)),
            "  and drops finished sentences": lambda: self.rival(Options(True, True, True)),
            "ours, log-softmax and topk over all words": self.ours_plain_softmax,
        }
        plain: dict[str, Arm] = {"nn.LSTM, plain": lambda: self.rival(Options())}
        return plain | (between if ablation else {}) | {"ours": self.ours}

    def rival(self, options: Options) -> list[str]:
        """Translate with nn.LSTM, in batches of the same size as ours."""
        sources = [[*reversed(self._source.encode(text)), EOS_ID] for text in self._sentences]
        order = list(range(len(sources)))
        if options.sorts:
            order.sort(key=lambda index: -len(sources[index]))
        found = [""] * len(sources)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = [sources[row] for row in rows]
            results = self._rival.translate(batch, self._beam_size, self._max_length, options)
            for row, (words, _) in zip(rows, results, strict=True):
                found[row] = self._target.decode(words)
        return found

    def ours(self) -> list[str]:
        """Translate with `Translator`."""
        results = translator_of(self._model, self._source, self._target).translate(
            self._sentences,
            beam_size=self._beam_size,
            max_length=self._max_length,
            batch_size=self._batch_size,
        )
        return [best[0].text for best in results]

    def ours_plain_softmax(self) -> list[str]:
        """Translate as `ours`, with a table of all log-probabilities."""
        with patch.object(Decoder, "best_words", _plain_best_words):
            return self.ours()


def translator_of(model: Seq2Seq, source: object, target: object) -> Translator:
    """Return a translator whose vocabularies may be smaller than the model's."""
    translator = Translator.__new__(Translator)
    translator.model, translator.reverse_source = model, True
    translator.source_vocabulary, translator.target_vocabulary = source, target  # type: ignore
    return translator


def _plain_best_words(decoder: Decoder, outputs: Tensor, count: int) -> BestWords:
    logits = F.linear(outputs, decoder._softmax_weight, decoder._softmax_bias)
    log_probabilities = torch.log_softmax(logits, dim=1)
    values, words = log_probabilities.topk(min(count, logits.shape[1]), dim=1)
    return BestWords(values.double(), words, log_probabilities[:, EOS_ID].double())


def measure(
    arms: dict[str, Arm], rounds: int
) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Run every arm once a round; return the outputs, and the seconds of each round."""
    outputs: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name, arm in arms.items():
            start_s = time.process_time()
            outputs[name] = arm()
            seconds[name].append(time.process_time() - start_s)
        print(
            f"round {number + 1}: " + ", ".join(f"{t[-1]:.2f} s" for t in seconds.values()),
            flush=True,
        )
    return outputs, seconds


def report(
    outputs: dict[str, list[str]], seconds: dict[str, list[float]], references: list[str]
) -> None:
    """Print medians, ratios to the plain rival, and lines that differ from ours."""
    (first, *_), ours = outputs, outputs["ours"]
    plain_s = statistics.median(seconds[first])
    num_words = sum(len(line.split()) for line in ours)
    scores = corpus_scores(ours, references)
    print(f"mean words {num_words / len(ours):.1f}, BLEU {scores.bleu:.2f}")
    for name, lines in outputs.items():
        median_s = statistics.median(seconds[name])
        ratios = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        different = sum(a != b for a, b in zip(lines, ours, strict=True))
        print(
            f"{name:<44} {len(lines) / median_s:8.2f} sentences/s  x {plain_s / median_s:5.2f} "
            f"(rounds {min(ratios):.2f} to {max(ratios):.2f})  {different} lines differ from ours"
        )


if __name__ == "__main__":
    main()
