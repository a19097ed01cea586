"""What the processor or GPU can do that decides in which numbers to compute.

Half as many bits are only worth it where there are instructions that multiply bfloat16 numbers;
without them torch converts back and forth, and products take several times as long as in float32.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

AUTO = "auto"
PrecisionName = Literal["float32", "bfloat16", "float64"]
# The names of torch.cpu.get_capabilities, and what makers call them.
_BFLOAT16_UNITS = {
    "amx_bf16": "AMX-BF16",
    "avx512_bf16": "AVX512-BF16",
    "sve_bf16": "SVE-BF16",
    "bf16": "ARM BF16",
}
_ATEN_VARIABLE = "ATEN_CPU_CAPABILITY"
# The first of them that is set is the one that oneDNN reads.
_ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_FIRST_GPU_WITH_BFLOAT16 = (8, 0)


@dataclass(frozen=True)
class Processor:
    """A processor as torch may use it.

    `kernels` is the instruction set of torch's own kernels, such as AVX2; `bfloat16_units` are the
    instructions for bfloat16 products that it has and that nothing turns off; `lowered_by` are the
    environment variables, with their values, that hold torch back from newer instructions.
    """

    name: str
    architecture: str
    kernels: str
    bfloat16_units: tuple[str, ...] = ()
    lowered_by: tuple[str, ...] = ()

    @property
    def has_fast_bfloat16(self) -> bool:
        """Whether products in bfloat16 are faster than in float32."""
        return bool(self.bfloat16_units)


def this_processor() -> Processor:
    """Return the processor of this machine."""
    return processor_of(
        _capabilities(),
        torch.backends.cpu.get_cpu_capability(),
        os.environ,
        has_amx_permission=torch.cpu._init_amx(),
    )


def processor_of(
    capabilities: Mapping[str, Any],
    kernels: str,
    environment: Mapping[str, str],
    *,
    has_amx_permission: bool,
) -> Processor:
    """Judge a processor by the capabilities and the name of the kernels that torch tells.

    The system has to permit the use of AMX; some virtual machines do not.
    """
    units = [unit for unit in _BFLOAT16_UNITS if capabilities.get(unit)]
    if not has_amx_permission:
        units = [unit for unit in units if unit != "amx_bf16"]
    lowered: list[str] = []
    if value := environment.get(_ATEN_VARIABLE):
        lowered.append(f"{_ATEN_VARIABLE}={value}")
        units = [unit for unit in units if _aten_allows(unit, value.lower())]
    for variable in _ONEDNN_VARIABLES:
        if value := environment.get(variable):
            lowered.append(f"{variable}={value}")
            units = [unit for unit in units if _onednn_allows(unit, value.upper())]
            break
    return Processor(
        name=str(capabilities.get("cpu_name") or "unknown"),
        architecture=str(capabilities.get("architecture") or "unknown"),
        kernels=kernels,
        bfloat16_units=tuple(_BFLOAT16_UNITS[unit] for unit in units),
        lowered_by=tuple(lowered),
    )


def has_fast_bfloat16(device: str = "cpu") -> bool | None:
    """Return whether bfloat16 is fast on torch's device `cpu` or `cuda`; None if none is found."""
    if not device.startswith("cuda"):
        return this_processor().has_fast_bfloat16
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device) >= _FIRST_GPU_WITH_BFLOAT16


def automatic_precision(device: str = "cpu") -> PrecisionName:
    """Return `bfloat16` where it is fast on torch's device `cpu` or `cuda`, else `float32`.

    A GPU that cannot be seen from here is taken for one of those that have it.
    """
    return "float32" if has_fast_bfloat16(device) is False else "bfloat16"


def translation_precision(trained: str, device: str = "cpu") -> str:
    """Return the precision to translate in with a model that was trained in precision `trained`.

    Where bfloat16 is slow that is float32, the format of the weights that a checkpoint keeps.
    """
    return (
        "float32" if trained == "bfloat16" and automatic_precision(device) == "float32" else trained
    )


def _capabilities() -> Mapping[str, Any]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    # Older versions of torch tell of x86 alone.
    return {
        "cpu_name": platform.processor(),
        "architecture": platform.machine(),
        "amx_bf16": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }


def _aten_allows(unit: str, kernels: str) -> bool:
    """Without AVX512 torch's kernels between the products convert every number by hand."""
    return not (unit in ("amx_bf16", "avx512_bf16") and kernels in ("default", "avx2"))


def _onednn_allows(unit: str, most: str) -> bool:
    if unit == "amx_bf16":
        return "AMX" in most or most in ("ALL", "DEFAULT")
    if unit != "avx512_bf16":
        return True  # the variable names instructions of x86 only
    too_old = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE")
    return most not in (*too_old, "AVX512_CORE_VNNI")
