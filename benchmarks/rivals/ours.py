"""The project itself as a contestant: its trainer of one device, and ranks as Ray actors."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rivals.processes import Place
from benchmarks.rivals.task import Task
from benchmarks.rivals.turn import (
    ProcessTurn,
    Step,
    run_steps,
    seconds_between,
)
from model.batching import Batch
from model.precision import Precision
from model.seq2seq import Seq2Seq
from model.trainer import Trainer
from pipeline.plan import Plan

_THREAD_FLOP_PER_S = {"float32": 80e9, "bfloat16": 500e9, "float64": 40e9}
"""Only to balance words over ranks, where the ratio to a message's time counts."""
_TIMEOUT_S = 900.0


def one_rank_turn(place: Place, task: Task, batches: Sequence[Batch]) -> ProcessTurn:
    """Make a turn of `model.trainer` in this process."""
    model = Seq2Seq(task.model, Precision(task.precision), seed=task.seed)
    trainer = Trainer(model, task.clip_norm)

    def step(batch: Batch) -> Step:
        result = trainer.step(batch, task.learning_rate)
        return Step(result.loss.total, result.loss.num_tokens, result.gradient_norm)

    return run_steps(step, batches)


def ranks_turn(
    place: Place, task: Task, batches: Sequence[Batch], num_ranks: int, pipeline: Mapping[str, Any]
) -> ProcessTurn:
    """Make a turn of real ranks, driven from this process, whose memory does not count.

    Steps are handed out ahead as in training. `pipeline` are settings of that name.
    """
    import time
    from collections import deque

    from cluster.config.sections import ClusterConfig
    from cluster.controller import STEPS_IN_FLIGHT
    from cluster.resources import connect
    from cluster.training_bench import processor_s
    from cluster.worker_group import WorkerGroup

    cluster = ClusterConfig(threads_per_rank=place.num_threads, timeout_s=_TIMEOUT_S)
    plan = plan_for(task, batches, num_ranks, pipeline)
    steps: list[Step] = []
    ends: list[float] = []
    spent: list[float] = []
    with connect(cluster, num_ranks=num_ranks, warn=lambda line: None):
        group = WorkerGroup(plan, cluster, clip_norm=task.clip_norm)
        try:
            group.start()
            waiting = deque(enumerate(batches, 1))
            under_way = 0
            while len(steps) < len(batches):
                while waiting and under_way < STEPS_IN_FLIGHT:
                    number, batch = waiting.popleft()
                    group.submit_step(number, batch, task.learning_rate)
                    under_way += 1
                outcome = group.collect_step()
                under_way -= 1
                ends.append(time.perf_counter())
                spent.append(sum(processor_s(status.pid) for status in group.statuses))
                loss = outcome.loss
                steps.append(Step(loss.total, loss.num_tokens, outcome.gradient_norm))
            peak_bytes = sum(outcome.peak_memory_bytes)
        finally:
            group.shutdown()
    return ProcessTurn(tuple(steps), seconds_between(ends), spent[-1] - spent[0], peak_bytes)


def plan_for(
    task: Task, batches: Sequence[Batch], num_ranks: int, pipeline: Mapping[str, Any]
) -> Plan:
    """Return the plan of a layout, balanced by counts of arithmetic. Raises UserError."""
    from cluster.config import Config
    from cluster.training_bench import DEFAULT_FIELDS, layout_plan
    from pipeline.costs.arithmetic import arithmetic_costs

    costs = arithmetic_costs(
        task.model,
        task.batch_size,
        max(batch.source_positions for batch in batches),
        max(batch.target_positions for batch in batches),
        flop_per_s=_THREAD_FLOP_PER_S[task.precision],
        precision=task.precision,
    )
    model = task.model
    config = Config.from_dict(
        {
            **DEFAULT_FIELDS,
            "seed": task.seed,
            "corpus": {
                **DEFAULT_FIELDS["corpus"],
                "source_vocabulary": {"size": model.source_vocabulary_size},
                "target_vocabulary": {"size": model.target_vocabulary_size},
            },
            "model": {
                "num_layers": model.num_layers,
                "hidden_size": model.hidden_size,
                "embedding_size": model.embedding_size,
            },
            "training": {"batch_size": task.batch_size, "precision": task.precision},
        }
    )
    return layout_plan(config, num_ranks, pipeline, costs)
