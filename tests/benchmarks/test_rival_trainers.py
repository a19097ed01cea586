"""Every contestant trains the same model: the same values, batches, losses, norms and updates."""

from pathlib import Path

import pytest

from benchmarks.rivals.__main__ import main
from benchmarks.rivals.batches import draw_batches
from benchmarks.rivals.ours import one_rank_turn
from benchmarks.rivals.plain import Layout, plain_turn
from benchmarks.rivals.processes import Place
from benchmarks.rivals.shares import shares_turn
from benchmarks.rivals.turn import joined
from tests.benchmarks.contests import small_task

HERE = Place(0, 1, 1, "")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_plain_trainers_take_the_steps_of_ours(layout: Layout) -> None:
    task = small_task(num_steps=3)
    batches = draw_batches(task)
    ours = joined([one_rank_turn(HERE, task, batches)])
    plain = joined([plain_turn(HERE, task, batches, layout)])
    assert len(ours.losses) == 4
    assert plain.losses == pytest.approx(ours.losses, rel=1e-6)
    assert plain.gradient_norms == pytest.approx(ours.gradient_norms, rel=1e-5)


def test_the_batches_hold_what_could_go_wrong() -> None:
    batches = draw_batches(small_task(num_steps=3))
    assert any(len(set(batch.source_lengths.tolist())) > 1 for batch in batches)
    assert any(len(set(batch.target_lengths.tolist())) > 1 for batch in batches)


def test_the_shares_of_a_step_name_every_block_and_the_update() -> None:
    task = small_task()
    shares = shares_turn(HERE, task, draw_batches(task))
    blocks = [
        (kind, operation)
        for kind in ("embedding", "projection", "recurrence")
        for operation in "FIW"
    ]
    rest = [("softmax", "FIW"), ("loss", "F"), ("norm", ""), ("update", ""), ("rest", "")]
    assert [(share.kind, share.operation) for share in shares] == blocks + rest
    assert all(share.seconds > 0 for share in shares if share.operation in ("F", "W", "FIW"))
    assert {share.kind for share in shares if share.operations} == {
        "projection",
        "recurrence",
        "softmax",
    }


@pytest.mark.slow
@pytest.mark.timeout(900)  # ten starts of torch and one of Ray, on cores that may be busy
def test_all_contestants_agree_and_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "rivals.md"
    names = "plain packed,plain padded,ddp,pipelining 2,pipelining 4,ours 1 rank,ours 2 ranks"
    assert main(["--quick", "--contestants", names, "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.rstrip("\n") == capsys.readouterr().out.rstrip("\n")
    assert "Yes, up to the rounding of each format" in text
    assert "failed" not in text
    for name in names.split(","):
        assert f"| {name}, float32 |" in text
    assert "ours 2 ranks, float32" in page.with_suffix(".svg").read_text(encoding="utf-8")
