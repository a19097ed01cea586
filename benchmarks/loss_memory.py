"""Measures the memory that the loss takes at its peak, beside what its tensors need.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --words 80000 --tokens 3712

The whole output layer of one rank makes its logits for some rows at a time, so beside inputs,
weights and both gradients there is only a group of logits. The peak is the system's: resident
memory from just before the forward operation to its end, read in a process of its own.
"""

import argparse
from pathlib import Path

import torch

from model.batching import Chunk
from model.network import ModelConfig, build_block, network_blocks
from model.precision import Precision

_MIB = 1 << 20


def main() -> None:
    """Print the peak, what is needed, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, default=32_000, help="target vocabulary")
    parser.add_argument("--cells", type=int, default=1000, help="numbers of an output vector")
    parser.add_argument("--tokens", type=int, default=3712, help="target words of the batch")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(2, options.words, hidden_size=options.cells)
    spec = next(spec for spec in network_blocks(config) if spec.kind == "softmax")
    block = build_block(spec, config, precision=Precision(options.precision), alone=True)
    inputs = torch.rand(options.tokens, options.cells).to(Precision(options.precision).compute)
    targets = torch.randint(options.words, (options.tokens,))
    chunk = Chunk(targets, targets, (options.tokens,), options.tokens)
    weights = sum(_bytes(p.value, p.compute) for p in block.parameters)
    gradients = sum(p.value.nbytes for p in block.parameters)
    # The library's own memory for products is there before the first large one.
    torch.rand(64, options.cells) @ torch.rand(options.cells, 64)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    block.forward(chunk, {"input": inputs})
    above = _resident("VmHWM") - before
    needed = weights + gradients + 2 * inputs.nbytes
    peak = weights + inputs.nbytes + above
    print(f"words {options.words:,}, tokens {options.tokens:,}, {options.precision}")
    print(f"needed by inputs, outputs, weights and gradients: {needed / _MIB:,.0f} MiB")
    print(f"peak: {peak / _MIB:,.0f} MiB, {peak / needed:.2f} times that")
    logits = options.words * options.tokens * 4
    print(f"float32 logits of the whole batch would be {logits / _MIB:,.0f} MiB more")


def _bytes(value: torch.Tensor, compute: torch.Tensor) -> int:
    return value.nbytes + (0 if compute is value else compute.nbytes)


def _resident(field: str) -> int:
    """Return a line of the process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this needs Linux's /proc")


if __name__ == "__main__":
    main()
