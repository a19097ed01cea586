"""The output layer: whole and in shards it is cross_entropy, and it never holds all logits."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.batching import Chunk
from model.loss import Loss
from model.network import BlockSpec, ModelConfig, build_block
from model.precision import Precision
from model.softmax import RecomputingShard, SoftmaxShard, WholeSoftmax

FLOAT64 = Precision("float64")


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many entries the largest tensor has that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.entries = max(self.entries, out.numel())
        return out


def output_layer(
    config: ModelConfig,
    words: tuple[int, int],
    precision: Precision,
    *,
    alone: bool,
    recomputes: bool = False,
) -> Any:
    spec = BlockSpec("softmax.0", "softmax", "target", 0, words, recomputes)
    return build_block(spec, config, precision=precision, alone=alone)


def chunk_of(targets: torch.Tensor) -> Chunk:
    return Chunk(targets, targets, (len(targets),), len(targets))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("bounds", [[(0, 13)], [(0, 5), (5, 13)], [(0, 1), (1, 12), (12, 13)]])
def test_loss_and_gradients_are_those_of_cross_entropy(
    bounds: list[tuple[int, int]], recomputes: bool
) -> None:
    config = ModelConfig(2, 13, hidden_size=5, init_scale=1.0)
    inputs = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 12, 4, 4, 5, 1, 11, 0, 7])
    chunk = chunk_of(targets)
    alone = len(bounds) == 1
    blocks = [
        output_layer(config, words, FLOAT64, alone=alone, recomputes=recomputes) for words in bounds
    ]
    kind = WholeSoftmax if alone else RecomputingShard if recomputes else SoftmaxShard
    assert all(type(block) is kind for block in blocks)
    weight = torch.cat([block.weight.value for block in blocks]).requires_grad_(True)
    bias = torch.cat([block.bias.value for block in blocks]).requires_grad_(True)
    expected = F.cross_entropy(inputs @ weight.t() + bias, targets, reduction="sum")
    expected.backward()  # type: ignore[no-untyped-call]

    made = [block.forward(chunk, {"input": inputs.detach()}) for block in blocks]
    loss = Loss()
    statistics = {f"statistics.{p}": out["statistics"] for p, (out, _) in enumerate(made)}
    merged, _ = loss.forward(chunk, statistics)
    gradients = [
        block.input_gradient(saved, merged)["input"]
        for block, (_, saved) in zip(blocks, made, strict=True)
    ]
    for block, (_, saved) in zip(blocks, made, strict=True):
        block.weight_gradient(saved)

    assert loss.take().total == pytest.approx(expected.item(), rel=1e-12)
    for actual, leaf in (
        (sum(gradients), inputs),
        (torch.cat([block.weight.gradient() for block in blocks]), weight),
        (torch.cat([block.bias.gradient() for block in blocks]), bias),
    ):
        assert leaf.grad is not None
        torch.testing.assert_close(actual, leaf.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_shard_without_any_probability_still_learns_its_word(recomputes: bool) -> None:
    """A word whose shard lies far below another's: its gradient is minus one, all others' zero."""
    config = ModelConfig(2, 4, hidden_size=3)
    for precision, tolerance in ((FLOAT64, 1e-12), (Precision("bfloat16"), 1e-2)):
        block = output_layer(config, (2, 4), precision, alone=False, recomputes=recomputes)
        inputs = torch.ones(1, 3).to(precision.compute)
        out, saved = block.forward(chunk_of(torch.tensor([3])), {"input": inputs})
        merged = {"log_normalizer": out["statistics"][0] + 1000.0}
        gradient = block.input_gradient(saved, merged)["input"]
        block.weight_gradient(saved)
        expected = torch.tensor([[0.0] * 3, [-1.0] * 3])
        for actual, wanted in (
            (gradient, -block.weight.value[1:]),
            (block.weight.gradient(), expected),
            (block.bias.gradient(), expected[:, 0]),
        ):
            torch.testing.assert_close(
                actual, wanted, rtol=tolerance, atol=tolerance, check_dtype=False
            )


@pytest.mark.parametrize("kind", ["whole", "kept", "recomputed"])
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999])
def test_what_is_left_to_learn_of_a_likely_word_survives_bfloat16(
    kind: str, probability: float
) -> None:
    """One less the probability is small there, and not the difference of two rounded numbers."""
    config = ModelConfig(2, 3, hidden_size=1)
    words = (0, 3) if kind == "whole" else (0, 2)
    precision = Precision("bfloat16")
    block = output_layer(
        config, words, precision, alone=kind == "whole", recomputes=kind == "recomputed"
    )
    block.weight.load(torch.zeros_like(block.weight.value))
    bias = torch.tensor([0.0, math.log(1.0 / probability - 1.0), -80.0])[: words[1]]
    block.bias.load(bias)
    inputs = torch.ones(1, 1).to(precision.compute)
    out, saved = block.forward(chunk_of(torch.tensor([0])), {"input": inputs})
    merged, _ = Loss().forward(chunk_of(torch.tensor([0])), {"statistics.0": out["statistics"]})
    block.input_gradient(saved, merged)
    block.weight_gradient(saved)
    rounded = block.bias.compute.double()
    expected = rounded.softmax(0)[0] - 1.0
    assert block.bias.gradient()[0].item() == pytest.approx(expected.item(), rel=0.01)


def test_without_training_nothing_is_kept_and_no_gradient_made() -> None:
    config = ModelConfig(2, 13, hidden_size=5)
    for alone in (True, False):
        block = output_layer(config, (0, 13), FLOAT64, alone=alone)
        inputs = torch.randn(4, 5, dtype=torch.float64)
        out, saved = block.forward(chunk_of(torch.arange(4)), {"input": inputs}, training=False)
        trained, _ = block.forward(chunk_of(torch.arange(4)), {"input": inputs})
        assert saved is None
        assert torch.equal(out["statistics"], trained["statistics"])
        if not alone:
            assert not block.weight.gradient().any()


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_who_keeps_no_exponentials_never_holds_the_logits_of_all_words(
    precision: str, alone: bool
) -> None:
    num_words, num_tokens, num_cells = 20_000, 3000, 8
    config = ModelConfig(2, num_words, hidden_size=num_cells)
    words = (0, num_words)
    block = output_layer(config, words, Precision(precision), alone=alone, recomputes=True)
    inputs = torch.randn(num_tokens, num_cells).to(Precision(precision).compute)
    chunk = chunk_of(torch.arange(num_tokens))
    with LargestTensor() as largest:
        out, saved = block.forward(chunk, {"input": inputs})
        merged, _ = Loss().forward(chunk, {"statistics.0": out["statistics"]})
        block.input_gradient(saved, merged)
        block.weight_gradient(saved)
    assert num_words * num_cells <= largest.entries < num_words * num_tokens / 3


def test_a_shard_keeps_its_exponentials_in_the_compute_format() -> None:
    config = ModelConfig(2, 13, hidden_size=5)
    block = output_layer(config, (3, 13), Precision("bfloat16"), alone=False)
    inputs = torch.randn(4, 5).bfloat16()
    _, saved = block.forward(chunk_of(torch.tensor([0, 3, 12, 5])), {"input": inputs})
    assert (saved.exponentials.dtype, saved.exponentials.shape) == (torch.bfloat16, (4, 10))
    assert saved.held.tolist() == [0.0, 1.0, 1.0, 1.0]
