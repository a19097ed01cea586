"""DistributedDataParallel over gloo: every process has the whole model and some of the sentences.

Process r reads every R-th sentence, so all have about the same lengths, and R processes of one
thread each take the place of one process with R threads. Gradients are averaged bucket by bucket
while the backward pass goes on, in the memory of the buckets; every process then clips and updates.
"""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.rivals.parameters import without_values
from benchmarks.rivals.plain import Layout, PlainSeq2Seq, PlainTrainer
from benchmarks.rivals.processes import Place
from benchmarks.rivals.task import Task
from benchmarks.rivals.turn import ProcessTurn, Step, run_steps
from model.batching import Batch


def data_parallel_turn(
    place: Place, task: Task, batches: list[Batch], layout: Layout
) -> ProcessTurn:
    """Make a turn as one of several processes."""
    place.join_group()
    model = without_values(lambda: PlainSeq2Seq(task, layout))
    model.fill(task)
    # The values are the same everywhere already, and the graph never changes.
    module = DistributedDataParallel(
        model, init_sync=False, gradient_as_bucket_view=True, static_graph=True
    )
    trainer = PlainTrainer(task, model, module, place.num_processes)

    def step(batch: Batch) -> Step:
        share = batch.share(place.index, place.num_processes)
        return trainer.step(share, batch.num_sentences)

    turn = run_steps(step, batches)
    dist.destroy_process_group()
    return turn
