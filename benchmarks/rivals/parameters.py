"""Initial values of the rivals: those that this project's blocks draw for themselves.

`torch.nn.LSTM` has two biases a layer where the model has one. The second is zero and stays so:
trained like the first it would move their sum twice as far as one bias moves.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from benchmarks.rivals.task import Task
from model.initialization import uniform_rows

Module = TypeVar("Module", bound=nn.Module)


def without_values(make: Callable[[], Module]) -> Module:
    """Build a module without drawing values for it, which would take as long as some steps."""
    with torch.device("meta"):
        module = make()
    return module.to_empty(device="cpu")


def fill(tensor: torch.Tensor, name: str, task: Task) -> None:
    """Set a tensor to the initial values of the parameter of that name."""
    shape = task.model.parameter_shapes()[name]
    drawn = uniform_rows(task.seed, name, shape, 0, shape[0], task.model.init_scale)
    with torch.no_grad():
        tensor.copy_(drawn)


def fill_lstm(lstm: nn.LSTM, network: str, layers: Iterable[int], task: Task) -> None:
    """Set the layers of a torch.nn.LSTM to the given ones of `encoder` or `decoder`."""
    for place, layer in enumerate(layers):
        fill(getattr(lstm, f"weight_ih_l{place}"), f"{network}.{layer}.weight_ih", task)
        fill(getattr(lstm, f"weight_hh_l{place}"), f"{network}.{layer}.weight_hh", task)
        fill(getattr(lstm, f"bias_ih_l{place}"), f"{network}.{layer}.bias", task)
        second = getattr(lstm, f"bias_hh_l{place}")
        with torch.no_grad():
            second.zero_()
        second.requires_grad_(False)
