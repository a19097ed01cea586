"""Runs a turn in processes of its own, which end with it, so that contestants share no memory.

The environment is that of whoever is measured: as many threads as it is given, and for this project
the C library's memory settings with which its ranks start.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
_PATIENCE_S = 30.0
"""For a process that has said all to end; Ray takes some seconds to shut down."""
_TURN_TIMEOUT_S = 3600.0
"""For a turn, without a word of any process; the paper's model takes minutes a step."""


class ProcessError(Exception):
    """A process of a contestant failed or died; the text is the last line of what it said."""


@dataclass(frozen=True)
class Place:
    """Which process of how many this is, its threads, and the file where all of them meet."""

    index: int
    num_processes: int
    num_threads: int
    meeting_file: str

    def join_group(self) -> None:
        """Enter the default group of torch.distributed, over gloo."""
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.meeting_file}",
            rank=self.index,
            world_size=self.num_processes,
        )


@dataclass(frozen=True)
class _Work(Generic[Result]):
    """What a process is to do; it must be picklable."""

    function: Callable[..., Result]
    arguments: tuple[object, ...]


def run_processes(
    function: Callable[..., Result],
    *arguments: object,
    num_processes: int,
    num_threads: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[Result]:
    """Call `function(place, *arguments)` in new processes at once; return what each returned.

    They start with `environment` beside what this process has. Raises ProcessError with the first
    failure, after all have ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, _environment(num_threads, environment):
        work = _Work(function, arguments)
        started = []
        for index in range(num_processes):
            place = Place(index, num_processes, num_threads, str(Path(folder) / "meeting"))
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(sending, place, work))
            process.start()
            sending.close()
            started.append((process, receiving))
        try:
            results = _collected([receiving for _, receiving in started])
        except BaseException:
            for process, _ in started:
                process.terminate()
            raise
        finally:
            for process, _ in started:
                process.join(_PATIENCE_S)
                if process.is_alive():
                    process.kill()
                    process.join()
        return results


def _collected(connections: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        pending = {c: index for index, c in enumerate(connections) if index not in results}
        answered = wait(list(pending), _TURN_TIMEOUT_S)
        if not answered:
            waiting = ", ".join(map(str, pending.values()))
            raise ProcessError(f"process {waiting} said nothing for {_TURN_TIMEOUT_S:,.0f} s")
        for ready in answered:
            index = pending[ready]  # type: ignore[index]
            try:
                failed, result = connections[index].recv()
            except EOFError:
                raise ProcessError(f"process {index} died without a word") from None
            if failed:
                raise ProcessError(f"process {index}: {result}")
            results[index] = result
    return [results[index] for index in range(len(connections))]


def _run(sending: Connection, place: Place, work: _Work[Any]) -> None:
    torch.set_num_threads(place.num_threads)
    try:
        message = False, work.function(place, *work.arguments)
    except Exception as error:
        traceback.print_exc()
        message = True, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    sending.send(message)
    sending.close()


@contextmanager
def _environment(num_threads: int, more: Mapping[str, str]) -> Iterator[None]:
    """Set what spawned processes inherit; some of it is read before their first line runs."""
    given = {**more, "OMP_NUM_THREADS": str(num_threads)}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
