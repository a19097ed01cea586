"""What a command prints on stdout: a text for people, or one JSON object for scripts.

Stdout belongs to the result alone. Libraries that print while a command works (Ray forwards the
output of its workers) are sent to stderr, so that the last line of stdout is the JSON object.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO


@contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """Give the real stdout, while everything printed in the block goes to stderr."""
    real = sys.stdout
    with redirect_stdout(sys.stderr):
        yield real


def print_result(
    stream: TextIO, *, as_json: bool, result: Mapping[str, Any], lines: Iterable[str]
) -> None:
    """Write the JSON object on one line if `as_json`, else the lines."""
    texts = [json_line(result)] if as_json else lines
    for text in texts:
        stream.write(text + "\n")
    stream.flush()


def json_line(result: Mapping[str, Any]) -> str:
    """Give one line of strict JSON; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(result), ensure_ascii=False, allow_nan=False, default=str)


def table(rows: Sequence[tuple[str, object]], indent: str = "  ") -> list[str]:
    """Lay out names and values in two columns; whole numbers get thousands separators."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{indent}{name:<{width}}  {_shown(value)}" for name, value in rows]


def sample_lines(samples: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Lay out translations beside their references."""
    for number, sample in enumerate(samples, start=1):
        yield f"{number:>3}. source       {sample['source']}"
        yield f"     translation  {sample['hypothesis']}"
        yield f"     reference    {sample['reference']}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
