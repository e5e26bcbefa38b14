"""Linear equations by products against the dense solution."""

import pytest
import torch
from torch import Tensor

from torchdiffeq_lmm import linear
from torchdiffeq_lmm.linear import (
    DENSE_LIMIT,
    FALLBACK_LIMIT,
    from_real,
    gmres,
    matrix_of,
    solve,
    to_real,
)

EPS = torch.finfo(torch.float64).eps
SIZES = [1, 2, DENSE_LIMIT, DENSE_LIMIT + 1, 150]


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contraction(size: int, norm: float = 0.8, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = randn(size, size, dtype=dtype)
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


@pytest.fixture
def small_spaces(monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest dimension of a Krylov space."""
    monkeypatch.setattr(linear, "KRYLOV_LIMIT", 20)
    return 20


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


@pytest.mark.usefixtures("small_spaces")
def test_stiff_equations_of_medium_size_are_solved_by_their_matrix() -> None:
    """The eigenvalues of A are spread over ten decades: no Krylov space of the allowed dimension has the solution."""
    size = 100
    basis, _ = torch.linalg.qr(randn(size, size))
    matrix = -basis @ torch.diag(torch.logspace(-2, 8, size, dtype=torch.float64)) @ basis.T
    rhs = randn(size, seed=1)
    product = Counted(matrix)
    found = solve(product, rhs, EPS)
    assert product.calls > size
    torch.testing.assert_close(found, dense_solution(matrix, rhs), rtol=1e-6, atol=1e-7)


def test_stiff_equations_of_large_size_are_given_up(small_spaces: int) -> None:
    size = FALLBACK_LIMIT + 1
    spectrum = -torch.logspace(-2, 8, size, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"linear equation in {size} unknowns was not solved") as error:
        solve(lambda v: spectrum * v, randn(size), EPS)
    assert "GMRES stopped at a relative residual of" in str(error.value)


def test_large_equations_that_are_easy_are_solved() -> None:
    size = FALLBACK_LIMIT + 1
    spectrum = torch.linspace(-0.9, 0.5, size, dtype=torch.float64)
    rhs = randn(size)
    torch.testing.assert_close(solve(lambda v: spectrum * v, rhs, EPS), rhs / (1 - spectrum), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [3, 5])
def test_a_singular_equation_raises(size: int) -> None:
    with pytest.raises(RuntimeError, match="singular"):
        solve(lambda v: v, torch.ones(size, dtype=torch.float64), EPS)


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
    # One more product makes the first residual.
    assert product.calls == values + 1


def test_a_space_that_ends_early_has_the_solution() -> None:
    """r lies in an invariant subspace of two dimensions."""
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    matrix[:2, :2] = torch.tensor([[0.0, 5.0], [-5.0, 0.0]])
    matrix[2:, 2:] = contraction(4)
    rhs = torch.tensor([1.0, 2.0, 0, 0, 0, 0], dtype=torch.float64)
    found, remaining = gmres(lambda v: matrix @ v, rhs, 1e-13)
    assert remaining <= 1e-13
    torch.testing.assert_close(found, dense_solution(matrix, rhs), rtol=1e-12, atol=1e-12)


def test_a_right_hand_side_of_zeros_needs_no_product() -> None:
    product = Counted(contraction(4))
    found, remaining = gmres(product, torch.zeros(4, dtype=torch.float64), 1e-10)
    assert (found.tolist(), remaining, product.calls) == ([0.0] * 4, 0.0, 0)


def test_a_right_hand_side_that_is_near_enough_is_returned() -> None:
    product, rhs = Counted(1e-8 * contraction(4)), randn(4)
    found, remaining = gmres(product, rhs, 1e-6)
    assert torch.equal(found, rhs)
    assert 0 < remaining <= 1e-8
    assert product.calls == 1


def test_what_is_not_reached_is_told(small_spaces: int) -> None:
    """(1 - A) is a cyclic shift: only a space of all dimensions has the solution."""
    rhs = torch.zeros(2 * small_spaces, dtype=torch.float64)
    rhs[0] = 1
    found, remaining = gmres(lambda v: v - torch.roll(v, 1), rhs, 1e-10)
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
