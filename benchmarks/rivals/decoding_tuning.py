"""Teach a trained network longer sentences: `decoding_tuning.py CHECKPOINT TEXT_FOLDER OUTPUT`.

The quickstart's clauses have twelve words at most, and sentences of text differ far more in length.
So one to five neighbouring clauses are joined into a sentence, and the network is trained on those
for some minutes more. `joined` gives benchmarks/rivals/decoding.py its sentences as well.
"""

import argparse
import dataclasses
import random
import time
from pathlib import Path

import torch

from model.batching import make_batch
from model.checkpoint import Checkpoint
from model.checkpoint_writer import commit, part_name, prepare_staging, write_part
from model.trainer import Trainer
from model.translator import load_model

MAX_CLAUSES = 5
BATCH_SIZE = 8


def main() -> None:
    """Parse the options, train, write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path, help="folder with train.en and train.fr")
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(args.checkpoint)
    model = load_model(checkpoint)
    source, target = checkpoint.vocabulary("source"), checkpoint.vocabulary("target")
    pairs = joined(args.text, "train")
    trainer, rng, start_s, step = Trainer(model, clip_norm=5.0), random.Random(1), time.time(), 0
    while (share := (time.time() - start_s) / (60 * args.minutes)) < 1.0:
        sample = rng.sample(pairs, BATCH_SIZE)
        batch = make_batch([(source.encode(a), target.encode(b)) for a, b in sample])
        result = trainer.step(batch, 0.7 if share < 0.6 else 0.7 * (1.0 - share) / 0.4)
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {share:.0%}: perplexity {result.loss.perplexity:.2f}", flush=True)
    staging = prepare_staging(args.output, step, 0)
    parameters = model.parameters().values()
    part = write_part(staging, part_name(0, 1), [(p.rows, p.value) for p in parameters])
    names = ("source_vocabulary.json", "target_vocabulary.json", "config.yaml")
    files = {name: checkpoint.file(name) for name in names}
    info = dataclasses.replace(checkpoint.info, step=step)
    print(commit(staging, args.output / f"step-{step:08d}", info, [part], files))


def joined(folder: Path, split: str) -> list[tuple[str, str]]:
    """Return the sentence pairs of a split, each of one to five neighbouring lines."""
    sides = [(folder / f"{split}.{side}").read_text().splitlines() for side in ("en", "fr")]
    rng, pairs, start = random.Random(1), [], 0
    while start < len(sides[0]):
        stop = start + rng.randint(1, MAX_CLAUSES)
        pairs.append((" ".join(sides[0][start:stop]), " ".join(sides[1][start:stop])))
        start = stop
    return pairs


if __name__ == "__main__":
    main()
