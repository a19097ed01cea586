"""A text file cut into parts: which lines are translated together, as a pure function of the file.

Windows of consecutive lines are sorted by length and cut, so that the sentences of a part take
about as long as each other. A part is a few numbers; whoever has them finds its lines himself, on
any machine that reads the file.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.translation.lines import InputError, decoded_line

WINDOW_LINES = 16_384
PART_LINES = 256


@dataclass(frozen=True)
class Part:
    """Part `number` of a file, the `index`-th of its window.

    The window is `window_bytes` long and starts at byte `window_start` with line `first_line`,
    which counts from 0; the part has `num_lines` of its lines.
    """

    number: int
    window: int
    window_start: int
    window_bytes: int
    first_line: int
    index: int
    num_lines: int

    def to_text(self) -> str:
        """Return it as text that `from_text` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Part":
        """Return the part that `to_text` wrote."""
        return cls(**json.loads(text))

    def lines(self, path: Path) -> list[tuple[int, str]]:
        """Read its lines with their numbers, from 0 on; the longest come first."""
        with path.open("rb") as file:
            file.seek(self.window_start)
            lines = _split(file.read(self.window_bytes))
        order = sorted(range(len(lines)), key=lambda index: -len(lines[index]))
        first = self.index * PART_LINES
        numbers = [self.first_line + index for index in order[first : first + PART_LINES]]
        return [
            (number, decoded_line(lines[number - self.first_line], number + 1, str(path)))
            for number in numbers
        ]


@dataclass(frozen=True)
class InputParts:
    """All parts of a file, in the order of their numbers, and the SHA-256 of its contents."""

    path: Path
    num_lines: int
    sha256: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, path: Path) -> "InputParts":
        """Read a file once, and cut it; InputError for a line that is not UTF-8."""
        digest, parts, num_lines = hashlib.sha256(), list[Part](), 0
        start = 0
        for window, lines in enumerate(_windows(path)):
            for number, line in enumerate(lines, start=num_lines + 1):
                decoded_line(line, number, str(path))
                digest.update(line)
            num_bytes = sum(map(len, lines))
            for index, first in enumerate(range(0, len(lines), PART_LINES)):
                count = min(PART_LINES, len(lines) - first)
                place = (window, start, num_bytes, num_lines, index)
                parts.append(Part(len(parts), *place, count))
            num_lines += len(lines)
            start += num_bytes
        return cls(path, num_lines, digest.hexdigest(), tuple(parts))

    def windows(self) -> Iterator[list[Part]]:
        """Yield the parts of each window."""
        window: list[Part] = []
        for part in self.parts:
            if window and part.window != window[0].window:
                yield window
                window = []
            window.append(part)
        if window:
            yield window


def _windows(path: Path) -> Iterator[list[bytes]]:
    try:
        with path.open("rb") as file:
            lines: list[bytes] = []
            for line in file:
                lines.append(line)
                if len(lines) == WINDOW_LINES:
                    yield lines
                    lines = []
            if lines:
                yield lines
    except OSError as error:
        raise InputError(f"--input {path}: {error.strerror}; give a text file or -") from None


def _split(data: bytes) -> list[bytes]:
    """Cut behind every line feed, as a file's iterator does."""
    lines = data.split(b"\n")
    ended, last = [line + b"\n" for line in lines[:-1]], lines[-1]
    return [*ended, last] if last else ended
