"""Linear equations by products against the dense solution."""

import numpy as np
import pytest
import torch
from methods import slow_but
from torch import Tensor

from torchdiffeq_lmm.forward import krylov
from torchdiffeq_lmm.forward.linear import (
    DENSE_LIMIT,
    Factors,
    LinearSolver,
    Product,
    from_real,
    is_rounding,
    matrix_of,
    noise,
    to_real,
)
from torchdiffeq_lmm.forward.newton_options import DEFAULT_NEWTON, Newton

FALLBACK_LIMIT = Newton().fallback_limit
EPS = torch.finfo(torch.float64).eps
SIZES = [1, 2, DENSE_LIMIT, DENSE_LIMIT + 1, 150]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contraction(size: int, norm: float = 0.8, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = randn(size, size, dtype=dtype)
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


SMALL_SPACES = Newton(krylov_dimension=20)


def solve(product: Product, rhs: Tensor, eps: float, newton: Newton = DEFAULT_NEWTON) -> Tensor:
    return LinearSolver(newton).solve(product, rhs, eps)


def gmres(product: Product, rhs: Tensor, tolerance: float, dimension: int = 100) -> tuple[Tensor, float]:
    """The solution, and the residual that is told, relative to r."""
    found, residual = krylov.gmres(product, rhs, tolerance, dimension, restarts=10)
    torch.testing.assert_close(residual, rhs - found + product(found), rtol=1e-6, atol=1e-13)
    scale = float(rhs.norm())
    return found, float(residual.norm()) / scale if scale else 0.0


class Counted:
    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.calls = 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ vector


def dense_solution(matrix: Tensor, rhs: Tensor) -> Tensor:
    """In double precision."""
    one = torch.eye(len(rhs), dtype=torch.float64)
    return torch.linalg.solve(one - matrix.double(), rhs.double())


# ------------------------------------------------------------------------------------------------------------- solve


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_the_solution_is_the_dense_one_to_rounding(size: int, dtype: torch.dtype) -> None:
    matrix, rhs = contraction(size, dtype=dtype), randn(size, dtype=dtype, seed=1)
    found = solve(lambda v: matrix @ v, rhs, torch.finfo(rhs.dtype).eps)
    assert found.dtype is dtype
    expected = dense_solution(matrix, rhs)
    assert float((found.double() - expected).norm()) <= 1e3 * torch.finfo(dtype).eps * float(expected.norm())


@pytest.mark.parametrize("size", [3, 60])
def test_complex_equations(size: int) -> None:
    matrix = contraction(size, dtype=torch.complex128)
    rhs = randn(size, dtype=torch.complex128, seed=1)
    found = from_real(solve(lambda v: to_real(matrix @ from_real(v, rhs)), to_real(rhs), EPS), rhs)
    expected = torch.linalg.solve(torch.eye(size) - matrix, rhs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_stiff_equations_of_medium_size_are_solved_by_their_matrix() -> None:
    """The eigenvalues of A are spread over ten decades: no Krylov space of the allowed dimension has the solution."""
    size = 100
    basis, _ = torch.linalg.qr(randn(size, size))
    matrix = -basis @ torch.diag(torch.logspace(-2, 8, size, dtype=torch.float64)) @ basis.T
    rhs = randn(size, seed=1)
    product = Counted(matrix)
    found = solve(product, rhs, EPS, SMALL_SPACES)
    assert product.calls > size
    torch.testing.assert_close(found, dense_solution(matrix, rhs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("part", "is_solved"), [(1e-4, True), (1e-1, False)])
def test_one_entry_is_less_exact_than_it_seems(part: float, is_solved: bool) -> None:
    """As one of 73,728 in a network: its corrections, not its residual, tell how uncertain a solution is."""
    size, newton = 300, Newton(fallback_limit=256)

    def product(v: Tensor) -> Tensor:
        largest, shifted = v.abs().max(), 0.5 * v.roll(1)
        shifted[0] += part * largest * ((1e5 * v[0] / largest) % 1 - 0.5)
        return shifted

    rhs, eps = randn(size, dtype=torch.float32), torch.finfo(torch.float32).eps
    if is_solved:
        exact = dense_solution(0.5 * torch.eye(size, dtype=torch.float64).roll(1, 0), rhs)
        torch.testing.assert_close(solve(product, rhs, eps, newton).double(), exact, rtol=0, atol=part)
    else:
        with pytest.raises(RuntimeError, match=f"linear equation in {size} unknowns was not solved"):
            solve(product, rhs, eps, newton)


def test_stiff_equations_of_large_size_are_given_up() -> None:
    size = FALLBACK_LIMIT + 1
    spectrum = -torch.logspace(-2, 8, size, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"linear equation in {size} unknowns was not solved") as error:
        solve(lambda v: spectrum * v, randn(size), EPS, SMALL_SPACES)
    assert f"more than {FALLBACK_LIMIT}, too many for its matrix" in str(error.value)


@pytest.mark.parametrize(
    ("size", "dtype"), [pytest.param(300, torch.float32, marks=pytest.mark.slow), (120, torch.float64)]
)
def test_a_smooth_residual_is_not_taken_for_rounding(size: int, dtype: torch.dtype) -> None:
    """The step of a heat equation whose terms are 1e4 times as large as their sum."""
    product = laplacian(size, 0.05)
    rhs = (1 + torch.linspace(0, 1, size, dtype=torch.float64)).to(dtype)
    found = solve(product, rhs, torch.finfo(dtype).eps)
    expected = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - matrix_of(product, rhs.double()), rhs.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_what_single_precision_cannot_solve_is_an_error() -> None:
    heat = laplacian(400, 1.0)
    with pytest.raises(RuntimeError, match="ill-conditioned; use smaller steps, or double precision"):
        solve(lambda v: -0.1 * heat(heat(v)), 1 + torch.linspace(0, 1, 400), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("size", [DENSE_LIMIT, DENSE_LIMIT + 1, 100])
def test_products_of_lower_precision(size: int) -> None:
    """As under autocast: what is lowered is A z, not z."""
    rhs = 1 + torch.linspace(0, 1, size)
    found = solve(lambda v: -0.02 * v.bfloat16().float(), rhs, torch.finfo(torch.bfloat16).eps)
    torch.testing.assert_close(found, rhs / 1.02, rtol=5e-4, atol=0)


def test_large_equations_that_are_easy_are_solved() -> None:
    size = FALLBACK_LIMIT + 1
    spectrum = torch.linspace(-0.9, 0.5, size, dtype=torch.float64)
    rhs = randn(size)
    torch.testing.assert_close(solve(lambda v: spectrum * v, rhs, EPS), rhs / (1 - spectrum), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [3, 5])
def test_a_singular_equation_raises(size: int) -> None:
    with pytest.raises(RuntimeError, match="singular"):
        solve(lambda v: v, torch.ones(size, dtype=torch.float64), EPS)


def laplacian(size: int, weight: float) -> Product:
    """A of the heat equation in `size` points, a step of it weighing `weight`."""

    def product(v: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(v, (1, 1))
        return weight * (size + 1) ** 2 * (padded[2:] - 2 * v + padded[:-2])

    return product


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", slow_but([100], [100, 500]))
def test_stiff_neighbours_that_cancel(size: int, dtype: torch.dtype) -> None:
    """The rounding of A z is large beside the sum that it is of."""
    rhs = torch.sin(torch.pi * torch.linspace(0, 1, size + 2, dtype=torch.float64)[1:-1]).to(dtype)
    product = laplacian(size, 0.01)
    found = solve(product, rhs, torch.finfo(dtype).eps)
    eigenvalue = -4 * (size + 1) ** 2 * np.sin(np.pi / 2 / (size + 1)) ** 2
    torch.testing.assert_close(
        found.double(), rhs.double() / (1 - 0.01 * eigenvalue), rtol=0, atol=1e5 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [DENSE_LIMIT + 8, 240])
def test_a_small_sample_is_solved_beside_a_large_one(size: int, dtype: torch.dtype) -> None:
    """Of samples of unlike size each has the solution that it has alone."""
    block = 8
    matrix, rhs = contraction(block, dtype=dtype), randn(size // block, block, dtype=dtype, seed=1)
    scale = torch.logspace(0, -8, size // block).to(dtype)[:, None]

    def product(v: Tensor) -> Tensor:
        return (v.reshape(-1, block) @ matrix.T).reshape(-1)

    found = solve(product, (scale * rhs).reshape(-1), torch.finfo(dtype).eps).reshape(-1, block)
    for sample, alone in zip(found / scale, rhs, strict=True):
        expected = dense_solution(matrix, alone)
        assert float((sample.double() - expected).norm()) <= 1e4 * torch.finfo(dtype).eps * float(expected.norm())


def test_what_one_equation_has_cost_the_next_does_not() -> None:
    solver, size = LinearSolver(), 200
    product, rhs = Counted(matrix_of(laplacian(size, 0.01), randn(size))), randn(size, seed=1)
    costs = []
    for _ in range(4):
        before = product.calls
        found = solver.solve(product, rhs, EPS, weight=0.01)
        torch.testing.assert_close(found, dense_solution(product.matrix, rhs), rtol=1e-9, atol=1e-11)
        costs.append(product.calls - before)
    assert costs[-1] <= 10 < size < max(costs)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-3])
def test_rounding_is_told_from_a_residual(value: float) -> None:
    own, size = torch.full((500,), 1e-15, dtype=torch.float64), 500

    def change(seed: int) -> Tensor:
        # Now and then what rounding makes of an entry cancels.
        return 1e-9 * noise(own, seed).abs()

    residual = 1e-10 * noise(own, seed=100).abs()
    assert is_rounding(residual, own, change)
    residual[size // 2] = value
    assert not is_rounding(residual, own, change)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_factors_of_what_is_not_finite_solve_nothing(value: float) -> None:
    matrix = torch.zeros(3, 3, dtype=torch.float64)
    matrix[1, 2] = value
    assert not torch.isfinite(Factors(matrix).solve(torch.ones(3, dtype=torch.float64))).any()


# ------------------------------------------------------------------------------------------------------------- gmres


@pytest.mark.parametrize("tolerance", [1e-2, 1e-6, 1e-12])
@pytest.mark.parametrize("size", [1, 5, 80])
def test_the_residual_is_what_is_said(size: int, tolerance: float) -> None:
    matrix, rhs = contraction(size), randn(size, seed=1)
    found, remaining = gmres(lambda v: matrix @ v, rhs, tolerance)
    residual = float((rhs - found + matrix @ found).norm() / rhs.norm())
    assert residual <= 1.01 * tolerance
    assert remaining == pytest.approx(residual, rel=1e-2, abs=1e-14)


@pytest.mark.parametrize("values", [1, 2, 4])
def test_as_many_dimensions_as_different_eigenvalues_suffice(values: int) -> None:
    spectrum = torch.linspace(-3, 0.5, values, dtype=torch.float64).repeat(50)
    product = Counted(torch.diag(spectrum))
    rhs = randn(len(spectrum))
    found, remaining = gmres(product, rhs, 1e-10)
    torch.testing.assert_close(found, rhs / (1 - spectrum), rtol=1e-8, atol=1e-8)
    assert remaining <= 1e-10
    # One more product makes the first residual, and one more is made here.
    assert product.calls == values + 2


def test_a_space_that_ends_early_has_the_solution() -> None:
    """r lies in an invariant subspace of two dimensions."""
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[0.0, 5.0], [-5.0, 0.0]])
    matrix[2:, 2:] = contraction(4)
    rhs = torch.tensor([1.0, 2.0, 0, 0, 0, 0], dtype=torch.float64)
    found, remaining = gmres(lambda v: matrix @ v, rhs, 1e-13)
    assert remaining <= 1e-13
    torch.testing.assert_close(found, dense_solution(matrix, rhs), rtol=1e-12, atol=1e-12)


def test_a_right_hand_side_of_zeros_needs_no_space() -> None:
    product = Counted(contraction(4))
    found, remaining = gmres(product, torch.zeros(4, dtype=torch.float64), 1e-10)
    # One makes the residual, and one more is made here.
    assert (found.tolist(), remaining, product.calls) == ([0.0] * 4, 0.0, 2)


def test_a_right_hand_side_that_is_near_enough_is_returned() -> None:
    product, rhs = Counted(1e-8 * contraction(4)), randn(4)
    found, remaining = gmres(product, rhs, 1e-6)
    assert torch.equal(found, rhs)
    assert 0 < remaining <= 1e-8
    assert product.calls == 2


def test_what_is_not_reached_is_told() -> None:
    """(1 - A) is a cyclic shift: only a space of all dimensions has the solution."""
    rhs = torch.zeros(2 * SMALL_SPACES.krylov_dimension, dtype=torch.float64)
    rhs[0] = 1
    found, remaining = gmres(lambda v: v - torch.roll(v, 1), rhs, 1e-10, SMALL_SPACES.krylov_dimension)
    assert remaining == pytest.approx(float((rhs - torch.roll(found, 1)).norm()), rel=1e-10)
    assert remaining > 0.9


# ----------------------------------------------------------------------------------------- real and complex, matrices


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_states_as_real_vectors_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype)
    vector = to_real(x)
    assert vector.dtype is dtype.to_real()
    assert vector.shape == (x.numel() * (2 if dtype.is_complex else 1),)
    assert vector.norm() == pytest.approx(float(x.norm()), rel=1e-6)
    back = from_real(vector, x)
    assert back.dtype is dtype
    assert torch.equal(back, x)


def test_conjugates_and_views_as_real_vectors() -> None:
    x = randn(2, 3, dtype=torch.complex128)
    assert to_real(x.conj())[:2].tolist() == [float(x[0, 0].real), -float(x[0, 0].imag)]
    assert to_real(x.T)[2:4].tolist() == [float(x[1, 0].real), float(x[1, 0].imag)]


def test_the_matrix_of_a_map() -> None:
    matrix = contraction(4)
    product = Counted(matrix)
    assert torch.equal(matrix_of(product, torch.zeros(4, dtype=torch.float64)), matrix)
    assert product.calls == 4
