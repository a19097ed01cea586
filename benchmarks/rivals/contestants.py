"""Who takes part: each contestant by name, with its processes, its threads and what it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.rivals.distributed_data_parallel import data_parallel_turn
from benchmarks.rivals.ours import one_rank_turn, ranks_turn
from benchmarks.rivals.pipelining import ScheduleName, pipelining_turn
from benchmarks.rivals.plain import Layout, plain_turn
from benchmarks.rivals.processes import run_processes
from benchmarks.rivals.task import Task
from benchmarks.rivals.turn import ProcessTurn, Turn, joined
from model.batching import Batch
from model.errors import UserError
from model.process_memory import KEEPING_ENVIRONMENT

NUM_CORES = 2


@dataclass(frozen=True)
class Contestant:
    """One way to train; `cores` says which processes and threads use them.

    `run` takes a place, the task, the batches and `arguments`, in each of `num_processes` processes
    with `num_threads` threads. With `keeps_memory` they keep the memory of freed tensors, as this
    project's own do.
    """

    name: str
    ours: bool
    cores: str
    setup: str
    run: Callable[..., ProcessTurn]
    arguments: tuple[Any, ...] = ()
    num_processes: int = 1
    num_threads: int = 1
    keeps_memory: bool = False

    def turn(self, task: Task, batches: Sequence[Batch]) -> Turn:
        """Start, train, end. Raises ProcessError."""
        return joined(
            run_processes(
                self.run,
                task,
                batches,
                *self.arguments,
                num_processes=self.num_processes,
                num_threads=self.num_threads,
                environment=KEEPING_ENVIRONMENT if self.keeps_memory else {},
            )
        )


def all_contestants(
    layout: Layout,
    schedule: ScheduleName,
    pipeline: Mapping[str, Any],
    *,
    rivals_keep_memory: bool = False,
) -> dict[str, Contestant]:
    """Return everybody by name.

    `layout` is how DistributedDataParallel and pipelining run sequences, `schedule` the order of
    pipelining, `pipeline` the settings of this project's two ranks. Rivals have the C library's
    defaults, as whoever writes such a trainer has, unless `rivals_keep_memory`.
    """
    one: dict[str, Any] = {"cores": "1 process x 2 threads", "num_threads": NUM_CORES}
    two: dict[str, Any] = {"cores": "2 processes x 1 thread", "num_processes": NUM_CORES}
    described = ", ".join(f"{key} {value}" for key, value in pipeline.items())
    found = [
        *(
            Contestant(
                f"plain {way}",
                False,
                setup=f"nn.LSTM over {_WAYS[way]}; nn.Linear and cross_entropy of real words only",
                run=plain_turn,
                arguments=(way,),
                **one,
            )
            for way in _WAYS
        ),
        Contestant(
            "ddp",
            False,
            setup=f"DistributedDataParallel over gloo, gradients as views of their buckets, static "
            f"graph; the model of plain {layout}",
            run=data_parallel_turn,
            arguments=(layout,),
            **two,
        ),
        *(
            Contestant(
                f"pipelining {count}",
                False,
                setup=f"torch.distributed.pipelining, {schedule}, {count} microbatches, two stages "
                f"cut where arithmetic is most even, shapes given; sequences as in plain {layout}",
                run=pipelining_turn,
                arguments=(layout, schedule, count),
                **two,
            )
            for count in (2, 4)
        ),
        Contestant(
            "ours 1 rank",
            True,
            setup="the trainer of one device",
            run=one_rank_turn,
            **one,
        ),
        Contestant(
            "ours 2 ranks",
            True,
            cores="2 ranks x 1 thread",
            setup=f"Ray actors: {described}",
            run=ranks_turn,
            arguments=(NUM_CORES, dict(pipeline)),
        ),
        Contestant(
            "ours 2 replicas",
            True,
            cores="2 ranks x 1 thread",
            setup="Ray actors: a replica of the whole model each",
            run=ranks_turn,
            arguments=(NUM_CORES, {"placement": "single", "replicas": 2}),
        ),
    ]
    return {
        contestant.name: replace(contestant, keeps_memory=contestant.ours or rivals_keep_memory)
        for contestant in found
    }


_WAYS: Mapping[Layout, str] = {
    "packed": "packed sequences",
    "padded": "sources of one length at a time and padded targets",
}
DEFAULT = (
    "plain packed",
    "plain padded",
    "ddp",
    "pipelining 2",
    "pipelining 4",
    "ours 1 rank",
    "ours 2 ranks",
)


def chosen(names: Sequence[str], everybody: Mapping[str, Contestant]) -> list[Contestant]:
    """Return contestants by name. Raises UserError for a name that nobody has."""
    unknown = [name for name in names if name not in everybody]
    if unknown:
        raise UserError(
            f"--contestants names {unknown[0]!r}, which is nobody; use some of "
            f"{', '.join(everybody)}, with commas between them"
        )
    return [everybody[name] for name in names]
