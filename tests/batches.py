"""Random batches of word ids, shared by the tests of all layers."""

import random

from model.batching import Batch, make_batch
from model.vocabulary import EOS_ID


def random_pairs(
    num_pairs: int,
    *,
    source_words: int,
    target_words: int,
    lengths: tuple[int, int] = (0, 9),
    seed: int = 0,
) -> list[tuple[list[int], list[int]]]:
    """Draw ragged pairs; a length of 0 leaves a sentence of its end symbol alone."""
    draw = random.Random(seed)

    def sentence(num_words: int) -> list[int]:
        ids = [word for word in range(num_words) if word != EOS_ID]
        return [draw.choice(ids) for _ in range(draw.randint(*lengths))]

    return [(sentence(source_words), sentence(target_words)) for _ in range(num_pairs)]


def random_batch(
    num_pairs: int,
    *,
    source_words: int = 11,
    target_words: int = 13,
    lengths: tuple[int, int] = (0, 9),
    seed: int = 0,
) -> Batch:
    """Draw a batch of ragged pairs."""
    return make_batch(
        random_pairs(
            num_pairs,
            source_words=source_words,
            target_words=target_words,
            lengths=lengths,
            seed=seed,
        )
    )
