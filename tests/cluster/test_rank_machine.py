"""What ranks tell of their machines: node shares, the line, warnings, and changes on resume."""

from dataclasses import replace

import torch

from cluster.rank_machine import (
    NodeShare,
    RankMachine,
    change_since,
    machine_line,
    machine_warnings,
    node_shares,
    rank_threads,
    set_up_rank,
    to_file,
)

MACHINE = RankMachine("EPYC", "AVX2", "2.13.0", 2, 4, (), False, True)


def test_ranks_are_counted_node_by_node() -> None:
    assert node_shares(["a", "b", "a", "a"]) == [
        NodeShare(3, 0),
        NodeShare(1, 0),
        NodeShare(3, 1),
        NodeShare(3, 2),
    ]


def test_threads_follow_the_setting_the_device_and_the_share() -> None:
    assert rank_threads("auto", 3, 8) == 2
    assert rank_threads("auto", 3, 8, "emulated") == 1
    assert rank_threads(5, 3, 8) == 5


def test_a_rank_sets_its_threads_and_tells_them() -> None:
    before = torch.get_num_threads()
    try:
        machine = set_up_rank(2, NodeShare(1, 0), pin_cores=False, device="cpu")
        assert torch.get_num_threads() == machine.num_threads == 2
        assert machine.cores == ()
        assert machine.torch_version == torch.__version__
        assert machine.num_cores >= 1
    finally:
        torch.set_num_threads(before)


def test_the_line_names_what_differs_between_ranks() -> None:
    pinned = replace(MACHINE, num_threads=1, cores=(2, 3))
    assert machine_line([MACHINE, MACHINE]) == ("2 threads a rank, AVX2 kernels, cores not pinned")
    assert machine_line([MACHINE, replace(pinned, keeps_memory=False)]) == (
        "2 threads | 1 thread a rank, AVX2 kernels, cores not pinned | 2,3, "
        "freed memory goes back to the system"
    )


def test_slow_numbers_and_missing_cores_are_warned_of() -> None:
    fast = replace(MACHINE, has_fast_bfloat16=True)
    assert machine_warnings([MACHINE, fast], "float32", pin_cores=False) == []
    (slow,) = machine_warnings([fast, MACHINE], "bfloat16", pin_cores=False)
    assert "rank 1 is on EPYC without fast bfloat16" in slow
    assert "training.precision=float32" in slow
    (free,) = machine_warnings([MACHINE, MACHINE], "float32", pin_cores=True)
    assert "ranks 0, 1 are" in free
    assert "4 usable cores" in free


def test_a_resume_tells_what_changes_the_last_bits() -> None:
    stored = to_file([MACHINE, MACHINE])
    assert change_since(stored, [MACHINE]) is None
    changed = change_since(stored, [replace(MACHINE, num_threads=1, kernels="AVX512")])
    assert changed is not None
    assert "threads a rank 2 then and 1 now" in changed
    assert "kernels AVX2 then and AVX512 now" in changed
    assert change_since(b"{}", [MACHINE]) is None
    assert change_since(b"\xff", [MACHINE]) is None
