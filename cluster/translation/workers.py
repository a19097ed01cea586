"""Parts of an input file spread over Ray Data workers: actors that each hold the model.

Ray starts a worker that died again and gives it its part once more. A part travels as a few numbers
and its translations come back as text; files are written by the one process that leads.
"""

import json
import warnings
from collections.abc import Iterator, Sequence

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import GetTimeoutError, RayActorError

from cluster.cores import num_usable_cores
from cluster.ingest.data_streams import stream_settings, tables
from cluster.resources import ClusterError
from cluster.translation.part_translator import PartTranslator, TranslationJob
from cluster.translation.parts import Part
from model.process_memory import keep_freed_memory

MAX_RESTARTS = 3
"""How often one worker may die: one that dies again and again has too little memory, say."""
START_TIMEOUT_S = 300
"""For all workers to start; Ray by itself would wait for ever where there is no room for them."""


def threads_per_worker(num_workers: int) -> int:
    """Return the most cores that every worker can have on the nodes of the cluster, at least one.

    A worker is on one node.
    """
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    cores = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    if len(cores) == 1:
        # Of its one node, Ray may have been told more than there is, so that all tasks can start.
        cores = [min(cores[0], num_usable_cores())]
    return most_threads(cores, num_workers)


def most_threads(cores: Sequence[int], num_workers: int) -> int:
    """Return how many cores each of some workers can have on nodes with so many, at least one."""
    return next(
        (
            threads
            for threads in range(max(cores, default=1), 1, -1)
            if sum(of_node // threads for of_node in cores) >= num_workers
        ),
        1,
    )


def translated_parts(
    job: TranslationJob, parts: Sequence[Part], *, num_workers: int, num_threads: int
) -> Iterator[tuple[int, dict[int, str]]]:
    """Yield the number of each part, as they come, with what to write for each of its lines.

    Input and checkpoint must be readable under their paths on every node. Raises
    ClusterError when there are fewer GPUs than workers, when the workers cannot all start in
    `START_TIMEOUT_S`, or when one dies again and again, and the UserError that a worker raised.
    """
    num_gpus = int(job.device == "cuda")
    _check_gpus(num_workers * num_gpus)
    # A part that takes long, or whose worker dies, must not hold up what others have finished.
    with stream_settings(in_order=False):
        ray.data.DataContext.get_current().wait_for_min_actors_s = START_TIMEOUT_S
        results = _results(job, parts, num_workers, num_threads, num_gpus)
        try:
            for table in tables(results, prefetch=0):
                for row in table.to_pylist():
                    yield row["part"], dict(json.loads(row["lines"]))
        except GetTimeoutError:
            raise ClusterError(
                f"{num_workers} workers of {num_threads} thread(s) did not all start in "
                f"{START_TIMEOUT_S} s; the cluster is busy or too small: use fewer --workers"
            ) from None
        except RayActorError as error:
            raise ClusterError(
                f"a worker died {MAX_RESTARTS + 1} times, often a sign of too little memory; "
                "what is finished is kept: repeat the command with fewer --workers"
            ) from error


def _results(
    job: TranslationJob, parts: Sequence[Part], num_workers: int, num_threads: int, num_gpus: int
) -> "ray.data.Dataset":
    items = ray.data.from_items(
        [{"part": part.to_text()} for part in parts], override_num_blocks=len(parts)
    )
    with warnings.catch_warnings():
        # Ray means to take these two settings away, and has no others for what they bound.
        warnings.simplefilter("ignore", DeprecationWarning)
        return items.map_batches(
            _Worker,
            fn_constructor_args=(job, num_threads),
            # One part at a time: none waits for a worker that is busy, or dead, with another.
            compute=ray.data.ActorPoolStrategy(
                size=min(num_workers, len(parts)), max_tasks_in_flight_per_actor=1
            ),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=num_threads,
            num_gpus=num_gpus,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )


class _Worker:
    """A worker's process: it loads the model once, with the first part.

    An error of the first part reaches the user as it is; one of a worker's start would not.
    """

    def __init__(self, job: TranslationJob, num_threads: int) -> None:
        keep_freed_memory()
        self._job, self._num_threads = job, num_threads
        self._translator: PartTranslator | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Translate the parts of a table."""
        if self._translator is None:
            self._translator = PartTranslator(self._job, self._num_threads)
        parts = [Part.from_text(text) for text in batch["part"].to_pylist()]
        lines = [self._translator.translate(part) for part in parts]
        return pa.table(
            {
                "part": [part.number for part in parts],
                "lines": [json.dumps(list(found.items())) for found in lines],
            }
        )


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def _check_gpus(needed: int) -> None:
    has = _resources().get("GPU", 0)
    if needed > has:
        raise ClusterError(
            f"{needed} workers on GPUs need as many GPUs and the Ray cluster has {has:g}; use "
            "fewer --workers, or --device cpu"
        )
