"""What a rank writes down of a step when it is asked to: small, and it travels to the driver.

Times are those of `time.perf_counter` on the rank. `pipeline.timeline.timeline` puts the ranks of a
step on one clock.
"""

from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.graph import Kind, Operation


class RecordedOperation(NamedTuple):
    """An operation as it ran; for `wait_s` before its start the rank waited for its inputs."""

    operation: Operation
    start_s: float
    end_s: float
    wait_s: float


@dataclass(frozen=True)
class RankRecord:
    """A rank's step: its operations in the order in which they ran, and what came after them.

    All ranks meet in the sum of the gradients' norms, from `meet_s` until `met_s`; the update of
    the parameters goes on until `end_s`. Nobody leaves the sum before everybody has entered it.
    """

    operations: tuple[RecordedOperation, ...]
    meet_s: float
    met_s: float
    end_s: float

    def __reduce__(self) -> tuple[Any, ...]:
        # Named tuples take several times as long to pickle as what is in them.
        operations = [tuple(op.operation) for op in self.operations]
        times_s = array("d", [time_s for op in self.operations for time_s in op[1:]])
        return _unpacked, (operations, times_s, self.meet_s, self.met_s, self.end_s)


def _unpacked(
    operations: list[tuple[Kind, str, int, int]], times_s: "array[float]", *ends_s: float
) -> RankRecord:
    times = zip(times_s[::3], times_s[1::3], times_s[2::3], strict=True)
    return RankRecord(
        tuple(
            RecordedOperation(Operation(*operation), *each)
            for operation, each in zip(operations, times, strict=True)
        ),
        *ends_s,
    )
