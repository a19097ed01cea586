"""What recording a step's timeline costs: `python benchmarks/timeline_overhead.py`.

Steps with and without a record alternate on one rank, which runs every operation and never waits;
the times are CPU time, so that other programs on the machine count little. The overhead is the
median over pairs of neighbouring steps, and includes the pickling that brings a record home.
"""

import argparse
import pickle
import statistics
import time

import torch

from model.batching import Batch, make_batch
from model.network import ModelConfig
from pipeline.in_process import InProcessPipeline
from pipeline.placements.named import named_placement
from pipeline.plan import Plan
from pipeline.stage import Stage, StageResult


def main() -> None:
    """Parse the sizes, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--words", type=int, default=28)
    parser.add_argument("--time-chunks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = args.hidden_size
    model = ModelConfig(2000, 2000, num_layers=4, hidden_size=size, embedding_size=size)
    plan = Plan(model, named_placement("single", model), num_chunks=args.time_chunks)
    batch = make_batch([([2] * args.words, [2] * args.words)] * args.batch_size)
    (stage,) = InProcessPipeline(plan).stages
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * (args.rounds + 2)):
        record = turn % 2 == 1
        seconds, result = timed_step(stage, batch, record)
        if turn >= 4:
            times[record].append(seconds)
    assert result.record is not None
    num_operations = len(result.record.operations)
    plain_s = statistics.median(times[False])
    pairs = zip(times[False], times[True], strict=True)
    overhead = statistics.median(recorded - plain for plain, recorded in pairs) / plain_s
    print(f"{num_operations} operations a step, {1e6 * plain_s / num_operations:.0f} us each")
    record_bytes = len(pickle.dumps(result.record))
    print(f"{1e3 * plain_s:.2f} ms a step, overhead {overhead:+.2%}, record {record_bytes:,} bytes")


def timed_step(stage: Stage, batch: Batch, record: bool) -> tuple[float, StageResult]:
    """Make a step; return its CPU time too."""
    start = time.process_time()
    result = stage.train_step(batch, 0.1, 5.0, record=record)
    pickle.dumps(result)
    return time.process_time() - start, result


if __name__ == "__main__":
    main()
