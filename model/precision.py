"""Which number formats a model computes in.

Matrix products take their operands in the compute format; sums that run over many terms (states,
gradients, master weights, the loss) are held in the state format.
"""

from dataclasses import dataclass

import torch

from model.errors import UserError

_FORMATS: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
}


@dataclass(frozen=True)
class Precision:
    """A named pair of number formats: `float32`, `bfloat16` (over float32 states) or `float64`."""

    name: str = "float32"

    def __post_init__(self) -> None:
        if self.name not in _FORMATS:
            raise UserError(f"precision {self.name!r} is unknown; use one of {', '.join(_FORMATS)}")

    @property
    def compute(self) -> torch.dtype:
        """The format of matrix products and of the activations that move between blocks."""
        return _FORMATS[self.name][0]

    @property
    def state(self) -> torch.dtype:
        """The format of master weights, gradients, cells and the numbers of the loss."""
        return _FORMATS[self.name][1]
