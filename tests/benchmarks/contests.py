"""Small tasks, and contests whose times are given instead of measured."""

from benchmarks.rivals.batches import draw_batches
from benchmarks.rivals.ceiling import Rates, products
from benchmarks.rivals.contest import Contest, Entry
from benchmarks.rivals.contestants import all_contestants
from benchmarks.rivals.task import Task, operations
from benchmarks.rivals.turn import Turn
from model.network import ModelConfig

PIPELINE = {
    "placement": "uneven",
    "policy": "deferred_weights",
    "microbatches": 1,
    "time_chunks": 4,
}


def small_task(*, num_steps: int = 2, seed: int = 1) -> Task:
    """Two layers of 24 cells, 60 and 50 words, 8 pairs a batch."""
    return Task(ModelConfig(60, 50, 2, 24, 24), batch_size=8, num_steps=num_steps, seed=seed)


def contest_of(
    parts_of_ceiling: dict[str, float], losses: dict[str, float] | None = None
) -> Contest:
    """Return a contest in which each contestant reached so much of the large product's rate.

    The products run at 100 GFLOP/s; `losses` are those after updates, 4 where none is given.
    """
    task = small_task()
    batches = draw_batches(task)
    everybody = all_contestants("padded", "1f1b", PIPELINE)
    seconds = [operations(task.model, batch) / 100e9 for batch in batches[1:]]
    entries = [
        Entry(everybody[name], task, [_turn(seconds, part, (losses or {}).get(name, 4.0))])
        for name, part in parts_of_ceiling.items()
    ]
    rates: Rates = dict.fromkeys(products(task), 100000000000.0)
    measured = {("float32", 1): [rates], ("float32", 2): [rates]}
    return Contest(task, batches, entries, measured, loads=[0.5])


def _turn(seconds: list[float], part: float, loss: float) -> Turn:
    step_s = tuple(each / part for each in seconds)
    return Turn(step_s, (5.0, loss, loss), (1.0, 1.0, 1.0), 2 * sum(step_s), 300_000_000)
