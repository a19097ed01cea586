"""Schedules as files: the order of a training step with the placement and the cuts it is for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.network import ModelConfig
from pipeline.graph import Graph, Kind, Operation, build_graph
from pipeline.json_file import read_json, write_json
from pipeline.placements.placement import Placement
from pipeline.schedules.schedule import Schedule, ScheduleError, validate

KIND, VERSION = "schedule", 1
_KINDS: dict[str, Kind] = {"F": "F", "I": "I", "W": "W"}


@dataclass(frozen=True)
class SavedSchedule:
    """A schedule of a training step with all that it takes to build its graph for a model.

    `policy` says in words what made it.
    """

    schedule: Schedule
    placement: Placement
    num_microbatches: int
    num_chunks: int
    policy: str = ""

    def graph(self, model: ModelConfig) -> Graph:
        """Build the graph for a model, and check that the schedule runs it.

        Raises PlacementError or ScheduleError.
        """
        self.placement.check(model)
        blocks = self.placement.blocks(model)
        graph = build_graph(blocks, self.num_microbatches, self.num_chunks, training=True)
        validate(self.schedule, graph, self.placement)
        return graph


def save_schedule(path: Path, saved: SavedSchedule) -> None:
    """Write a schedule file, whole or not at all."""
    placement = saved.placement
    content = {
        "policy": saved.policy,
        "microbatches": saved.num_microbatches,
        "time_chunks": saved.num_chunks,
        "placement": {
            "name": placement.name,
            "num_ranks": placement.num_ranks,
            "rank_of": dict(placement.rank_of),
            "shards": [list(words) for words in placement.shards],
            "recomputes_logits": placement.recomputes_logits,
        },
        "ranks": [[" ".join(map(str, op)) for op in rank] for rank in saved.schedule.operations],
    }
    write_json(path, KIND, VERSION, content)


def load_schedule(path: Path) -> SavedSchedule:
    """Read a schedule file; raises ScheduleError. `SavedSchedule.graph` checks it for a model."""
    content = read_json(path, KIND, VERSION, ScheduleError)
    try:
        return _saved(content)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ScheduleError(
            f"{path} is damaged ({type(problem).__name__}: {problem}); write it again"
        ) from None


def _saved(content: dict[str, Any]) -> SavedSchedule:
    described = content["placement"]
    placement = Placement(
        str(described["name"]),
        int(described["num_ranks"]),
        {str(block): int(rank) for block, rank in described["rank_of"].items()},
        tuple((int(start), int(stop)) for start, stop in described["shards"]),
        bool(described.get("recomputes_logits", False)),
    )
    ranks = tuple(tuple(map(_operation, rank)) for rank in content["ranks"])
    cuts = int(content["microbatches"]), int(content["time_chunks"])
    if min(cuts) < 1:
        raise ValueError(f"microbatches and time_chunks are {cuts}")
    return SavedSchedule(Schedule(ranks), placement, *cuts, str(content["policy"]))


def _operation(text: str) -> Operation:
    kind, block, microbatch, chunk = text.split(" ")
    return Operation(_KINDS[kind], block, int(microbatch), int(chunk))
