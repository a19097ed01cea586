"""The spool: a local file that holds every point of a run, and how much of it was sent.

It is the truth about a run, whatever becomes of the tracking store, and the queue between the
training and the thread that sends (`cluster.tracking.metric_writer`).
"""

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_POINTS_PER_BATCH = 1000
"""The most metrics that one MLflow request may carry."""
MAX_POINTS_IN_MEMORY = 10_000


@dataclass(frozen=True)
class Point:
    """One value of one metric; `step` is None for a final score, which belongs to no step."""

    key: str
    value: float
    timestamp_ms: int
    step: int | None = None

    def to_json(self) -> str:
        """One line of the spool; a value that JSON cannot hold is written as its name."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        record = {"key": self.key, "value": value, "time_ms": self.timestamp_ms, "step": self.step}
        return json.dumps(record)

    @staticmethod
    def from_json(line: bytes) -> "Point | None":
        """Read a line of the spool; None if it is no point (a header, or torn by a crash)."""
        try:
            record = json.loads(line)
            return Point(
                str(record["key"]), float(record["value"]), int(record["time_ms"]), record["step"]
            )
        except (ValueError, KeyError, TypeError):
            return None


class Spool:
    """A JSONL file of points with a remembered offset up to which a run's points were sent.

    The offset lies in a second file, `<spool>.sent`. Points of other runs in the same file are
    never sent to this run. When the disk cannot take a point it is kept in bounded memory.
    """

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self._run_id = run_id
        self._offset_path = path.with_name(path.name + ".sent")
        self._lock = threading.Lock()
        self._memory: deque[Point] = deque(maxlen=MAX_POINTS_IN_MEMORY)
        self._warned = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._end_torn_line()
        # Kept at once: after a crash the file's end would no longer tell where this run began.
        self.commit(self._load_offset())
        header = {"run_id": run_id, "time_ms": int(time.time() * 1000)}
        self._write(json.dumps(header) + "\n")

    def append(self, points: Sequence[Point]) -> None:
        """Write points; never raises, for a full disk must not stop a training."""
        if not self._write("".join(point.to_json() + "\n" for point in points)):
            self._memory.extend(points)

    def read(self) -> tuple[list[Point], int]:
        """Return the next points not yet sent and the offset at which they end."""
        points: list[Point] = []
        end = self._offset
        with self.path.open("rb") as file:
            file.seek(end)
            # A line without its end is still being written.
            while len(points) < MAX_POINTS_PER_BATCH and (line := file.readline()).endswith(b"\n"):
                end = file.tell()
                if (point := Point.from_json(line)) is not None:
                    points.append(point)
        return points, end

    def commit(self, offset: int) -> None:
        """Remember that everything before `offset` needs no sending any more."""
        self._offset = offset
        record = {"run_id": self._run_id, "offset": offset}
        try:
            self._offset_path.write_text(json.dumps(record), encoding="utf-8")
        except OSError as error:
            # Only costs sending some points again after a resume.
            self._warn(error)

    def take_memory(self) -> list[Point]:
        """Take the points that the disk refused, oldest first."""
        num_taken = min(len(self._memory), MAX_POINTS_PER_BATCH)
        return [self._memory.popleft() for _ in range(num_taken)]

    def give_back(self, points: Sequence[Point]) -> None:
        """Put points taken from memory back in front."""
        self._memory.extendleft(reversed(points))

    def num_unsent(self) -> int:
        """Count the points that were written and not sent."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            return len(self._memory) + sum(Point.from_json(line) is not None for line in file)

    def close(self) -> None:
        """Close the file; later points are kept nowhere."""
        with self._lock:
            self._file.close()

    def _write(self, text: str) -> bool:
        try:
            with self._lock:
                self._file.write(text.encode("utf-8"))
                self._file.flush()
        except (OSError, ValueError) as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("metrics cannot be written to %s: %s", self.path, error)
        self._warned = True

    def _end_torn_line(self) -> None:
        """Make the next record start a line of its own, after a crash in the middle of one."""
        if self._file.tell() == 0:
            return
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            torn = file.read(1) != b"\n"
        if torn:
            self._write("\n")

    def _load_offset(self) -> int:
        """Where this run's unsent points begin: at the end, if the file was another run's."""
        end = self._file.tell()
        try:
            record = json.loads(self._offset_path.read_text(encoding="utf-8"))
            if record["run_id"] == self._run_id:
                return min(int(record["offset"]), end)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, OSError) as error:
            logger.warning(
                "%s cannot be read, old points are not sent: %s", self._offset_path, error
            )
        return end
