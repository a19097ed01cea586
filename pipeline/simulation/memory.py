"""What a rank holds while it runs its part of a schedule: parameters, and tensors until last use.

A tensor that is both a value between operations and saved for a gradient counts once. Not counted
is what lives only inside an operation. A sent tensor is kept to the end of the step, as the
transports do.

Shapes: K positions of a chunk, B sentences, E embedding numbers, H cells, V words of a shard.
"""

from collections.abc import Sequence

from model.network import BlockSpec, ModelConfig
from model.precision import Precision
from pipeline.costs.operation_costs import Costs, WorkSizes
from pipeline.graph import Graph, Operation
from pipeline.placements.placement import Placement
from pipeline.schedules.schedule import Schedule, ScheduleError

# A value by the number of the operation that makes it, and the port.
Made = tuple[int, str]
_INDEX_BYTES = 8


def check_memory(
    peaks: Sequence[int], graph: Graph, placement: Placement, costs: Costs, limit_bytes: int
) -> None:
    """Raise ScheduleError if a rank would hold more than the limit; `peaks` has what each holds."""
    rank = max(range(len(peaks)), key=lambda rank: peaks[rank])
    if peaks[rank] > limit_bytes:
        owned = [spec for spec in graph.blocks if placement.rank_of[spec.name] == rank]
        kept = sum(parameter_bytes(spec, costs.model, Precision(costs.precision)) for spec in owned)
        keeps_logits = not placement.is_whole and any(
            spec.kind == "softmax" and not spec.recomputes for spec in owned
        )
        recompute = "pipeline.recompute_logits=true, " if keeps_logits else ""
        raise ScheduleError(
            f"rank {rank} would hold {peaks[rank]:,} bytes, {kept:,} of them parameters and their "
            f"gradients, and the limit is {limit_bytes:,}; use more ranks, a smaller batch, "
            f"{recompute}or a policy that keeps less, such as 1f1b"
        )


def peak_memory_bytes(
    schedule: Schedule, graph: Graph, placement: Placement, costs: Costs
) -> tuple[int, ...]:
    """Return the most that each rank holds at a time, if it runs its list in order."""
    sizes = WorkSizes(graph, costs.model, costs.batch, costs.precision)
    precision = Precision(costs.precision)
    held = [0] * placement.num_ranks
    for spec in graph.blocks:
        held[placement.rank_of[spec.name]] += parameter_bytes(spec, costs.model, precision)
    ranks = [placement.rank_of[operation.block] for operation in graph.operations]
    away = _values_that_leave(graph, ranks)
    number = graph.numbered.number
    alone = placement.num_ranks == 1
    return tuple(
        parameters
        + _RankMemory(graph, sizes, costs.model, precision, away[rank], alone).peak(
            [number[operation] for operation in schedule.operations[rank]]
        )
        for rank, parameters in enumerate(held)
    )


def parameter_bytes(spec: BlockSpec, config: ModelConfig, precision: Precision) -> int:
    """Return the bytes of a block's parameters, their copy to compute with, and their gradients.

    The gradients of embeddings are few rows and are not counted.
    """
    each = precision.state.itemsize
    if precision.compute != precision.state:
        each += precision.compute.itemsize
    if spec.kind != "embedding":
        each += precision.state.itemsize
    return each * num_parameters(spec, config)


def num_parameters(spec: BlockSpec, config: ModelConfig) -> int:
    """Count the numbers that a block learns, biases and peepholes among them."""
    cells = config.hidden_size
    match spec.kind:
        case "embedding":
            source, target = config.source_vocabulary_size, config.target_vocabulary_size
            return (source if spec.side == "source" else target) * config.embedding_size
        case "projection":
            return 4 * cells * ((config.embedding_size if spec.layer == 0 else cells) + 1)
        case "recurrence":
            return cells * (4 * cells + (3 if config.peepholes else 0))
        case "softmax":
            return (spec.words[1] - spec.words[0]) * (cells + 1)
        case "loss":
            return 0


def _values_that_leave(graph: Graph, ranks: list[int]) -> dict[int, set[Made]]:
    """Return, by rank, the values that other ranks take from it."""
    away: dict[int, set[Made]] = {rank: set() for rank in sorted(set(ranks))}
    for rank, taken in zip(ranks, graph.numbered.takes, strict=True):
        for made in taken:
            if ranks[made[0]] != rank:
                away[ranks[made[0]]].add(made)
    return away


class _RankMemory:
    """A rank's values with the number of reasons to keep each, and what blocks saved besides."""

    def __init__(
        self,
        graph: Graph,
        sizes: WorkSizes,
        config: ModelConfig,
        precision: Precision,
        away: set[Made],
        alone: bool,
    ) -> None:
        self._alone = alone
        self._all_words = (0, config.target_vocabulary_size)
        self._graph, self._sizes, self._config, self._precision = graph, sizes, config, precision
        self._operations, self._takes = graph.numbered.operations, graph.numbered.takes
        self._away = away
        self._reasons: dict[Made, int] = {}
        self._bytes: dict[Made, int] = {}
        self._saved: dict[tuple[str, int, int], tuple[int, list[Made]]] = {}
        self._here: set[int] = set()
        self._held = 0

    def peak(self, order: list[int]) -> int:
        for index in order:
            for made in self._takes[index]:
                self._reasons[made] = self._reasons.get(made, 0) + 1
        for made in self._away:
            # Never taken back: sent tensors stay to the end of the step.
            self._reasons[made] = self._reasons.get(made, 0) + 1
        self._here, outputs = set(order), dict[int, list[Made]]()
        for made in self._reasons:
            if made[0] in self._here:
                outputs.setdefault(made[0], []).append(made)
        return max((self._run(index, outputs.get(index, [])) for index in order), default=0)

    def _run(self, index: int, outputs: list[Made]) -> int:
        for made in self._takes[index]:
            if made not in self._bytes:
                self._hold(made)
        for made in outputs:
            self._hold(made)
        if self._graph.training:
            self._save(self._operations[index], self._takes[index])
        highest = self._held
        for made in self._takes[index]:
            self._let_go(made)
        return highest

    def _hold(self, made: Made) -> None:
        """Count a value from now on; one that lies in what a recurrence here saves is in that."""
        operation, port = self._operations[made[0]], made[1]
        view = made[0] in self._here and self._is_view(operation, port)
        num_bytes = 0 if view else self._sizes.value_bytes(operation, port)
        self._bytes[made] = num_bytes
        self._held += num_bytes

    def _let_go(self, made: Made) -> None:
        self._reasons[made] -= 1
        if not self._reasons[made]:
            self._held -= self._bytes.pop(made)

    def _is_view(self, operation: Operation, port: str) -> bool:
        if not self._graph.training or not operation.block.endswith(".recurrence"):
            return False
        return operation.kind == "F" or port == "gates"

    def _save(self, operation: Operation, taken: tuple[Made, ...]) -> None:
        """Add what the block keeps of an operation; W lets go of all of it."""
        key = operation[1:]
        if operation.kind == "W":
            num_bytes, values = self._saved.pop(key)
            self._held -= num_bytes
            for value in values:
                self._let_go(value)
            return
        spec = self._graph.spec_of[operation.block]
        kept = self._kept(operation, spec, taken)
        for value in kept:
            self._reasons[value] += 1
        num_bytes = self._saved_bytes(operation, spec)
        before = self._saved.get(key, (0, []))
        self._saved[key] = before[0] + num_bytes, [*before[1], *kept]
        self._held += num_bytes

    def _kept(
        self, operation: Operation, spec: BlockSpec, taken: tuple[Made, ...]
    ) -> tuple[Made, ...]:
        """Return the inputs that the block saves as they are."""
        forward_inputs = spec.kind in ("projection", "softmax") and operation.kind == "F"
        gradients = spec.kind in ("projection", "embedding") and operation.kind == "I"
        return taken if forward_inputs or gradients else ()

    def _saved_bytes(self, operation: Operation, spec: BlockSpec) -> int:
        """Return the bytes of the tensors that the block makes for itself."""
        _, num_sentences, num_tokens = self._sizes.chunk(operation)
        state, compute = self._precision.state.itemsize, self._precision.compute.itemsize
        cells = self._config.hidden_size
        match spec.kind, operation.kind:
            case "softmax", "F" if self._alone and spec.words == self._all_words:
                return num_tokens * cells * compute
            case "softmax", "F":
                num_words = spec.words[1] - spec.words[0]
                kept = 0 if spec.recomputes else num_words * compute
                return num_tokens * (kept + 2 * state + _INDEX_BYTES)
            case "recurrence", "F":
                with_carry = (num_tokens + num_sentences) * cells
                return 4 * cells * num_tokens * state + with_carry * (state + compute)
            case "recurrence", "I":
                # The gradient takes the place of the gates.
                return 4 * cells * num_tokens * (compute - state)
        return 0
