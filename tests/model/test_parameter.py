"""Initial values that do not depend on the cut, and gradients of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from model.initialization import uniform_rows
from model.parameter import Parameter, ParameterRows, RowParameter
from model.precision import Precision

FLOAT64 = Precision("float64")


@settings(deadline=None)
@given(st.integers(0, 2500), st.integers(0, 2500))
def test_rows_drawn_alone_equal_the_same_rows_of_the_whole(first: int, second: int) -> None:
    start, stop = sorted((first, second))
    whole = uniform_rows(7, "softmax.weight", (2500, 3), 0, 2500, 0.08)
    alone = uniform_rows(7, "softmax.weight", (2500, 3), start, stop, 0.08)
    assert torch.equal(alone, whole[start:stop])


def test_initial_values_are_uniform_and_differ_by_seed_and_name() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        return uniform_rows(seed, name, (3000, 40), 0, 3000, 0.08)

    values = draw(1, "a")
    assert float(values.abs().max()) <= 0.08
    assert float(values.mean().abs()) < 1e-3
    assert float(values.std()) == pytest.approx(0.08 / 3**0.5, rel=0.01)
    assert not torch.equal(values, draw(2, "a"))
    assert not torch.equal(values, draw(1, "b"))


def embedding() -> RowParameter:
    rows = ParameterRows("source_embedding.weight", (6, 2), 0, 6)
    return RowParameter(rows, torch.arange(12, dtype=torch.float64).view(6, 2), FLOAT64)


def test_row_gradients_of_repeated_words_add_up() -> None:
    sparse, dense = embedding(), embedding().value
    first, second = torch.randn(4, 2).double(), torch.randn(2, 2).double()
    sparse.add_row_gradient(torch.tensor([4, 0, 4, 4]), first)
    sparse.add_row_gradient(torch.tensor([0, 5]), second)
    expected = torch.zeros(6, 2).double()
    expected.index_put_((torch.tensor([4, 0, 4, 4]),), first, accumulate=True)
    expected.index_put_((torch.tensor([0, 5]),), second, accumulate=True)

    torch.testing.assert_close(sparse.gradient(), expected)
    assert sparse.squared_norm() == pytest.approx(float(expected.square().sum()))
    sparse.descend(0.5)
    torch.testing.assert_close(sparse.value, dense - 0.5 * expected)
    assert float(sparse.gradient().abs().sum()) == 0.0


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    for parameter in (embedding(), Parameter(embedding().rows, embedding().value, FLOAT64)):
        before = parameter.value.clone()
        assert parameter.squared_norm() == 0.0
        parameter.descend(1.0)
        assert torch.equal(parameter.value, before)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_an_update_of_many_blocks_is_the_rule_and_refreshes_the_copy(name: str) -> None:
    precision = Precision(name)
    rows = ParameterRows("softmax.weight", (700, 1000), 0, 700)
    parameter = Parameter.initial(rows, 0.08, 1, precision, "cpu")
    before = parameter.value.clone()
    gradient = torch.randn(1000, 700, dtype=precision.state).t()  # not in the order of its rows
    parameter.add_gradient(gradient)
    expected = float(gradient.double().square().sum())
    assert parameter.squared_norm() == pytest.approx(expected, rel=1e-12)
    assert parameter.squared_norm() == parameter.squared_norm()
    parameter.descend(0.25)
    assert torch.equal(parameter.value, before.add(gradient, alpha=-0.25))
    assert torch.equal(parameter.compute, parameter.value.to(precision.compute))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float64"])
def test_products_add_up_in_the_state_format(name: str) -> None:
    precision = Precision(name)
    rows = ParameterRows("softmax.weight", (6, 3), 0, 6)
    parameter = Parameter.initial(rows, 0.08, 1, precision, "cpu")
    pairs = [(torch.randn(6, 5), torch.randn(5, 3)) for _ in range(3)]
    for left, right in pairs:
        parameter.add_product(left.t().to(precision.compute), right.to(precision.compute))
    expected = sum((left @ right for left, right in pairs), torch.zeros(6, 3))
    assert parameter.gradient().dtype == precision.state
    tolerance = 0.1 if name == "bfloat16" else 1e-5
    torch.testing.assert_close(
        parameter.gradient().float(), expected, rtol=tolerance, atol=tolerance
    )


def test_rows_of_an_update_reach_the_copy() -> None:
    rows = ParameterRows("table", (6, 2), 0, 6)
    parameter = RowParameter(rows, torch.zeros(6, 2), Precision("bfloat16"))
    parameter.add_row_gradient(torch.tensor([4, 1, 4]), torch.ones(3, 2, dtype=torch.bfloat16))
    parameter.descend(0.5)
    assert parameter.value[:, 0].tolist() == [0.0, -0.5, 0.0, 0.0, -1.0, 0.0]
    assert torch.equal(parameter.compute, parameter.value.bfloat16())


def test_key_names_the_rows_of_a_shard_only() -> None:
    assert ParameterRows("softmax.weight", (10, 2), 0, 10).key == "softmax.weight"
    assert ParameterRows("softmax.weight", (10, 2), 5, 10).key == "softmax.weight[5:10]"


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="float16.*float32, bfloat16, float64"):
        Precision("float16")


@pytest.mark.parametrize("ids", [[1, 4], [4, 1, 4]], ids=["in order", "repeated"])
def test_a_settled_row_gradient_holds_no_tensor_of_others(ids: list[int]) -> None:
    parameter = RowParameter(
        ParameterRows("table", (6, 2), 0, 6), torch.zeros(6, 2).double(), FLOAT64
    )
    given_rows = torch.ones(len(ids), 2).double()
    parameter.add_row_gradient(torch.tensor(ids), given_rows)
    parameter.settle_gradient()
    before = parameter.gradient()
    given_rows.fill_(7.0)
    assert torch.equal(parameter.gradient(), before)
    assert before.sum() == 2.0 * len(ids)


def test_rows_of_several_replicas_are_added_in_the_order_given() -> None:
    one, other = embedding(), embedding()
    one.add_row_gradient(torch.tensor([4, 1, 4]), torch.ones(3, 2, dtype=torch.float64))
    other.add_row_gradient(torch.tensor([1, 5]), torch.full((2, 2), 0.5, dtype=torch.float64))
    parts = [one.row_gradients(), other.row_gradients()]
    assert [rows.tolist() for rows, _ in parts] == [[1, 4], [1, 5]]
    nothing = embedding().row_gradients()
    assert len(nothing[0]) == 0
    assert nothing[1].shape == (0, 2)
    for parameter in (one, other):
        parameter.set_row_gradients([parts[0], nothing, parts[1]])
    assert one.gradient()[:, 0].tolist() == [0.0, 1.5, 0.0, 0.0, 2.0, 0.5]
    assert torch.equal(one.gradient(), other.gradient())
    assert one.squared_norm() == other.squared_norm() == pytest.approx(2 * (1.5**2 + 2**2 + 0.5**2))


def test_a_gradient_to_sum_is_the_gradient_itself() -> None:
    rows = ParameterRows("softmax.weight", (3, 2), 0, 3)
    parameter = Parameter(rows, torch.zeros(3, 2, dtype=torch.float64), FLOAT64)
    assert parameter.gradient_to_sum().tolist() == [[0.0, 0.0]] * 3
    parameter.clear_gradient()
    parameter.add_gradient(torch.arange(6, dtype=torch.float64).view(2, 3).t())
    summed = parameter.gradient_to_sum()
    assert summed.is_contiguous()
    summed *= 2
    assert parameter.gradient().tolist() == [[0.0, 6.0], [2.0, 8.0], [4.0, 10.0]]
