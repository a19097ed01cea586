"""The pipeline over torch.distributed, with a process a rank, against the single-device trainer."""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from model.batching import Batch
from model.parameter import ParameterRows
from pipeline.plan import Plan
from pipeline.stage import Stage, StageResult
from pipeline.transports.shared_memory import connect_ranks
from pipeline.transports.torch_store import StoreServer
from pipeline.transports.torch_transport import TorchTransport
from tests.batches import random_batch
from tests.pipeline.plans import (
    assert_tensors_close,
    assert_tensors_equal,
    oracle_step,
    small_model,
    small_plan,
)

TIMEOUT_S = 60.0
Pieces = list[tuple[ParameterRows, Tensor]]


def run_rank(
    channel: Connection,
    plan: Plan,
    worker: int,
    address: tuple[str, int],
    batch: Batch,
    shared_memory: bool,
) -> None:
    """Be a worker: one step, whose gradients and updated parameters go back."""
    torch.set_num_threads(1)
    replica, rank = divmod(worker, plan.num_ranks)
    transport = connect_ranks(
        *address,
        rank,
        plan.num_ranks,
        TIMEOUT_S,
        group=f"replica{replica}",
        shared_memory=shared_memory,
    )
    replicas = TorchTransport.connect(
        *address, replica, plan.num_replicas, TIMEOUT_S, group=f"rank{rank}", member="replica"
    )
    stage = Stage(plan, worker, transport, replicas=replicas)
    stage.accumulate(batch)
    gradients = _pieces(stage, {key: g.clone() for key, g in stage.gradients().items()})
    for parameter in stage.parameters().values():
        parameter.clear_gradient()
    stage.take_loss()
    stage.join(transport, replicas)  # which forgets what was begun
    result = stage.train_step(batch, 0.7, 0.5)
    values = {key: parameter.value for key, parameter in stage.parameters().items()}
    # As numbers, since shared tensors would die with this process.
    channel.send((result, _numbers(gradients), _numbers(_pieces(stage, values))))
    transport.close()
    replicas.close()


def _pieces(stage: Stage, tensors: dict[str, Tensor]) -> Pieces:
    return [(stage.parameters()[key].rows, tensor) for key, tensor in tensors.items()]


def _numbers(pieces: Pieces) -> list[tuple[ParameterRows, Any]]:
    return [(rows, tensor.tolist()) for rows, tensor in pieces]


def _whole(ranks: list[list[tuple[ParameterRows, Any]]]) -> dict[str, Tensor]:
    wholes: dict[str, Tensor] = {}
    for rows, numbers in (piece for rank in ranks for piece in rank):
        whole = wholes.setdefault(rows.name, torch.empty(rows.shape, dtype=torch.float64))
        whole[rows.start : rows.stop] = torch.tensor(numbers, dtype=torch.float64)
    return wholes


@pytest.mark.parametrize(
    ("layout", "num_layers", "cuts", "num_replicas", "shared_memory"),
    [
        ((2, 1), 3, (3, 4), 1, False),
        ((2, 1), 3, (3, 4), 1, True),
        ((4, 4), 4, (2, 3), 1, True),
        ((1, 1), 2, (2, 3), 2, True),
    ],
    ids=str,
)
def test_processes_make_the_oracles_step(
    layout: tuple[int, int],
    num_layers: int,
    cuts: tuple[int, int],
    num_replicas: int,
    shared_memory: bool,
) -> None:
    model = small_model(num_layers=num_layers, hidden_size=8)
    plan = small_plan(
        layout,
        model=model,
        num_microbatches=cuts[0],
        num_chunks=cuts[1],
        num_replicas=num_replicas,
    )
    batch = random_batch(5)
    store = StoreServer(timeout_s=TIMEOUT_S)
    # A fork of a process that has torch already: it takes seconds to import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    channels, processes = [], []
    for worker in range(plan.num_workers):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=run_rank,
            args=(theirs, plan, worker, (store.host, store.port), batch, shared_memory),
        )
        process.start()
        theirs.close()
        channels.append(mine)
        processes.append(process)
    answers = [channel.recv() for channel in channels]
    for process in processes:
        process.join(TIMEOUT_S)
    store.close()

    expected = oracle_step(plan, batch, 0.7, 0.5)
    results: list[StageResult] = [answer[0] for answer in answers]
    assert sum(result.loss.total for result in results) == pytest.approx(
        expected.loss_sum, rel=1e-10
    )
    assert len({result.gradient_norm for result in results}) == 1
    assert results[0].gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-10)
    assert all(result.bytes_sent > 0 for result in results)
    replicas = [
        answers[first : first + plan.num_ranks]
        for first in range(0, plan.num_workers, plan.num_ranks)
    ]
    shares = [_whole([answer[1] for answer in replica]) for replica in replicas]
    gradients = {
        name: sum((share[name] for share in shares), torch.zeros(())) for name in shares[0]
    }
    updated = [_whole([answer[2] for answer in replica]) for replica in replicas]
    assert_tensors_close(gradients, expected.gradients, tolerance=1e-10)
    assert_tensors_close(updated[0], expected.updated, tolerance=1e-10)
    for other in updated[1:]:
        assert_tensors_equal(other, updated[0])
    assert [process.exitcode for process in processes] == [0] * plan.num_workers
