"""Named placements put blocks where they say, and impossible ones are refused with the values."""

from dataclasses import replace

import pytest

from pipeline.placements.named import named_placement
from pipeline.placements.placement import Placement, PlacementError
from tests.pipeline.plans import paper_placement, small_model


def test_the_papers_placement_has_a_rank_for_each_layer_and_each_shard() -> None:
    model = small_model(num_layers=4, target_vocabulary_size=14)
    placement = paper_placement(model, 4, 4)
    assert placement.num_ranks == 8
    for layer in range(4):
        for network in ("encoder", "decoder"):
            assert placement.rank_of[f"{network}.{layer}.projection"] == layer
            assert placement.rank_of[f"{network}.{layer}.recurrence"] == layer
    assert placement.rank_of["source_embedding"] == placement.rank_of["target_embedding"] == 0
    assert [placement.rank_of[f"softmax.{shard}"] for shard in range(4)] == [4, 5, 6, 7]
    assert placement.rank_of["loss"] == 4
    assert placement.shards == ((0, 4), (4, 8), (8, 11), (11, 14))


def test_neighbouring_layers_share_a_rank() -> None:
    placement = paper_placement(small_model(num_layers=5), 2, 1)
    layers = [placement.rank_of[f"decoder.{layer}.recurrence"] for layer in range(5)]
    assert layers == [0, 0, 0, 1, 1]


def test_by_default_each_layer_has_its_rank() -> None:
    assert named_placement("paper", small_model(), softmax_ranks=2).num_ranks == 5


def test_single_is_one_rank_with_the_whole_vocabulary() -> None:
    placement = named_placement("single", small_model())
    assert (placement.num_ranks, placement.shards) == (1, ((0, 13),))
    assert set(placement.rank_of.values()) == {0}


@pytest.mark.parametrize(
    ("layer_ranks", "softmax_ranks", "words"),
    [(4, 1, "layer_ranks=4"), (0, 1, "layer_ranks=0"), (1, 14, "softmax_ranks=14"), (1, 0, "=0")],
)
def test_counts_that_do_not_fit_are_refused(
    layer_ranks: int, softmax_ranks: int, words: str
) -> None:
    with pytest.raises(PlacementError, match=words):
        paper_placement(small_model(), layer_ranks, softmax_ranks)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(PlacementError, match=r"'papr' is unknown; use one of single, paper"):
        named_placement("papr", small_model())


def changed(rank_of: dict[str, int | None]) -> Placement:
    placement = paper_placement(small_model(), 3, 2)
    ranks = {**placement.rank_of, **rank_of}
    return replace(placement, rank_of={b: r for b, r in ranks.items() if r is not None})


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (changed({"decoder.2.recurrence": None}), "'decoder.2.recurrence' is on no rank"),
        (changed({"decoder.3.recurrence": 0}), "'decoder.3.recurrence', which is no block"),
        (changed({"loss": 5}), "'loss' is on rank 5; ranks go from 0 to 4"),
        (changed({"softmax.1": 3}), "rank 4 of 5 has no block"),
        (replace(changed({}), shards=((0, 5), (6, 13))), r"\[6, 13\) does not follow word 5"),
        (replace(changed({}), shards=((0, 5), (5, 5))), r"\[5, 5\) does not follow word 5"),
        (replace(changed({}), shards=((0, 5), (5, 12))), "end at word 12 of 13"),
    ],
    ids=["missing", "unknown", "beyond", "idle rank", "gap", "empty shard", "short"],
)
def test_placements_that_do_not_fit_are_refused(placement: Placement, words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        placement.check(small_model())
