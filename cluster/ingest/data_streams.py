"""How Ray Data is used here: streams of Arrow tables in a fixed order, in tasks of bounded size.

Ray Data reads, decodes and encodes in parallel and passes blocks on as they come; by default it
lets the order vary and prints as it goes. The settings here are those of one stream only: the
process's own `DataContext` stays as it is.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import DataContext, ExecutionResources
from ray.exceptions import RayTaskError

from model.errors import UserError

# A task's share of a processor. Together they are at most one, so that a machine with a single one
# can run a reader and what follows it; they differ, because Ray Data fuses stages of equal shares
# and one reader would then do all the work on its file.
READER_CPUS = 0.25
WORKER_CPUS = 0.75

# Small blocks let the tasks behind a single reader run in parallel and keep memory low.
_BLOCK_BYTES = 4 << 20


def stream(
    num_items: int,
    read: Callable[[int], Iterator[pa.Table]],
    *,
    cpus: float = READER_CPUS,
    concurrency: int | None = None,
) -> "ray.data.Dataset":
    """Return the tables that `read` yields for each item number, in order of the numbers.

    Items are read in parallel, at most `concurrency` at once, each with `cpus` of a processor.
    """

    def read_item(batch: pa.Table) -> Iterator[pa.Table]:
        for item in batch["item"].to_pylist():
            yield from read(item)

    if concurrency is not None:
        concurrency = min(concurrency, num_items)  # Ray warns of more
    items = ray.data.from_items(
        [{"item": item} for item in range(num_items)], override_num_blocks=num_items
    )
    return items.map_batches(
        read_item, batch_size=1, batch_format="pyarrow", num_cpus=cpus, concurrency=concurrency
    )


def tables(dataset: "ray.data.Dataset", prefetch: int = 2) -> Iterator[pa.Table]:
    """Yield a dataset's blocks in order as Arrow tables.

    A UserError that a task raised is raised again as itself.
    """
    try:
        yield from dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch
        )
    except Exception as error:
        cause = _user_error(error)
        if cause is None:
            raise
        raise cause from None


@contextmanager
def stream_settings(max_bytes_ahead: int | None = None, *, in_order: bool = True) -> Iterator[None]:
    """Build datasets in here: their order is fixed, their blocks are small, they print nothing.

    Without `in_order`, blocks come as they are ready, so that a slow one holds none up.
    `max_bytes_ahead` bounds what a stream holds in the object store ahead of its consumer; one task
    may always run, so a larger block does not stop it.
    """
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = in_order
    context.target_max_block_size = _BLOCK_BYTES
    if max_bytes_ahead is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=max_bytes_ahead
        )
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with DataContext.current(context):
        yield


def _user_error(error: BaseException | None) -> UserError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # Ray's wrapper is made a subclass of the cause as well, but its text is a traceback.
        cause: Any = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError) and not isinstance(cause, RayTaskError):
            # Ours are one line; Ray Data adds advice on retries below it.
            cause.args = (str(cause).partition("\n")[0],)
            return cause
        error = error.__cause__ or error.__context__
    return None
