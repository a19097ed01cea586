"""A layout to train with, what the simulator says of it, and the choice among several."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.placements.placement import Placement, PlacementError
from pipeline.schedules.schedule import Schedule
from pipeline.simulation.simulator import Simulation

DATA_PARALLEL = "data_parallel"


@dataclass(frozen=True)
class Candidate:
    """A placement, its replicas, and the fastest order that was found for them.

    `schedule` is that of one replica, and `simulation` has the number of replicas and the sums over
    them. `end_on_free_link_s` is when the last operation would end if messages took no time. `fits`
    says whether every device keeps to the memory bound.
    """

    placement: Placement
    policy: str
    num_microbatches: int
    num_chunks: int
    schedule: Schedule
    simulation: Simulation
    end_on_free_link_s: float
    fits: bool = True
    why: str = ""

    @property
    def name(self) -> str:
        """The placement's name; replicas of one device are called data parallelism."""
        alone = self.placement.num_ranks == 1 and self.num_replicas > 1
        return DATA_PARALLEL if alone else self.placement.name

    @property
    def num_replicas(self) -> int:
        """How often the whole model is there, each time for a share of the batch."""
        return self.simulation.num_replicas

    @property
    def num_devices(self) -> int:
        """Ranks of all replicas."""
        return self.simulation.num_devices

    @property
    def step_s(self) -> float:
        """The whole step, gradients summed."""
        return self.simulation.step_seconds

    @property
    def speedup(self) -> float:
        """How many times faster than one device with the whole batch."""
        return self.simulation.speedup

    @property
    def busy_fraction(self) -> float:
        """The part of all devices' time that goes into operations."""
        return 1.0 - self.simulation.bubble_fraction

    @property
    def peak_memory_bytes(self) -> int:
        """What the fullest device holds."""
        return max(self.simulation.peak_memory_bytes)

    @property
    def bytes_sent(self) -> int:
        """What all devices send in a step."""
        return self.simulation.all_bytes_sent

    def place(self) -> tuple[bool, float, int, int]:
        """Sort the fastest first, and what does not fit last; ties by what is simpler."""
        size = self.num_microbatches * self.num_chunks
        return not self.fits, rounded(self.step_s), self.placement.num_ranks, size


def rounded(seconds: float) -> float:
    """Drop the digits in which equal times differ that were added up in another order."""
    return float(f"{seconds:.9g}")


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """Return the first candidate that fits; raises PlacementError if there is none."""
    for candidate in candidates:
        if candidate.fits:
            return candidate
    if not candidates:
        raise PlacementError("no placement can be cut for so many devices; use fewer")
    least = min(candidate.peak_memory_bytes for candidate in candidates)
    raise PlacementError(
        f"no layout fits the memory bound: the smallest needs {least / 1e9:.2f} GB on its fullest "
        "device; use more devices, a smaller batch or a higher bound"
    )
