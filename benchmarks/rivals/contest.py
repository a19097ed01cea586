"""The contest: everybody takes turns, round by round, so that the machine's moods fall on all."""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.rivals.ceiling import LARGE, ProductName, Rates, measure_products
from benchmarks.rivals.contestants import NUM_CORES, Contestant
from benchmarks.rivals.processes import ProcessError, run_processes
from benchmarks.rivals.shares import Share, shares_turn
from benchmarks.rivals.task import Task, operations
from benchmarks.rivals.turn import Turn
from model.batching import Batch
from model.process_memory import KEEPING_ENVIRONMENT

Tell = Callable[[str], None]


@dataclass
class Entry:
    """A contestant in one format, and its turns; `problem` says why it has no more of them."""

    contestant: Contestant
    task: Task
    turns: list[Turn] = field(default_factory=list)
    problem: str = ""

    @property
    def name(self) -> str:
        """The contestant and the format."""
        return f"{self.contestant.name}, {self.task.precision}"


@dataclass
class Contest:
    """What was measured; words and operations are those of the timed batches together.

    `rates` hold a measurement of the products for every round, by format and by number of
    processes; `shares` are those of this project's step by format; `loads` those of the machine.
    """

    task: Task
    batches: Sequence[Batch]
    entries: list[Entry]
    rates: dict[tuple[str, int], list[Rates]] = field(default_factory=dict)
    shares: dict[str, list[Share]] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)

    @property
    def formats(self) -> list[str]:
        """Number formats that take part."""
        return list(dict.fromkeys(entry.task.precision for entry in self.entries))

    @property
    def num_words(self) -> int:
        """Source and target words with their ends, padding not counted, as in the paper."""
        return sum(batch.num_words for batch in self.batches[1:])

    @property
    def num_operations(self) -> float:
        """Floating-point operations that the timed steps need."""
        return sum(operations(self.task.model, batch) for batch in self.batches[1:])

    def finished(self) -> list[Entry]:
        """Return those that were timed."""
        return [entry for entry in self.entries if entry.turns]

    def speeds(self, entry: Entry) -> list[float]:
        """Return an entry's words a second of every round."""
        return [self.num_words / sum(turn.step_s) for turn in entry.turns]

    def speed(self, entry: Entry) -> float:
        """Return the median of an entry's words a second."""
        return statistics.median(self.speeds(entry))

    def words_per_cpu_s(self, entry: Entry) -> float:
        """Return the median of an entry's words for every second of processor time."""
        spent = [self.num_words / turn.cpu_s for turn in entry.turns if turn.cpu_s]
        return statistics.median(spent) if spent else 0.0

    def rate(self, entry: Entry) -> float:
        """Return the floating-point operations a second that this comes to."""
        return self.speed(entry) * self.num_operations / self.num_words

    def best(self, *, ours: bool, precision: str | None = None) -> Entry | None:
        """Return the fastest entry of ours or of the rivals, of one format if it is given."""
        of_kind = [
            entry
            for entry in self.finished()
            if entry.contestant.ours == ours and precision in (None, entry.task.precision)
        ]
        return max(of_kind, key=self.speed, default=None)

    def product_rate(self, precision: str, name: ProductName, num_processes: int) -> float:
        """Return the median rate of a product with so many processes on the cores."""
        return statistics.median(each[name] for each in self.rates[precision, num_processes])

    def ceiling(self, precision: str) -> float:
        """Return the large product's rate, with the processes that are better for it."""
        return max(
            self.product_rate(precision, LARGE, count)
            for kept, count in self.rates
            if kept == precision
        )


def hold_contest(
    task: Task,
    batches: Sequence[Batch],
    contestants: Sequence[Contestant],
    formats: Sequence[str],
    num_rounds: int,
    tell: Tell,
    *,
    with_shares: bool = True,
    after_turn: Callable[[Contest], None] = lambda contest: None,
) -> Contest:
    """Let everybody take a turn in every round, in every format, with the products beside them.

    Who fails once takes no further part. `with_shares`, the shares of our own step are measured in
    the first round, and left out where that fails. `after_turn` gets what is known so far. Raises
    ProcessError where the products cannot be measured.
    """
    tasks = [replace(task, precision=precision) for precision in formats]
    entries = [Entry(contestant, each) for each in tasks for contestant in contestants]
    contest = Contest(task, batches, entries)
    for number in range(num_rounds):
        contest.loads.append(os.getloadavg()[0])
        for each in tasks:
            tell(f"round {number + 1}, matrix products, {each.precision}")
            _measure_products(contest, each)
            if with_shares and number == 0:
                tell(f"where a step of ours goes, {each.precision}")
                try:
                    _measure_shares(contest, each)
                except ProcessError as error:
                    tell(f"no shares: {error}")
        for entry in entries:
            if not entry.problem:
                _take_turn(contest, entry)
                tell(f"round {number + 1}, {entry.name}: {_news(contest, entry)}")
                after_turn(contest)
    return contest


def _measure_shares(contest: Contest, task: Task) -> None:
    (shares,) = run_processes(
        shares_turn,
        task,
        contest.batches,
        num_processes=1,
        num_threads=NUM_CORES,
        environment=KEEPING_ENVIRONMENT,  # as our own contestants
    )
    contest.shares[task.precision] = shares


def _measure_products(contest: Contest, task: Task) -> None:
    for num_processes in (1, NUM_CORES):
        measured = measure_products(task, num_processes, NUM_CORES // num_processes)
        contest.rates.setdefault((task.precision, num_processes), []).append(measured)


def _take_turn(contest: Contest, entry: Entry) -> None:
    try:
        entry.turns.append(entry.contestant.turn(entry.task, contest.batches))
    except ProcessError as error:
        entry.problem = str(error)


def _news(contest: Contest, entry: Entry) -> str:
    if entry.problem:
        return entry.problem
    return f"{contest.speeds(entry)[-1]:,.0f} words/s"
