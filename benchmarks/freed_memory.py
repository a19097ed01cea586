"""What a step costs where freed memory is kept: `python benchmarks/freed_memory.py`.

Every variant trains in a process of its own, in turns, on one thread. Seconds are of processor
time, which other work on the machine leaves nearly alone. On Linux with the GNU C library only.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys

from model.process_memory import KEEPING_ENVIRONMENT, peak_memory_bytes

VARIANTS: dict[str, dict[str, str]] = {
    "the library's defaults": {},
    "up to 32 MiB kept": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    },
    "all kept": KEEPING_ENVIRONMENT,
    "all kept, huge pages": {**KEEPING_ENVIRONMENT, "THP_MEM_ALLOC_ENABLE": "1"},
}
_WARM_UP, _STEPS = 2, 6


def train(num_layers: int, hidden: int, words: int, sentences: int, positions: int) -> None:
    """Make a few steps, and print processor seconds, page faults and peak memory of each."""
    import torch

    from model.batching import make_batch
    from model.network import ModelConfig
    from model.seq2seq import Seq2Seq
    from model.trainer import Trainer

    torch.set_num_threads(1)
    model = ModelConfig(words, words, num_layers, hidden, hidden)
    trainer, draw = Trainer(Seq2Seq(model)), random.Random(1)

    def sentence() -> list[int]:
        return [draw.randrange(2, words) for _ in range(positions - 1)]

    batch = make_batch([(sentence(), sentence()) for _ in range(sentences)])
    usages = [resource.getrusage(resource.RUSAGE_SELF)]
    for _ in range(_WARM_UP + _STEPS):
        trainer.step(batch, 0.1)
        usages.append(resource.getrusage(resource.RUSAGE_SELF))
    pairs = list(zip(usages[_WARM_UP:-1], usages[_WARM_UP + 1 :], strict=True))
    seconds = [b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in pairs]
    result = {
        "cpu_s": statistics.median(seconds),
        "faults": statistics.median(b.ru_minflt - a.ru_minflt for a, b in pairs),
        "peak_bytes": peak_memory_bytes(),
    }
    print(json.dumps(result))


def main() -> None:
    """Run the variants in turns and print medians over rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="2,512,16000,64,24", help="layers,cells,words,B,T")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        train(*map(int, given.sizes.split(",")))
        return
    command = [sys.executable, __file__, "--worker", "--sizes", given.sizes]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(given.rounds):
        for name, variables in VARIANTS.items():
            done = subprocess.run(
                command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    for name, rounds in found.items():
        median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        print(
            f"{name:<24} {median['cpu_s']:6.2f} s {median['faults']:10,.0f} page faults a step, "
            f"{median['peak_bytes'] / 1e6:6,.0f} MB at most"
        )


if __name__ == "__main__":
    main()
