"""The networks of benchmarks/decoding.md: a trained one, and the same one in a large one's size.

A network of the paper's size that was never trained rambles, and training one takes days here. So
the large network is the small trained one, with zeros around its weights: it finds the same
translations, by the same search, at the cost of the large one. Layers that the small one lacks hand
their input on; words that it lacks have a bias that never lets them win. How long a product takes
does not depend on the numbers in it.
"""

import torch
from torch import Tensor

from model.network import ModelConfig
from model.precision import Precision
from model.seq2seq import Seq2Seq

# A layer that hands on its input works in the straight part of its tanh, so its output is smaller.
_SCALE = 0.02
_OPEN, _SHUT = 20.0, -20.0
# Far from all others, but an exponential that underflows takes ten times as long.
_NEVER = -60.0


def enlarged(
    small: Seq2Seq, num_layers: int, hidden_size: int, num_words: int, precision: str = "float32"
) -> Seq2Seq:
    """Return the network with more layers, cells (embeddings likewise) and words."""
    config = ModelConfig(num_words, num_words, num_layers, hidden_size, hidden_size, init_scale=0.0)
    old = {name: parameter.value for name, parameter in small.parameters().items()}
    new = {name: torch.zeros(shape) for name, shape in config.parameter_shapes().items()}
    for name in ("source_embedding.weight", "target_embedding.weight"):
        _put(new[name], old[name])
    for network in ("encoder", "decoder"):
        for layer in range(num_layers):
            _fill_layer(new, old, f"{network}.{layer}", small.config.hidden_size)
    passed = num_layers > small.config.num_layers
    _put(new["softmax.weight"], old["softmax.weight"] / (_SCALE if passed else 1.0))
    new["softmax.bias"].fill_(_NEVER)
    _put(new["softmax.bias"], old["softmax.bias"])
    model = Seq2Seq(config, Precision(precision))
    model.load(new)
    return model


def _fill_layer(new: dict[str, Tensor], old: dict[str, Tensor], layer: str, num_cells: int) -> None:
    parts = {part: _gates(new[f"{layer}.{part}"]) for part in ("weight_ih", "weight_hh", "bias")}
    if f"{layer}.bias" in old:
        for part, gates in parts.items():
            for gate, value in zip(gates, _gates(old[f"{layer}.{part}"]), strict=True):
                _put(gate, value)
        return
    # The first added layer makes its input smaller; those above it keep what they get.
    is_first = f"{layer[:-1]}{int(layer[-1]) - 1}.bias" in old
    i, f, _, o = parts["bias"]
    i.fill_(_OPEN)
    f.fill_(_SHUT)
    o.fill_(_OPEN)
    parts["weight_ih"][2][:num_cells, :num_cells] = torch.eye(num_cells) * (
        _SCALE if is_first else 1.0
    )


def _gates(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(4, dim=0)


def _put(target: Tensor, value: Tensor) -> None:
    target[tuple(slice(size) for size in value.shape)] = value
