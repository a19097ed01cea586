"""Measures what operations and messages take here, and fits costs to it (see `operation_costs`).

Every family of blocks runs F, I and W on chunks of several sizes; the cost is the affine function
without negative terms that comes closest, in relative terms. Embeddings and vocabulary shards are
measured with fewer words than the model has, so that a large model can be measured on a small
machine; the cost of shards is fitted over two numbers of words.
"""

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.batching import Batch, Chunk, ChunkSize, make_batch
from model.block import Block, Tensors
from model.network import BlockSpec, ModelConfig, build_block
from model.precision import Precision
from pipeline.costs.operation_costs import (
    FAMILIES,
    KINDS,
    BatchShape,
    Costs,
    Family,
    Link,
    OperationCost,
)
from pipeline.graph import Kind
from pipeline.transports.shared_memory import connect_ranks
from pipeline.transports.torch_store import StoreServer
from pipeline.transports.transport import SumTransport

MOST_WORDS = 8192
MOST_POSITIONS = 8
_SMALL_BYTES, _LARGE_BYTES = 1024, 8 << 20
_FIRST_WORD = 2


@dataclass(frozen=True)
class Sample:
    """Seconds of an operation on a chunk of a block with V words."""

    size: ChunkSize
    num_words: int
    seconds: float


def measure_costs(
    model: ModelConfig,
    batch: BatchShape,
    *,
    precision: str = "float32",
    device: str = "cpu",
    num_repetitions: int = 5,
    link: Link | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Costs:
    """Measure all families of blocks with the thread settings of this process.

    `link` is what `measure_link` found; messages take no time without it.
    """
    operations: dict[tuple[Family, Kind], OperationCost] = {}
    for family in FAMILIES:
        tell(family)
        samples = _family_samples(family, model, batch, precision, device, num_repetitions)
        for kind, of_kind in samples.items():
            operations[family, kind] = fit(of_kind)
    origin = f"measured on {device} with {torch.get_num_threads()} thread(s), torch {_version()}"
    return Costs(model, batch, operations, link or Link(), precision, origin)


def fit(samples: Sequence[Sample]) -> OperationCost:
    """Return the affine cost that comes closest to the samples, with no negative term.

    All subsets of the terms are tried: there are at most four. Terms that the samples cannot tell
    apart, or that do not help, are left out.
    """
    words = len({sample.num_words for sample in samples}) > 1
    rows = torch.tensor([_terms(sample) for sample in samples], dtype=torch.float64)
    seconds = torch.tensor([sample.seconds for sample in samples], dtype=torch.float64)
    weighted = rows / seconds[:, None]
    best, least = [0.0] * 4, float("inf")
    for count in range(1, 5 if words else 4):
        for chosen in itertools.combinations(range(4 if words else 3), count):
            columns = weighted[:, chosen]
            found = torch.linalg.lstsq(columns, torch.ones_like(seconds)).solution
            error = float((columns @ found - 1.0).square().sum())
            # A term more must earn its place.
            if bool((found >= 0.0).all()) and error < 0.99 * least:
                least = error
                best = [0.0] * 4
                for index, value in zip(chosen, found.tolist(), strict=True):
                    best[index] = value
    return OperationCost(*best)


def measure_link(
    num_repetitions: int = 20, timeout_s: float = 60.0, *, shared_memory: bool = True
) -> Link:
    """Measure messages between this process and another one here, as ranks exchange them.

    Half of a round trip; the rate is that of what a large message takes longer than a small one.
    In shared memory a message is copied once. Without `shared_memory` it goes through the network.
    """
    store = StoreServer("127.0.0.1", timeout_s)
    peer = multiprocessing.get_context("spawn").Process(
        target=_echo, args=(store.port, num_repetitions, timeout_s, shared_memory), daemon=True
    )
    peer.start()
    try:
        transport = _connect(store.port, 0, timeout_s, shared_memory)
        small_s, large_s = (
            statistics.median(
                _round_trip(transport, size, index) for index in range(num_repetitions)
            )
            / 2
            for size in (_SMALL_BYTES, _LARGE_BYTES)
        )
        _end(transport)
    finally:
        peer.join(timeout_s)
        store.close()
    transfer_s = max(large_s - small_s, 1e-9)
    return Link(latency_s=small_s, bytes_per_s=(_LARGE_BYTES - _SMALL_BYTES) / transfer_s)


def full_batch(shape: BatchShape, num_words: int = _FIRST_WORD + 1) -> Batch:
    """Return a batch without padding, whose words are all different as far as they can be."""
    words = itertools.cycle(range(_FIRST_WORD, max(num_words, _FIRST_WORD + 1)))

    def sentence(num_positions: int) -> list[int]:
        return list(itertools.islice(words, num_positions - 1))

    return make_batch(
        [
            (sentence(shape.source_positions), sentence(shape.target_positions))
            for _ in range(shape.num_sentences)
        ]
    )


def _family_samples(
    family: Family,
    model: ModelConfig,
    batch: BatchShape,
    precision: str,
    device: str,
    num_repetitions: int,
) -> dict[Kind, list[Sample]]:
    kinds: tuple[Kind, ...] = ("F",) if family == "loss" else KINDS
    samples: dict[Kind, list[Sample]] = {kind: [] for kind in kinds}
    most = min(model.target_vocabulary_size, MOST_WORDS)
    for num_words in sorted({max(1, most // 4), most}) if family == "softmax" else [most]:
        bench = _BlockBench(family, model, num_words, Precision(precision), device)
        for size in _sizes(batch):
            for kind, seconds in bench.seconds(size, num_repetitions).items():
                if kind in samples:
                    in_shard = num_words if family == "softmax" else 0
                    samples[kind].append(Sample(size, in_shard, seconds))
    return samples


def _sizes(batch: BatchShape) -> list[ChunkSize]:
    """Return the sizes to measure."""
    most = max(1, min(batch.source_positions, batch.target_positions, MOST_POSITIONS))
    positions = sorted({1, max(1, most // 2), most})
    sentences = sorted({max(1, batch.num_sentences // 4), batch.num_sentences})
    return [ChunkSize.full(*size) for size in itertools.product(positions, sentences)]


class _BlockBench:
    """A block of a family, with as few words as it needs, and its inputs."""

    def __init__(
        self, family: Family, model: ModelConfig, num_words: int, precision: Precision, device: str
    ) -> None:
        self._family, self._device, self._precision = family, device, precision
        self._model = replace(
            model,
            source_vocabulary_size=min(model.source_vocabulary_size, num_words),
            target_vocabulary_size=num_words,
            num_layers=max(2, model.num_layers),
        )
        self._block: Block[Any] = build_block(
            _spec(family, num_words), self._model, precision=precision, device=device
        )

    def seconds(self, size: ChunkSize, count: int) -> dict[Kind, float]:
        """Return the medians of F, I and W over `count` times, after one to warm up."""
        shape = BatchShape(size.num_sentences, size.num_positions, size.num_positions)
        chunk = full_batch(shape, self._model.target_vocabulary_size).target_chunk(
            0, size.num_positions, self._device
        )
        inputs, gradients = self._tensors(chunk)
        runs = [self._once(chunk, inputs, gradients) for _ in range(count + 1)][1:]
        return {kind: statistics.median(run[kind] for run in runs) for kind in runs[0]}

    def _once(self, chunk: Chunk, inputs: Tensors, gradients: Tensors) -> dict[Kind, float]:
        taken: dict[Kind, float] = {}
        start = self._now()
        _, saved = self._block.forward(chunk, inputs)
        taken["F"] = self._now() - start
        if self._family == "loss":
            return taken
        start = self._now()
        self._block.input_gradient(saved, gradients)
        taken["I"] = self._now() - start
        start = self._now()
        self._block.weight_gradient(saved)
        taken["W"] = self._now() - start
        return taken

    def _now(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _tensors(self, chunk: Chunk) -> tuple[Tensors, Tensors]:
        """Return what arrives at F and at I."""
        _, num_sentences, num_tokens = chunk.size
        cells, embedded = self._model.hidden_size, self._model.embedding_size
        outputs, gates = self._random(num_tokens, cells), self._random(num_tokens, 4 * cells)
        match self._family:
            case "embedding":
                return {}, {"output": self._random(num_tokens, embedded)}
            case "first_projection":
                return {"input": self._random(num_tokens, embedded)}, {"gates": gates}
            case "projection":
                return {"input": outputs}, {"gates": gates}
            case "recurrence":
                carry = {
                    "hidden": self._random(num_sentences, cells),
                    "cell": self._state(num_sentences, cells),
                }
                back = {port: self._state(num_sentences, cells) for port in carry}
                return {"gates": gates, **carry}, {"output": outputs, **back}
            case "softmax":
                return {"input": outputs}, {"log_normalizer": self._state(num_tokens) + 10.0}
            case "loss":
                return {"statistics.0": self._state(3, num_tokens) + 1.0}, {}

    def _random(self, *shape: int) -> Tensor:
        return self._state(*shape).to(self._precision.compute)

    def _state(self, *shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.1
        return drawn.to(device=self._device, dtype=self._precision.state)


def _spec(family: Family, num_words: int) -> BlockSpec:
    match family:
        case "embedding":
            return BlockSpec("target_embedding", "embedding", "target")
        case "first_projection":
            return BlockSpec("decoder.0.projection", "projection", "target")
        case "projection" | "recurrence":
            # Layer 1, since layer 0 reads embeddings.
            return BlockSpec(f"decoder.1.{family}", family, "target", 1)
        case "softmax":
            return BlockSpec("softmax.0", "softmax", "target", 0, (0, num_words))
        case "loss":
            return BlockSpec("loss", "loss", "target")


def _terms(sample: Sample) -> list[float]:
    tokens = float(sample.size.num_tokens)
    return [1.0, float(sample.size.num_positions), tokens, tokens * sample.num_words]


def _connect(port: int, rank: int, timeout_s: float, shared_memory: bool) -> SumTransport:
    return connect_ranks(
        "127.0.0.1", port, rank, 2, timeout_s, group="link", shared_memory=shared_memory
    )


def _end(transport: SumTransport) -> None:
    """Leave when both have read everything, so that neither writes to one that is gone."""
    transport.all_reduce_sum(torch.zeros(1))
    transport.close()


def _round_trip(transport: SumTransport, num_bytes: int, index: int) -> float:
    message = torch.zeros(num_bytes // 4)
    pending = transport.receive((num_bytes // 4,), torch.float32, 1, index)
    start = time.perf_counter()
    transport.send(message, 1, index)
    pending.wait()
    seconds = time.perf_counter() - start
    transport.flush()
    return seconds


def _echo(port: int, num_repetitions: int, timeout_s: float, shared_memory: bool) -> None:
    transport = _connect(port, 1, timeout_s, shared_memory)
    for size in (_SMALL_BYTES, _LARGE_BYTES):
        for index in range(num_repetitions):
            message = transport.receive((size // 4,), torch.float32, 0, index).wait()
            transport.send(message, 0, index)
            transport.flush()
    _end(transport)


def _version() -> str:
    return str(torch.__version__)
