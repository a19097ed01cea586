"""What is known of a processor decides the precision; made-up ones are judged as real ones."""

import platform
from collections.abc import Mapping

import pytest
import torch

from model.processor import (
    Processor,
    automatic_precision,
    has_fast_bfloat16,
    processor_of,
    this_processor,
    translation_precision,
)

XEON = {"cpu_name": "Xeon", "architecture": "x86_64", "amx_bf16": True, "avx512_bf16": True}
EPYC = {"cpu_name": "EPYC", "architecture": "x86_64", "amx_bf16": False, "avx512_bf16": True}
OLD = {"cpu_name": "EPYC", "architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False}
GRAVITON = {"architecture": "aarch64", "bf16": True, "sve_bf16": True}


def judged(
    capabilities: Mapping[str, object],
    environment: Mapping[str, str] | None = None,
    *,
    amx: bool = True,
) -> Processor:
    return processor_of(capabilities, "AVX512", environment or {}, has_amx_permission=amx)


@pytest.mark.parametrize(
    ("capabilities", "units"),
    [
        (XEON, ("AMX-BF16", "AVX512-BF16")),
        (EPYC, ("AVX512-BF16",)),
        (OLD, ()),
        (GRAVITON, ("SVE-BF16", "ARM BF16")),
        ({}, ()),
    ],
)
def test_units_are_those_that_the_processor_has(
    capabilities: Mapping[str, object], units: tuple[str, ...]
) -> None:
    found = judged(capabilities)
    assert found.bfloat16_units == units
    assert found.has_fast_bfloat16 == bool(units)
    assert found.lowered_by == ()


def test_amx_that_the_system_forbids_does_not_count() -> None:
    assert judged(XEON, amx=False).bfloat16_units == ("AVX512-BF16",)


@pytest.mark.parametrize(
    ("environment", "units"),
    [
        ({"ATEN_CPU_CAPABILITY": "avx2"}, ()),
        ({"ATEN_CPU_CAPABILITY": "default"}, ()),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, ("AMX-BF16", "AVX512-BF16")),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ()),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, ()),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, ("AVX512-BF16",)),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE_AMX"}, ("AMX-BF16", "AVX512-BF16")),
        ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, ("AMX-BF16", "AVX512-BF16")),
    ],
)
def test_variables_take_instructions_away(
    environment: dict[str, str], units: tuple[str, ...]
) -> None:
    found = judged(XEON, environment)
    assert found.bfloat16_units == units
    name, value = next(iter(environment.items()))
    assert found.lowered_by == (f"{name}={value}",)


def test_variables_of_x86_leave_arm_alone() -> None:
    found = judged(GRAVITON, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default"})
    assert found.bfloat16_units == ("SVE-BF16", "ARM BF16")


def test_this_processor_is_told() -> None:
    found = this_processor()
    assert found.architecture != "unknown"
    assert found.kernels == torch.backends.cpu.get_cpu_capability()
    assert has_fast_bfloat16() == found.has_fast_bfloat16
    assert automatic_precision() == ("bfloat16" if found.has_fast_bfloat16 else "float32")


def test_an_older_torch_tells_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    found = this_processor()
    assert found.architecture == platform.machine()
    assert "AMX-BF16" not in found.bfloat16_units


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_a_gpu_is_judged_by_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert automatic_precision("cuda") == precision


def test_a_gpu_that_is_elsewhere_is_taken_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert has_fast_bfloat16("cuda") is None
    assert automatic_precision("cuda") == "bfloat16"


def test_a_model_is_translated_with_in_what_is_fast_here(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = "bfloat16" if has_fast_bfloat16() else "float32"
    assert translation_precision("bfloat16") == fast
    assert [translation_precision(name) for name in ("float32", "float64")] == [
        "float32",
        "float64",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert translation_precision("bfloat16", "cuda") == "bfloat16"
