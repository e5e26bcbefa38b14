"""Nodes, steps and placements."""

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm.forward.grid import (
    MAX_STEPS,
    Grid,
    check_step_size,
    check_times,
    constructed_grid,
    grid_of_times,
    place,
    uniform_grid,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def times(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def made(grid: Any, t: Tensor) -> Grid:
    return constructed_grid(lambda func, y0, t: grid, None, torch.zeros(()), t)


def check_invariants(grid: Grid, t: Tensor) -> None:
    assert grid.nodes.dtype is grid.steps.dtype is torch.float64
    assert grid.nodes.device.type == grid.steps.device.type == "cpu"
    assert grid.nodes[0] == t[0].double()
    assert grid.nodes[-1] == t[-1].double()
    assert (grid.nodes.diff() > 0).all()
    assert grid.steps.shape == (len(grid.nodes) - 1,)


# ---------------------------------------------------------------------------------------------------- uniform_grid

# Both times and the step size are decimals that binary floats only approximate; the counts are those of the decimals.
DECIMALS = [
    ("0", "1.1", "0.1"),
    ("0", "0.3", "0.1"),
    ("0", "0.7", "0.1"),
    ("0", "2.9", "0.1"),
    ("0", "1", "0.1"),
    ("0", "0.6", "0.2"),
    ("0", "4.35", "0.15"),
    ("-0.3", "0.8", "0.1"),
    ("0.1", "0.7", "0.3"),
    ("100", "100.3", "0.1"),
    ("-2.7", "-0.3", "0.8"),
    ("0", "33.3", "0.37"),
    ("0", "10", "0.001"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("start", "end", "step_size"), DECIMALS)
def test_step_sizes_that_divide_up_to_rounding(start: str, end: str, step_size: str, dtype: torch.dtype) -> None:
    t = times(float(start), float(end), dtype=dtype)
    count = (Fraction(end) - Fraction(start)) / Fraction(step_size)
    assert count.denominator == 1
    grid = uniform_grid(t, float(step_size))
    check_invariants(grid, t)
    assert len(grid.steps) == count
    # Equal steps are equal to the last bit, so that leapfrog takes its uniform form.
    assert len(set(grid.steps[:-1].tolist())) == 1
    rounding = 4 * torch.finfo(dtype).eps * max(abs(float(start)), abs(float(end)))
    assert grid.steps.tolist() == pytest.approx([float(step_size)] * int(count), abs=rounding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("step_size", [0.1, 0.3, 0.7, 0.013, 1 / 3])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 29, 100])
def test_computed_multiples_of_the_step_size(count: int, step_size: float, dtype: torch.dtype) -> None:
    ends = [count * step_size]
    if count < 100:
        # A longer sum gathers more than a few units in the last place.
        ends.append(sum([step_size] * count))
    for end in ends:
        assert len(uniform_grid(times(0.0, end, dtype=dtype), step_size).steps) == count


@pytest.mark.parametrize(("end", "step_size", "count"), [(1.0, 0.25, 4), (0.3, 0.1, 3), (1.0, 0.1, 10), (2.0, 0.3, 7)])
def test_step_sizes_for_bfloat16_times(end: float, step_size: float, count: int) -> None:
    t = times(0.0, end, dtype=torch.bfloat16)
    grid = uniform_grid(t, step_size)
    check_invariants(grid, t)
    assert len(grid.steps) == count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", [0.5, 1.1, 3.3, 7.7])
@pytest.mark.parametrize("step_size", [0.01, 0.1, 0.3, 0.77])
def test_steps_are_never_longer_than_asked_for(end: float, step_size: float, dtype: torch.dtype) -> None:
    t = times(0.0, end, dtype=dtype)
    grid = uniform_grid(t, step_size)
    check_invariants(grid, t)
    assert float(grid.steps.max()) <= 1.011 * step_size
    assert len(grid.steps) <= math.ceil(float(t[-1]) / step_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("end", "step_size", "count", "last"), [(1.0, 0.3, 4, 0.1), (2.0, 0.75, 3, 0.5)])
def test_truncated_last_step(end: float, step_size: float, count: int, last: float, dtype: torch.dtype) -> None:
    t = times(0.0, 0.2, end, dtype=dtype)
    grid = uniform_grid(t, step_size)
    check_invariants(grid, t)
    assert grid.steps.tolist() == pytest.approx([step_size] * (count - 1) + [last], rel=1e-6)
    assert grid.nodes.tolist()[:-1] == pytest.approx([n * step_size for n in range(count)], rel=1e-15)
    assert len(set(grid.steps[:-1].tolist())) == 1


@pytest.mark.parametrize("step_size", [1.0, 1.5, 1e30])
def test_a_step_size_as_long_as_the_interval_or_longer_is_one_step(step_size: float) -> None:
    grid = uniform_grid(times(3.0, 3.4, 4.0), step_size)
    assert grid.nodes.tolist() == [3.0, 4.0]
    assert grid.steps.tolist() == [1.0]


def test_a_remainder_above_rounding_is_a_step() -> None:
    grid = uniform_grid(times(0.0, 1.0 + 1e-9), 0.1)
    assert len(grid.steps) == 11
    assert float(grid.steps[-1]) == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("step_size", [9.9e-8, 1e-12, 5e-324])
def test_too_many_steps(step_size: float) -> None:
    with pytest.raises(ValueError, match=r"step_size") as error:
        uniform_grid(times(0.0, 1.0), step_size)
    assert str(step_size) in str(error.value)
    assert str(MAX_STEPS) in str(error.value)


def test_the_limit_of_steps_is_ten_million() -> None:
    assert MAX_STEPS == 10_000_000


def test_uniform_nodes_move_with_the_times() -> None:
    t = times(0.5, 0.9, 2.0).requires_grad_()
    grid = uniform_grid(t, 0.4)
    assert grid.requires_grad
    jacobian = torch.autograd.functional.jacobian(lambda t: uniform_grid(t, 0.4).nodes, t)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[:-1, 0] = 1
    expected[-1, 2] = 1
    assert torch.equal(jacobian, expected)
    assert torch.equal(
        torch.autograd.functional.jacobian(lambda t: uniform_grid(t, 0.4).steps, t), expected.diff(dim=0)
    )


# --------------------------------------------------------------------------------------------------- grid_of_times


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_of_times(dtype: torch.dtype) -> None:
    t = times(-0.5, 0.25, 0.5, 2.0, dtype=dtype)
    grid = grid_of_times(t)
    check_invariants(grid, t)
    assert grid.nodes.tolist() == [-0.5, 0.25, 0.5, 2.0]
    assert grid.steps.tolist() == [0.75, 0.25, 1.5]
    assert not grid.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [2, 3, 10, 77])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (-3.7, 2.9), (10.0, 10.1)])
def test_equal_steps_are_found_behind_the_rounding_of_the_times(
    start: float, end: float, count: int, dtype: torch.dtype
) -> None:
    t = torch.linspace(start, end, count + 1, dtype=dtype)
    assert len(set(grid_of_times(t).steps.tolist())) == 1
    with_last = torch.cat([t, t[-1:] + 0.37 * (end - start)])
    steps = grid_of_times(with_last).steps.tolist()
    assert len(set(steps[:-1])) == 1
    assert steps[-1] == pytest.approx(0.37 * (end - start), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_the_differences_of_the_nodes_up_to_their_rounding(dtype: torch.dtype) -> None:
    """Each node is rounded by half a unit in the last place; what is further from equal is not equal."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        jitter = torch.rand(9, generator=generator, dtype=torch.float64) - 0.5
        t = (100 + torch.arange(9) + 0.5 * jitter).to(dtype).unique()
        differences = t.double().diff()
        spacing = float(torch.nextafter(t.abs().max(), torch.full((), math.inf, dtype=dtype)) - t.abs().max())
        assert float((grid_of_times(t).steps - differences).abs().max()) <= 2 * spacing


def test_nodes_of_times_carry_the_gradient() -> None:
    t = times(0.0, 0.1, 0.3).requires_grad_()
    grid = grid_of_times(t)
    assert grid.requires_grad
    (grad,) = torch.autograd.grad(grid.steps[1], t)
    assert grad.tolist() == [0.0, -1.0, 1.0]


# ------------------------------------------------------------------------------------------------ constructed_grid


def test_the_constructor_is_given_what_it_is_promised() -> None:
    arguments: list[Any] = []

    def constructor(*args: Any) -> Tensor:
        arguments.extend(args)
        return torch.linspace(0, 1, 5)

    func, y0, t = object(), torch.zeros(2), times(0.0, 0.4, 1.0)
    assert constructed_grid(constructor, func, y0, t).nodes.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert arguments[0] is func
    assert arguments[1] is y0
    assert arguments[2] is t


@pytest.mark.parametrize("made_dtype", DTYPES)
@pytest.mark.parametrize("t_dtype", DTYPES)
def test_ends_that_agree_up_to_rounding_are_those_of_t(made_dtype: torch.dtype, t_dtype: torch.dtype) -> None:
    t = times(0.1, 0.7, dtype=t_dtype)
    grid = made(times(0.1, 0.25, 0.5, 0.7, dtype=made_dtype), t)
    check_invariants(grid, t)
    assert grid.nodes[1:-1].tolist() == [0.25, 0.5]


def test_the_ends_have_the_gradient_of_t_and_the_inside_that_of_the_constructor() -> None:
    t = times(0.0, 2.0).requires_grad_()
    inner = times(0.5, 1.5).requires_grad_()
    grid = made(torch.cat([times(0.0), inner, times(2.0)]), t)
    weights = times(2.0, 3.0, 5.0, 7.0)
    grads = torch.autograd.grad(grid.nodes @ weights, (t, inner))
    assert grads[0].tolist() == [2.0, 7.0]
    assert grads[1].tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    ("grid", "got"),
    [
        ([0.0, 1.0], "list"),
        (None, "NoneType"),
        (np.linspace(0, 1, 3), "ndarray"),
        (torch.tensor([0, 1]), "torch.int64"),
        (torch.tensor([0.0, 1.0], dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_a_grid_of_another_type(grid: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"grid_constructor must return .*{re.escape(got)}"):
        made(grid, times(0.0, 1.0))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 1), (1, 3)])
def test_a_grid_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"grid_constructor must return .*{re.escape(str(shape))}"):
        made(torch.zeros(shape), times(0.0, 1.0))


@pytest.mark.parametrize(
    ("grid", "index", "value"),
    [
        ((0.0, 0.5, 0.5, 1.0), 2, "0.5"),
        ((0.0, 0.75, 0.25, 1.0), 2, "0.25"),
        ((0.0, math.nan, 1.0), 1, "nan"),
        ((0.0, 0.5, math.inf), 2, "inf"),
        ((-math.inf, 0.5, 1.0), 0, "-inf"),
        ((0.0, 0.5, 1.5, 1.0), 3, "1.0"),
        ((1.0, 0.5, 0.0), 1, "0.5"),
    ],
)
def test_a_grid_that_is_not_strictly_monotonic(grid: tuple[float, ...], index: int, value: str) -> None:
    with pytest.raises(ValueError, match=rf"grid_constructor must .*entry {index} is {re.escape(value)}"):
        made(times(*grid), times(0.0, 1.0))


@pytest.mark.parametrize(
    ("grid", "index", "value"),
    [
        ((0.1, 0.5, 1.0), 0, "0.1"),
        ((-0.1, 0.5, 1.0), 0, "-0.1"),
        ((0.0, 0.5, 0.9), -1, "0.9"),
        ((0.0, 0.5, 1.1), -1, "1.1"),
        ((0.0, 0.5, 1.0 + 1e-12), -1, "1.000000000001"),
    ],
)
def test_a_grid_that_does_not_begin_and_end_with_t(grid: tuple[float, ...], index: int, value: str) -> None:
    with pytest.raises(ValueError, match=rf"grid_constructor must .*entry {index} is {re.escape(value)}"):
        made(times(*grid), times(0.0, 1.0))


def test_an_end_that_rounding_moves_behind_the_last_node_is_refused() -> None:
    """The last node but one lies at the end of t up to rounding: no positive step is left for it."""
    end = 1.0
    grid = times(0.0, 0.5, end + 2e-16, end + 4e-16)
    with pytest.raises(ValueError, match="grid_constructor"):
        made(grid, times(0.0, end))


# ----------------------------------------------------------------------------------------------------------- place


def test_outputs_between_nodes() -> None:
    grid = made(times(0.0, 0.5, 0.75, 2.0), times(0.0, 2.0))
    placements = place(times(0.0, 0.125, 0.5, 0.7, 1.0, 2.0), grid)
    assert [p.node for p in placements] == [0, 0, 1, 1, 2, 3]
    assert [p.shift for p in placements] == [None] * 6
    fractions = [p.fraction for p in placements]
    assert [fractions[i] for i in (0, 2, 5)] == [None] * 3
    assert [fractions[i] for i in (1, 3, 4)] == pytest.approx([0.25, 0.8, 0.2], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("start", [0.0, -1.3, 20.0])
def test_outputs_on_nodes_up_to_rounding(start: float, requires_grad: bool, dtype: torch.dtype) -> None:
    t = torch.tensor([start + float(Fraction(n, 10)) for n in range(12)], dtype=dtype, requires_grad=requires_grad)
    placements = place(t, uniform_grid(t, 0.1))
    assert [p.node for p in placements] == list(range(12))
    assert [p.fraction for p in placements] == [None] * 12
    assert [p.shift is not None for p in placements] == [False] + [requires_grad] * 10 + [False]


def test_outputs_on_nodes_for_bfloat16_times() -> None:
    t = times(0.0, 0.1, 0.2, 0.3, 0.5, 1.0, dtype=torch.bfloat16)
    placements = place(t, uniform_grid(t, 0.1))
    for p, node in zip(placements, (0, 1, 2, 3, 5, 10), strict=True):
        # Never moved by more than a hundredth of a step, never into another step.
        assert p.node + (p.fraction or 0.0) == pytest.approx(node, abs=0.04)


@pytest.mark.parametrize("offset", [1e-12, 1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_outputs_beside_a_node(offset: float, sign: int) -> None:
    t = times(0.0, 0.5 + sign * offset, 1.0)
    placement = place(t, uniform_grid(t, 0.25))[1]
    assert placement.node == (2 if sign > 0 else 1)
    assert isinstance(placement.fraction, float)
    fraction = placement.fraction if sign > 0 else 1 - placement.fraction
    assert fraction == pytest.approx(4 * offset, rel=1e-3)


def test_outputs_within_a_tiny_step_stay_there() -> None:
    """A step of a few units in the last place, with an output in its middle."""
    eps = torch.finfo(torch.float64).eps
    t = times(0.0, 0.5 + 2 * eps, 1.0)
    placements = place(t, made(times(0.0, 0.5, 0.5 + 4 * eps, 1.0), t))
    assert (placements[1].node, placements[1].fraction) == (1, 0.5)


def test_placements_follow_t_and_the_grid() -> None:
    def fractions(t: Tensor, inner: Tensor) -> Tensor:
        grid = constructed_grid(lambda f, y, t: torch.cat([t[:1], inner, t[-1:]]), None, t, t)
        return torch.stack([p.fraction for p in place(t, grid) if isinstance(p.fraction, Tensor)])

    t, inner = times(0.1, 0.25, 0.4, 0.9, 1.3).requires_grad_(), times(0.35, 0.8).requires_grad_()
    assert fractions(t, inner).shape == (3,)
    assert torch.autograd.gradcheck(fractions, (t, inner))


def test_the_shift_of_an_output_on_a_node_has_the_gradient_of_both() -> None:
    t = times(0.0, 0.5, 1.0).requires_grad_()
    placement = place(t, uniform_grid(t, 0.25))[1]
    assert placement.fraction is None
    assert placement.shift is not None
    assert placement.shift.item() == 0
    (grad,) = torch.autograd.grad(placement.shift, t)
    assert grad.tolist() == [-1.0, 1.0, 0.0]


# ---------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    "step_size",
    [
        1,
        0.1,
        1e-300,
        np.float32(0.5),
        np.float64(0.5),
        Fraction(1, 3),
        torch.tensor(0.1),
        torch.ones(1),
        torch.tensor(2),
    ],
)
def test_good_step_sizes(step_size: Any) -> None:
    check_step_size(step_size)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("step_size", [0.0, -0.0, -0.1, math.inf, -math.inf, math.nan])
def test_step_sizes_that_are_not_positive_and_finite(step_size: float, as_tensor: bool) -> None:
    with pytest.raises(ValueError, match=rf"step_size must be positive and finite, got {step_size}"):
        check_step_size(torch.tensor(step_size, dtype=torch.float64) if as_tensor else step_size)


@pytest.mark.parametrize(
    "step_size",
    ["0.1", True, 1j, [0.1], (0.1,), {}, torch.tensor(True), torch.tensor(1j), torch.ones(2), torch.ones(0), object()],
)
def test_step_sizes_of_another_type(step_size: Any) -> None:
    with pytest.raises(TypeError, match=r"step_size must be a positive real number, got ") as error:
        check_step_size(step_size)
    assert repr(step_size) in str(error.value)


def test_a_step_size_that_requires_a_gradient() -> None:
    with pytest.raises(ValueError, match=r"step_size must not require a gradient.*detach"):
        check_step_size(torch.tensor(0.1, requires_grad=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_times(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"t must hold at least one time"):
        check_times(times(dtype=dtype))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_times_that_are_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match=rf"t must be finite, got .*{value}"):
        check_times(times(0.0, value))
    check_times(times(0.0))


def test_errors_are_in_the_time_of_the_user() -> None:
    with pytest.raises(ValueError, match=r"its entry -1 is 1\.5, t\[-1\] is 1\.0"):
        constructed_grid(lambda func, y0, t: times(-2.0, -1.5), None, torch.zeros(1), times(-2.0, -1.0), reverse=True)
    with pytest.raises(ValueError, match=r"its entry 2 is 1\.75, after 1\.5"):
        constructed_grid(
            lambda func, y0, t: times(-2.0, -1.5, -1.75, -1.0), None, torch.zeros(1), times(-2.0, -1.0), reverse=True
        )


def test_steps_tiny_beside_the_time_stay_what_they_are() -> None:
    """Their differences are above the rounding of the times by little, and yet not equal."""
    eps = torch.finfo(torch.float64).eps
    nodes = times(1.0, 1.0 + 4 * eps, 1.0 + 6 * eps, 1.0 + 10 * eps)
    assert (grid_of_times(nodes).steps / eps).tolist() == [4.0, 2.0, 4.0]


def test_a_step_size_beyond_floating_point() -> None:
    with pytest.raises(ValueError, match="step_size must be positive and finite, got inf"):
        check_step_size(10**400)
