"""What went wrong in a pipeline of ranks, and what is done about it: the decision, not the deed.

Plain Python without Ray: the worker group says what it saw (a `Failure`), a policy answers with a
`Decision`, and the controller carries that out. Recovery is a new policy and a new decision here,
and no change to how failures are found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from model.errors import UserError


class FailureKind(Enum):
    """What kind of thing went wrong, the likelier first cause first.

    When one rank fails, its peers lose their connections to it and fail as well; of several
    failures at the same time the one whose kind stands first here is the cause.
    """

    USER_ERROR = "user error"
    DIED = "died"
    NOT_ANSWERING = "does not answer"
    ERROR = "error"
    CONNECTION = "connection"


@dataclass(frozen=True)
class Failure:
    """One rank's end: where (`rank` and `node`, if known), at which step, and why, in one line.

    `replica` is None where there is only one. `detail` is the traceback or what else helps to find
    a bug; it is for logs, not for users.
    """

    kind: FailureKind
    cause: str
    rank: int | None = None
    node: str | None = None
    step: int | None = None
    operation: str = ""
    detail: str = ""
    replica: int | None = None

    def __str__(self) -> str:
        """Return the one line that the user sees."""
        if self.kind is FailureKind.USER_ERROR and self.step is None:
            return self.cause
        place = "a rank" if self.rank is None else f"rank {self.rank}"
        if self.replica is not None:
            place += f" of replica {self.replica}"
        where = f" on node {self.node}" if self.node else ""
        when = f" at step {self.step}" if self.step is not None else ""
        doing = f" during {self.operation}" if self.operation else ""
        verb = "stopped" if self.kind is FailureKind.USER_ERROR else "failed"
        return f"{place}{where} {verb}{when}{doing}: {self.cause}"


class WorkerFailure(UserError):  # noqa: N818 - it carries a Failure, which names it
    """The ranks cannot go on; `failure` is the first cause."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Decision(Enum):
    """What the controller does after a failure."""

    STOP = "stop"


class FailurePolicy(Protocol):
    """Decides after each failure; it never acts."""

    def decide(self, failure: Failure, history: Sequence[Failure]) -> Decision:
        """Return what to do about `failure`; `history` holds the earlier ones of this run."""
        ...


class StopOnFailure:
    """End the run at the first failure."""

    def decide(self, failure: Failure, history: Sequence[Failure]) -> Decision:
        """Return STOP, whatever happened."""
        return Decision.STOP


def first_cause(failures: Sequence[Failure]) -> Failure:
    """Return the failure that the others follow from; at least one must be given."""
    order = list(FailureKind)
    return min(failures, key=lambda failure: order.index(failure.kind))
