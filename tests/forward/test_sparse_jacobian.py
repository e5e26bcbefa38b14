"""What the user knows of the Jacobian of a large system: its structure, itself, or how to solve with it."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torchdiffeq
from torch import Tensor

from torchdiffeq_lmm import odeint
from torchdiffeq_lmm.forward.krylov import gmres
from torchdiffeq_lmm.forward.sparse_matrix import SparseFactors, Sparsity

N, H, STEPS = 60, 0.5, 4


def drawn(size: int, density: float, seed: int = 0) -> sp.csc_array:
    rng = np.random.default_rng(seed)
    return sp.csc_array(rng.standard_normal((size, size)) * (rng.random((size, size)) < density))


def stiff() -> np.ndarray:
    """A stiff matrix without symmetry, in structure neither."""
    matrix = drawn(N, 0.04).toarray()
    matrix[np.arange(N), np.arange(N)] = -np.geomspace(1.0, 1e4, N)
    return matrix


A = stiff()
A_TORCH = torch.from_numpy(A)
Y0 = np.cos(np.arange(N))
KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "dense tensor": torch.from_numpy,
    "array": lambda m: m,
    "csr": sp.csr_array,
    "coo matrix": sp.coo_matrix,
    "sparse tensor": lambda m: torch.from_numpy(m).to_sparse_coo(),
}


def euler(matrix: np.ndarray, y: np.ndarray, h: float = H) -> np.ndarray:
    """By the implicit Euler method."""
    for _ in range(STEPS):
        y = np.linalg.solve(np.eye(len(y)) - h * matrix, y)
    return y


def solved(f: Callable[[Tensor, Any], Any], y0: Any = None, sign: int = 1, **options: Any) -> Any:
    times = sign * torch.tensor([0.0, STEPS * H], dtype=torch.float64)
    y0 = torch.from_numpy(Y0) if y0 is None else y0
    return odeint(f, y0, times, method="bdf1", options={"step_size": H, **options}, rtol=1e-9, atol=1e-11)


def linear(t: Tensor, y: Tensor) -> Tensor:
    return y @ A_TORCH.T


class TestMatrices:
    @pytest.mark.parametrize("seed", range(3))
    def test_columns_of_a_group_have_no_row_in_common(self, seed: int) -> None:
        structure = drawn(40, 0.1, seed)
        groups = Sparsity(structure).groups
        for group in range(groups.max() + 1):
            assert (structure[:, groups == group] != 0).sum(1).max() <= 1

    def test_a_banded_matrix_has_as_many_groups_as_diagonals(self) -> None:
        diagonals = [np.ones(98), np.ones(100), np.ones(98)]
        assert Sparsity(sp.diags_array(diagonals, offsets=[-2, 0, 2]).tocsc()).count == 3

    def test_a_matrix_is_made_of_products(self) -> None:
        matrix = drawn(40, 0.1)
        dense, asked = torch.from_numpy(matrix.toarray()), 0

        def product(v: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            return dense @ v

        sparsity = Sparsity(matrix)
        found = sparsity.matrix(product, torch.logspace(-3, 3, 40, dtype=torch.float64))
        np.testing.assert_allclose(found.toarray(), matrix.toarray(), rtol=1e-12)
        assert asked == sparsity.count < 20

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_factors_solve(self, symmetric: bool) -> None:
        matrix = drawn(40, 0.1)
        matrix = matrix + matrix.T if symmetric else matrix
        rhs = torch.from_numpy(np.cos(np.arange(40.0)))
        wanted = np.linalg.solve(np.eye(40) - 0.7 * matrix.toarray(), rhs.numpy())
        np.testing.assert_allclose(SparseFactors(matrix.tocsc(), 0.7).solve(rhs).numpy(), wanted, rtol=1e-9)

    @pytest.mark.parametrize("entry", [1.0, np.nan])
    def test_factors_of_what_has_none_make_nan(self, entry: float) -> None:
        factors = SparseFactors(sp.csc_array(np.diag([0.5, entry])), 1.0)
        assert bool(torch.isnan(factors.solve(torch.ones(2))).all())


class TestSolves:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("option", ["jac_sparsity", "jac"])
    def test_a_stiff_system(self, option: str, kind: str) -> None:
        given = KINDS[kind]((A != 0).astype(float) if option == "jac_sparsity" else A)
        y = solved(linear, **{option: given if option == "jac_sparsity" else lambda t, y: given})
        np.testing.assert_allclose(y[-1].numpy(), euler(A, Y0), rtol=1e-6, atol=1e-10)

    @pytest.mark.parametrize("option", ["jac_sparsity", "jac", "preconditioner"])
    def test_backwards_in_time(self, option: str) -> None:
        seen = []

        def preconditioner(t: Tensor, y: Tensor, b: float) -> Callable[[Tensor], Tensor]:
            seen.append((float(t), b))
            return lambda v: torch.linalg.solve(torch.eye(N) - b * A_TORCH.neg(), v)

        given: Any = {"jac_sparsity": A != 0, "jac": lambda t, y: -A_TORCH, "preconditioner": preconditioner}[option]
        y = solved(lambda t, y: -linear(t, y), sign=-1, **{option: given})
        np.testing.assert_allclose(y[-1].numpy(), euler(A, Y0), rtol=1e-6, atol=1e-10)
        assert all(t < 0 and b == -H for t, b in seen)

    @pytest.mark.parametrize("option", ["jac_sparsity", "jac", "preconditioner"])
    def test_a_tuple(self, option: str) -> None:
        y0 = tuple(torch.from_numpy(Y0).split([20, N - 20]))

        def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return linear(t, torch.cat([y[0].flatten(), y[1]])).split([20, N - 20])

        def jac(t: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
            assert [part.shape for part in y] == [(20,), (N - 20,)]
            return A_TORCH

        def preconditioner(t: Tensor, y: tuple[Tensor, Tensor], b: float) -> Callable[[Any], Any]:
            inverse = torch.linalg.inv(torch.eye(N) - b * A_TORCH)
            return lambda v: (inverse @ torch.cat(v)).split([20, N - 20])

        given: Any = {"jac_sparsity": A != 0, "jac": jac, "preconditioner": preconditioner}[option]
        y = torch.cat(solved(f, y0, **{option: given}), 1)
        np.testing.assert_allclose(y[-1].numpy(), euler(A, Y0), rtol=1e-6, atol=1e-10)

    def test_func_that_autograd_cannot_follow(self) -> None:
        y = solved(lambda t, y: torch.from_numpy(A @ y.detach().numpy()), jac_sparsity=A != 0)
        np.testing.assert_allclose(y[-1].numpy(), euler(A, Y0), rtol=1e-6, atol=1e-10)

    def test_a_jacobian_that_autograd_does_not_see(self) -> None:
        y = solved(lambda t, y: linear(t, y.detach()) + 0 * y, jac=lambda t, y: A)
        np.testing.assert_allclose(y[-1].numpy(), euler(A, Y0), rtol=1e-6, atol=1e-10)

    @pytest.mark.parametrize("option", ["jac_sparsity", "jac"])
    def test_the_gradient(self, option: str) -> None:
        scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        y0 = torch.from_numpy(Y0).requires_grad_()
        given: Any = A != 0 if option == "jac_sparsity" else lambda t, y: sp.csr_array(A)
        y = solved(lambda t, y: scale * linear(t, y), y0, **{option: given})[-1]
        found = torch.autograd.grad(y.sum(), [y0, scale])
        inverse = np.linalg.inv(np.eye(N) - H * A)
        power = np.linalg.matrix_power(inverse, STEPS)
        np.testing.assert_allclose(found[0].numpy(), power.sum(0), rtol=1e-6, atol=1e-9)
        # Of (1 - h s A)⁻ⁿ with respect to s.
        wanted = (STEPS * H * power @ inverse @ A @ Y0).sum()
        assert float(found[1]) == pytest.approx(wanted, rel=1e-6)

    def test_a_jacobian_is_kept(self) -> None:
        evaluations = 0

        def f(t: Tensor, y: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return linear(t, y)

        solved(f, jac_sparsity=A != 0)
        # Two for every step, one more where a step begins Newton's method, and those of the Jacobian, once.
        assert evaluations <= 3 * STEPS + 6

    def test_products_stay_exact_from_step_to_step(self) -> None:
        size = 300
        matrix = torch.diag(-torch.linspace(1.0, 200.0, size)) + torch.diag(torch.ones(size - 1), 1)
        plain = 0

        def f(t: Tensor, y: Tensor) -> Tensor:
            nonlocal plain
            plain += not y.requires_grad
            return y @ matrix

        options = {"step_size": 0.2}
        # Under no_grad there would be differences, for func is given no graph then.
        odeint(f, torch.ones(size), torch.tensor([0.0, 2.0]), method="bdf2", options=options, rtol=1e-4, atol=1e-5)
        # Differences would take one for every product.
        assert plain <= 6 * 10


class TestPreconditioner:
    @pytest.mark.parametrize("linear_too", [True, False])
    def test_gmres_needs_few_products(self, linear_too: bool) -> None:
        size = 300
        matrix = -torch.diag(torch.logspace(0, 6, size, dtype=torch.float64))
        matrix += torch.from_numpy(drawn(size, 0.01).toarray())
        diagonal, rhs = 1 - matrix.diagonal(), torch.ones(size, dtype=torch.float64)
        products = 0

        def product(v: Tensor) -> Tensor:
            nonlocal products
            products += 1
            return matrix @ v

        def precondition(v: Tensor) -> Tensor:
            return v / diagonal if linear_too else v / diagonal * (1 + 0.01 * torch.tanh(v.norm()))

        z, left = gmres(product, rhs, 1e-10, 100, 2, precondition)
        true = rhs - z + matrix @ z
        assert float(true.norm()) <= 1e-9 * float(rhs.norm())
        torch.testing.assert_close(left, true, rtol=0, atol=1e-9)
        assert products <= 30

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda t, y, b: y, "must return a function from v"),
            (lambda t, y, b: lambda v: v[:2], r"preconditioner\(t, y, b\) returned a tensor of shape \(2,\)"),
        ],
    )
    def test_what_it_returns_is_checked(self, given: Callable[..., Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            solved(linear, preconditioner=given)


class TestErrors:
    @pytest.mark.parametrize("seen", [True, False])
    def test_an_entry_that_is_lacking(self, seen: bool) -> None:
        matrix = A.copy()
        matrix[7, 31] = 1e-3
        weights = torch.from_numpy(matrix)
        message = r"jac_sparsity lacks the entry \(7, 31\): .* y\[7\], with respect to y\[31\] is 0\.001"
        with pytest.raises(ValueError, match=message if seen else "jac_sparsity lacks an entry in row 7"):
            solved(
                (lambda t, y: y @ weights.T) if seen else (lambda t, y: torch.from_numpy(matrix @ y.detach().numpy())),
                jac_sparsity=np.where(matrix == 1e-3, 0, A) != 0,
            )

    def test_a_wrong_jacobian(self) -> None:
        wrong = A.copy()
        wrong[5, 5] *= 1.001
        with pytest.raises(ValueError, match=r"jac\(t, y\) is not the Jacobian of func: its entry \(5, 5\)"):
            solved(linear, jac=lambda t, y: wrong)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"jac_sparsity": A[:3] != 0},
                ValueError,
                r"jac_sparsity must have the shape \(60, 60\), .* got \(3, 60\)",
            ),
            ({"jac_sparsity": 1j * A}, TypeError, "jac_sparsity must have real entries, got dtype complex128"),
            ({"jac_sparsity": np.full((N, N), np.nan)}, ValueError, "jac_sparsity must be finite"),
            ({"jac_sparsity": "tridiagonal"}, TypeError, "jac_sparsity must be a SciPy sparse matrix, .* got str"),
            ({"jac": A}, TypeError, r"jac must be a function jac\(t, y\) -> matrix, got array"),
            ({"jac": lambda t, y: A[:3]}, ValueError, r"jac\(t, y\) must have the shape \(60, 60\), .* got \(3, 60\)"),
            ({"jac": lambda t, y: 3}, TypeError, r"jac\(t, y\) must be a SciPy sparse matrix, .* got int"),
            ({"preconditioner": 3}, TypeError, "preconditioner must be a function"),
            ({"jac": lambda t, y: A, "jac_sparsity": A}, ValueError, "jac_sparsity, jac are mutually exclusive"),
            ({"jac_sparsity": A, "batch_dims": 1}, ValueError, "batch_dims must be 'auto' or 0 where jac_sparsity is"),
        ],
    )
    def test_wrong_options(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            solved(linear, **options)

    @pytest.mark.parametrize("option", ["jac_sparsity", "jac", "preconditioner"])
    def test_explicit_methods(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} is for implicit methods, .*; method .ab2. is"):
            odeint(linear, torch.from_numpy(Y0), torch.tensor([0.0, 1.0]), method="ab2", options={option: A})

    @pytest.mark.parametrize("option", ["jac_sparsity", "jac"])
    def test_complex_states(self, option: str) -> None:
        given: Any = np.eye(2) if option == "jac_sparsity" else lambda t, y: np.eye(2)
        with pytest.raises(TypeError, match=f"{option} is for real states, got y0 of dtype torch.complex128"):
            solved(lambda t, y: 1j * y, torch.ones(2, dtype=torch.complex128), **{option: given})

    def test_the_backward_solve_of_odeint_adjoint(self) -> None:
        y0, t = torch.from_numpy(Y0).requires_grad_(), torch.tensor([0.0, 1.0], dtype=torch.float64)
        options = {"jac_sparsity": A != 0}
        y = torchdiffeq.odeint_adjoint(linear, y0, t, method="bdf1", options=options, adjoint_params=())
        with pytest.raises(ValueError, match=r"jac_sparsity is of func, .* give adjoint_options without it"):
            y.sum().backward()

    def test_without_scipy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
        monkeypatch.delattr(sp, "linalg")
        with pytest.raises(ImportError, match="jac_sparsity needs SciPy, which is not installed: pip install scipy"):
            solved(linear, jac_sparsity=A != 0)

    def test_an_equation_without_a_solution(self) -> None:
        with pytest.raises(RuntimeError, match=r"the implicit equation of method 'bdf1' at t = 0\.5 was not solved"):
            solved(lambda t, y: 1e3 * (1 + y**2), jac_sparsity=np.eye(N))
