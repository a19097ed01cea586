"""Named placements for any number of layers and ranks, and placements written by hand."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs, scaled
from pipeline.costs.operation_costs import Costs
from pipeline.placements.named import PLACEMENTS, named_placement
from pipeline.placements.placement import Placement, PlacementError
from pipeline.placements.rules import placement_from_rules
from pipeline.placements.vocabulary_balance import balanced_words, common_level
from tests.pipeline.plans import small_model

PAPER = ModelConfig(160_000, 80_000)


def words_of(placement: Placement) -> list[int]:
    """Return the number of words of every rank."""
    words: Counter[int] = Counter()
    for shard, (start, stop) in enumerate(placement.shards):
        words[placement.rank_of[f"softmax.{shard}"]] += stop - start
    return [words[rank] for rank in range(placement.num_ranks)]


def work_s(placement: Placement, costs: Costs) -> list[float]:
    """Return the seconds of every rank's operations."""
    seconds = [0.0] * placement.num_ranks
    for spec in placement.blocks(costs.model):
        seconds[placement.rank_of[spec.name]] += costs.whole_block_s(spec)
    return seconds


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(PLACEMENTS)),
    st.integers(1, 7),
    st.integers(1, 16),
    st.integers(1, 4),
    st.integers(1, 9),
)
def test_every_name_fits_any_layers_and_ranks_or_says_why_not(
    name: str, num_layers: int, num_ranks: int, num_microbatches: int, num_chunks: int
) -> None:
    config = replace(PAPER, num_layers=num_layers)
    try:
        placement = named_placement(
            name,
            config,
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            num_chunks=num_chunks,
        )
    except PlacementError:
        assert num_ranks == 1 and name != "single"
    else:
        placement.check(config)
        assert placement.num_ranks == (1 if name == "single" else num_ranks)


@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name != "single"])
def test_one_rank_is_refused_with_a_remedy(name: str) -> None:
    if name == "uneven":
        assert named_placement(name, PAPER, num_ranks=1).num_ranks == 1
        return
    with pytest.raises(PlacementError, match=r"use (1|2)"):
        named_placement(name, PAPER, num_ranks=1)


def test_uneven_gives_layer_ranks_what_softmax_ranks_cannot_do_while_they_wait() -> None:
    whole = words_of(named_placement("uneven", PAPER, num_ranks=8, num_chunks=29))
    assert sum(whole) == 80_000
    assert whole[:4] == [whole[0]] * 4 and whole[4:] == [whole[4]] * 4
    assert 3_000 < whole[0] < 4_000
    many = named_placement("uneven", PAPER, num_ranks=8, num_chunks=29, num_microbatches=1000)
    # Hardly any wait: equal work is 2,000 words beside a layer.
    assert words_of(many)[:4] == pytest.approx([2_000] * 4, rel=0.01)


def test_uneven_work_is_equal_for_other_lengths_and_many_microbatches() -> None:
    costs = arithmetic_costs(PAPER, source_length=50, target_length=20)
    placement = named_placement(
        "uneven", PAPER, num_ranks=6, costs=costs, num_microbatches=10**6, num_chunks=20
    )
    seconds = work_s(placement, costs)
    assert max(seconds) == pytest.approx(min(seconds), rel=1e-3)


def test_separate_has_the_encoder_first_and_words_everywhere() -> None:
    placement = named_placement("separate", PAPER, num_ranks=8, num_chunks=29)
    for layer in range(4):
        for kind in ("projection", "recurrence"):
            assert placement.rank_of[f"encoder.{layer}.{kind}"] == layer
            assert placement.rank_of[f"decoder.{layer}.{kind}"] == 4 + layer
    assert placement.rank_of["source_embedding"] == 0
    assert placement.rank_of["target_embedding"] == 4
    words = words_of(placement)
    # The decoder's ranks wait for the encoder, so the encoder's take more words.
    assert min(words[:4]) > max(words[4:]) > 0


def test_separate_cuts_layers_into_blocks_when_there_are_ranks_to_spare() -> None:
    placement = named_placement("separate", small_model(num_layers=2), num_ranks=8)
    ranks = [
        placement.rank_of[f"encoder.{layer}.{kind}"]
        for layer in range(2)
        for kind in ("projection", "recurrence")
    ]
    assert ranks == [0, 1, 2, 3]


def test_split_has_recurrences_first_and_projections_on_the_other_half() -> None:
    placement = named_placement("split", PAPER, num_ranks=8, num_chunks=29)
    for network in ("encoder", "decoder"):
        for layer in range(4):
            assert placement.rank_of[f"{network}.{layer}.recurrence"] == layer
            assert placement.rank_of[f"{network}.{layer}.projection"] == 4 + layer
    assert words_of(placement) == [10_000] * 8


def test_slow_recurrences_leave_their_ranks_fewer_words() -> None:
    costs = scaled(arithmetic_costs(PAPER), 2.0, families=("recurrence",))
    words = words_of(named_placement("split", PAPER, num_ranks=8, costs=costs, num_chunks=29))
    assert max(words[:4]) < min(words[4:])


def test_a_rank_with_too_much_other_work_gets_no_words() -> None:
    costs = arithmetic_costs(PAPER)
    words = balanced_words([10.0 * costs.one_device_s(), 0.0, 0.0], costs)
    assert words == [0, 40_000, 40_000]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20), st.floats(1e-3, 1e4))
def test_the_common_level_takes_the_whole_amount(loads: list[float], amount: float) -> None:
    level = common_level(loads, amount)
    assert sum(max(0.0, level - load) for load in loads) == pytest.approx(amount, rel=1e-6)


def test_rules_name_blocks_by_pattern() -> None:
    placement = placement_from_rules(
        small_model(),
        {"*_embedding": 0, "encoder.*": 0, "decoder.*": 1, "decoder.2.*": 1, "softmax.*": 2,
         "softmax.1": 0, "loss": 2},
        shards=[4, 3, 6],
    )  # fmt: skip
    assert placement.num_ranks == 3
    assert placement.shards == ((0, 4), (4, 7), (7, 13))
    assert placement.rank_of["decoder.1.recurrence"] == 1
    assert [placement.rank_of[f"softmax.{shard}"] for shard in range(3)] == [2, 0, 2]


ALL = {"*": 0}


@pytest.mark.parametrize(
    ("rules", "shards", "words"),
    [
        ({"*": 0, "decoder.*": 1}, 1, r"'\*', 'decoder.\*' put block 'decoder.0.projection' on"),
        ({"*": 0, "decoder.9.*": 1}, 1, r"'decoder.9.\*' in the placement names no block"),
        ({"encoder.*": 0}, 1, "'source_embedding' is on no rank"),
        ({"*": 1}, 1, "rank 0 of 2 has no block"),
        ({"*": -1}, 1, "is on rank -1"),
        (ALL, [4, 4], "end at word 8 of 13"),
        (ALL, [4, 0, 9], "does not follow"),
        (ALL, [14, -1], "does not follow"),
        (ALL, 14, "14 vocabulary shards do not fit 13"),
        (ALL, 0, "0 vocabulary shards"),
    ],
)
def test_rules_that_do_not_fit_are_refused(
    rules: dict[str, int], shards: int | list[int], words: str
) -> None:
    with pytest.raises(PlacementError, match=words):
        placement_from_rules(small_model(), rules, shards=shards)


def test_a_block_of_its_own_name_goes_before_patterns() -> None:
    placement = placement_from_rules(small_model(), {"*": 0, "loss": 1})
    assert placement.rank_of["loss"] == 1
