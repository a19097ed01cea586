"""The task with exact answers: a network that has learnt the rule translates held-out numbers."""

import random
from collections import Counter

import pytest

from cluster.corpus.numbers import spell
from model.batching import make_batch
from model.seq2seq import ModelConfig, Seq2Seq
from model.trainer import Trainer
from model.translator import Translator
from model.word_vocabulary import WordVocabulary

NUM_HELD_OUT = 60


@pytest.mark.slow
def test_held_out_numbers_are_translated_exactly() -> None:
    draw = random.Random(0)
    pairs = [spell(number) for number in range(1000)]
    draw.shuffle(pairs)
    held_out, training = pairs[:NUM_HELD_OUT], pairs[NUM_HELD_OUT:]
    source, target = (
        WordVocabulary.from_counts(
            Counter(word for side in sides for word in side.split()), 100, None
        )
        for sides in zip(*pairs, strict=True)
    )
    model = Seq2Seq(ModelConfig(len(source), len(target), 2, 64, 64, init_scale=0.1))
    trainer = Trainer(model)
    encoded = [(source.encode(english), target.encode(french)) for english, french in training]
    for epoch in range(45):
        draw.shuffle(encoded)
        encoded.sort(key=lambda pair: len(pair[0]) // 2)
        batches = [encoded[start : start + 16] for start in range(0, len(encoded), 16)]
        draw.shuffle(batches)
        for batch in batches:
            trainer.step(make_batch(batch), 0.7 if epoch < 35 else 0.1)

    translator = Translator(model, source, target, reverse_source=True)
    found = translator.translate([english for english, _ in held_out], beam_size=1)

    assert [best[0].text for best in found] == [french for _, french in held_out]
