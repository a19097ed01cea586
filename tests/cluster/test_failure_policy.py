"""The decision after a failure, and which of several failures is the cause."""

import itertools
import pickle

import pytest

from cluster.failure_policy import (
    Decision,
    Failure,
    FailureKind,
    StopOnFailure,
    WorkerFailure,
    first_cause,
)
from model.errors import UserError


def test_the_policy_stops_at_the_first_failure() -> None:
    failure = Failure(FailureKind.DIED, "its process ended", rank=2)
    assert StopOnFailure().decide(failure, ()) is Decision.STOP


def test_a_lost_connection_is_never_the_cause_of_another_failure() -> None:
    kinds = [FailureKind.CONNECTION, FailureKind.DIED, FailureKind.CONNECTION]
    for order in itertools.permutations(enumerate(kinds)):
        failures = [Failure(kind, "", rank=rank) for rank, kind in order]
        assert first_cause(failures).rank == 1


def test_among_equal_kinds_the_first_one_heard_of_is_the_cause() -> None:
    failures = [Failure(FailureKind.CONNECTION, "", rank=rank) for rank in (3, 1, 2)]
    assert first_cause(failures).rank == 3


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (
            Failure(FailureKind.DIED, "its process ended", 3, "10.0.0.7", 12, "train_step"),
            "rank 3 on node 10.0.0.7 failed at step 12 during train_step: its process ended",
        ),
        (
            Failure(FailureKind.USER_ERROR, "no space", 1, "10.0.0.7", 4, "write_part"),
            "rank 1 on node 10.0.0.7 stopped at step 4 during write_part: no space",
        ),
        (Failure(FailureKind.ERROR, "KeyError: 'x'"), "a rank failed: KeyError: 'x'"),
        (
            Failure(FailureKind.DIED, "its process ended", 3, "10.0.0.7", 12, replica=1),
            "rank 3 of replica 1 on node 10.0.0.7 failed at step 12: its process ended",
        ),
    ],
)
def test_a_failure_is_one_line(failure: Failure, line: str) -> None:
    error = WorkerFailure(failure)
    assert str(error) == line
    assert isinstance(error, UserError)
    assert error.failure is failure


def test_a_failure_passes_between_processes() -> None:
    failure = Failure(FailureKind.ERROR, "x", 1, "n", 2, "op", "detail")
    assert pickle.loads(pickle.dumps(failure)) == failure
