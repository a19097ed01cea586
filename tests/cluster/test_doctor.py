"""The doctor's page: facts of this machine, fits in 80 columns, and fails only where it must."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.doctor import finding_lines
from cluster.config import Config
from cluster.doctor import Finding, examine_machine
from cluster.doctor_fit import examine_fit
from cluster.host import HostMemory, host_memory, product_rate

CONFIGS = Path(__file__).parents[2] / "configs"


def fit(**overrides: str) -> dict[str, Finding]:
    settings = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    config = Config.load(CONFIGS / "quickstart.yaml", settings)
    return {finding.name: finding for finding in examine_fit(config)}


def test_the_page_of_this_machine_is_readable_and_training_is_possible() -> None:
    result = CliRunner().invoke(app, ["doctor", str(CONFIGS / "quickstart.yaml")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) < 80
    assert lines[-1] == "training is possible here"
    starts = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    for name in ("processor", "precision", "products", "cores", "memory", "gpu", "quickstart"):
        assert any(start.startswith(name) for start in starts)


def test_scripts_get_the_facts_as_values() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["is_possible"]
    machine = found["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["auto_precision"] in ("float32", "bfloat16")
    assert machine["float32_flop_per_s"] > 1e8
    assert machine["usable_cores"] >= 1
    assert found["configuration"] is None


def test_every_remedy_stands_below_its_fact() -> None:
    findings = [
        Finding("one", "a fact " * 30, "a remedy " * 20),
        Finding("another", "short", "mend it", is_failure=True),
    ]
    lines = list(finding_lines(findings))
    assert max(map(len, lines)) < 80
    assert lines[0].startswith("one      a fact")
    assert lines[-2:] == ["another  short", "         !! mend it"]


def test_missing_gpus_are_a_failure_here_and_none_where_a_cluster_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = fit(cluster__device="cuda")["gpus"]
    assert here.is_failure
    assert "takes 3 GPUs; this machine has 0" in here.fact
    there = fit(cluster__device="cuda", cluster__address="auto")["gpus"]
    assert not there.is_failure
    assert there.remedy


def test_memory_that_is_short_is_told_and_fails_only_above_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import cluster.doctor_fit as doctor_fit

    def with_memory(total: int, free: int) -> Finding:
        monkeypatch.setattr(doctor_fit, "host_memory", lambda: HostMemory(total, free))
        return fit()["memory"]

    assert with_memory(64 << 30, 64 << 30).remedy == ""
    short = with_memory(64 << 30, 1 << 20)
    assert "end what takes memory" in short.remedy
    assert not short.is_failure
    assert with_memory(1 << 20, 1 << 20).is_failure


def test_more_threads_than_cores_are_told() -> None:
    crowded = fit(cluster__threads_per_rank="64")["threads"]
    assert "3 ranks of 64 threads" in crowded.fact
    assert crowded.remedy


def test_a_limit_of_the_control_group_is_the_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemAvailable: 800 kB\n")
    assert host_memory(meminfo, tmp_path) == HostMemory(1_024_000, 819_200)
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert host_memory(meminfo, tmp_path) == HostMemory(500_000, 400_000)
    (tmp_path / "memory.stat").write_text("anon 60000\ninactive_file 40000\n")
    assert host_memory(meminfo, tmp_path) == HostMemory(500_000, 440_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(meminfo, tmp_path) == HostMemory(1_024_000, 819_200)


def test_a_measured_rate_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    assert product_rate(torch.float32) > 1e8
    assert torch.get_num_threads() == before


def test_findings_have_different_names() -> None:
    names = [finding.name for finding in examine_machine(measure=False)]
    assert len(set(names)) == len(names)


def test_variables_that_hold_torch_back_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found: dict[str, Any] = {f.name: f for f in examine_machine(measure=False)}
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in found["processor"].remedy
