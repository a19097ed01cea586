"""Layouts: placements by name with ranks and replicas, and which there are for some devices."""

from typing import NamedTuple

SEARCHED = ("paper", "uneven", "separate", "split")


class Layout(NamedTuple):
    """A placement's name, the ranks of one replica, and the replicas."""

    name: str
    num_ranks: int
    num_replicas: int

    @property
    def num_devices(self) -> int:
        """Ranks of all replicas."""
        return self.num_ranks * self.num_replicas


ONE_DEVICE = Layout("single", 1, 1)


def pipelines(num_devices: int, num_sentences: int) -> list[Layout]:
    """Return every placement on all devices, with every number of replicas that divides them.

    More replicas than sentences would have nothing to do.
    """
    return [
        Layout(name, num_devices // num_replicas, num_replicas)
        for num_replicas in range(1, min(num_devices // 2, num_sentences) + 1)
        if num_devices % num_replicas == 0
        for name in SEARCHED
    ]


def data_parallel(num_devices: int, num_sentences: int, *, use_all: bool) -> list[Layout]:
    """Return replicas of one device: on all devices and, unless `use_all`, a half and so on."""
    counts = [num_devices] if use_all else _halves(num_devices)
    return [Layout("single", 1, num) for num in counts if 1 < num <= num_sentences]


def on_fewer(num_devices: int) -> list[Layout]:
    """Return pipelines without replicas on half of the devices, and on a quarter."""
    counts = [ranks for ranks in _halves(num_devices)[1:3] if ranks > 1]
    return [Layout(name, ranks, 1) for ranks in counts for name in SEARCHED]


def _halves(num_devices: int) -> list[int]:
    """Return the number of devices, its half and so on, down to one."""
    counts = [num_devices]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return counts
