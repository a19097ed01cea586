"""The table of every rank's memory, measured beside what the memory model says."""

from cluster.memory_table import measured_memory, memory_by_model, memory_lines
from tests.cluster.groups import MODEL, plan_of


def test_peaks_are_read_in_the_order_of_ranks() -> None:
    metrics = {f"memory/rank{rank}_peak_bytes": 1e9 + rank for rank in (2, 0, 1)}
    assert measured_memory({**metrics, "train/loss": 1.0}) == (10**9, 10**9 + 1, 10**9 + 2)
    assert measured_memory({}) == ()


def test_the_model_counts_at_least_the_parameters_of_every_worker() -> None:
    told = memory_by_model(plan_of("paper", 2, 1, replicas=2), 4, 5)
    assert len(told) == 6
    assert sum(told[:3]) > 8 * MODEL.num_parameters()
    assert told[:3] == told[3:]


def test_the_table_has_a_line_a_rank() -> None:
    lines = memory_lines((3 << 30, 1 << 30), (2 << 30, 1 << 29), 51)
    assert lines[-2].split() == ["rank", "0", "3.00", "2.00"]
    assert lines[-1].split() == ["rank", "1", "1.00", "0.50"]
    assert "51 positions" in lines[1]
    assert memory_lines((3 << 30,), (), 51)[-1].split()[-1] == "-"
    assert memory_lines((), (), 51) == []
