"""The orders of the policies in small cases that can be read, and their order of phases."""

from itertools import pairwise

import pytest

from model.errors import UserError
from pipeline.plan import Plan
from pipeline.policies import POLICIES, named_policy
from tests.pipeline.plans import small_model, small_plan


def row(plan: Plan, rank: int, blocks: dict[str, str]) -> str:
    """Print a rank's operations of some blocks, with short names and the chunk."""
    operations = plan.training.schedule.operations[rank]
    return " ".join(f"{o.kind}{blocks[o.block]}{o.chunk}" for o in operations if o.block in blocks)


def two_layers(policy: str) -> Plan:
    return small_plan((1, 1), model=small_model(num_layers=2), policy=policy, num_chunks=3)


ENCODER = {"encoder.0.recurrence": "a", "encoder.1.recurrence": "b"}


def test_fill_drain_finishes_a_block_before_the_next() -> None:
    assert row(two_layers("fill_drain"), 0, ENCODER) == (
        "Fa0 Fa1 Fa2 Fb0 Fb1 Fb2 Ib2 Wb2 Ib1 Wb1 Ib0 Wb0 Ia2 Wa2 Ia1 Wa1 Ia0 Wa0"
    )


def test_wavefront_goes_along_the_diagonals() -> None:
    assert row(two_layers("wavefront"), 0, ENCODER) == (
        "Fa0 Fa1 Fb0 Fa2 Fb1 Fb2 Ib2 Wb2 Ib1 Wb1 Ia2 Wa2 Ib0 Wb0 Ia1 Wa1 Ia0 Wa0"
    )


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fill_drain", "Fs0 Fs1 Fs2 Fl0 Fl1 Fl2 Is2 Ws2 Is1 Ws1 Is0 Ws0"),
        ("wavefront", "Fs0 Fl0 Fs1 Fl1 Fs2 Fl2 Is2 Ws2 Is1 Ws1 Is0 Ws0"),
    ],
)
def test_the_softmax_runs_all_chunks_forward_before_it_turns_back(
    policy: str, expected: str
) -> None:
    assert row(two_layers(policy), 1, {"softmax.0": "s", "loss": "l"}) == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_all_forward_operations_come_first(policy: str) -> None:
    plan = small_plan((2, 2), policy=policy, num_microbatches=3, num_chunks=3)
    for operations in plan.training.schedule.operations:
        kinds = [operation.kind == "F" for operation in operations]
        assert kinds == sorted(kinds, reverse=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_weight_gradients_follow_their_input_gradients(policy: str) -> None:
    plan = small_plan((2, 2), policy=policy, num_microbatches=2, num_chunks=3)
    for operations in plan.training.schedule.operations:
        for before, operation in pairwise(operations):
            if operation.kind == "W":
                assert before == operation._replace(kind="I")


def test_an_unknown_policy_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"policy='zigzag' is unknown; use one of fill_drain, wave"):
        named_policy("zigzag")
    with pytest.raises(UserError, match="zigzag"):
        small_plan(policy="zigzag")
