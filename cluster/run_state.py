"""The named states of a run, and which of them may follow which."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class RunState(Enum):
    """What a run is doing; the last three are ends."""

    STARTING = "starting"
    LOADING = "loading"
    TRAINING = "training"
    VALIDATING = "validating"
    CHECKPOINTING = "checkpointing"
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"


_ENDS = frozenset({RunState.FINISHED, RunState.FAILED, RunState.KILLED})
_NEXT: Mapping[RunState, frozenset[RunState]] = {
    RunState.STARTING: frozenset({RunState.LOADING}),
    RunState.LOADING: frozenset({RunState.TRAINING}),
    RunState.TRAINING: frozenset({RunState.VALIDATING, RunState.CHECKPOINTING, RunState.FINISHED}),
    RunState.VALIDATING: frozenset({RunState.TRAINING}),
    RunState.CHECKPOINTING: frozenset({RunState.TRAINING}),
}


class IllegalTransition(Exception):  # noqa: N818 - the state machine's word for it
    """A run went from one state to one that cannot follow it: a bug of ours."""


@dataclass
class RunStates:
    """The current state of a run and how it got there."""

    current: RunState = RunState.STARTING
    history: list[RunState] = field(default_factory=lambda: [RunState.STARTING])

    def enter(self, state: RunState) -> None:
        """Go to a state; IllegalTransition if it cannot follow the current one."""
        ended = self.current in _ENDS
        may_end = state in (RunState.FAILED, RunState.KILLED) and not ended
        if not may_end and state not in _NEXT.get(self.current, frozenset()):
            raise IllegalTransition(f"{self.current.value} cannot become {state.value}")
        self.current = state
        self.history.append(state)
