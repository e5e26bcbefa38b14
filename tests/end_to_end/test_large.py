"""Large coupled systems, discretised partial differential equations, against closed forms and SciPy."""

from collections.abc import Callable
from math import exp, pi, sin

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from methods import slow_but
from scipy.integrate import solve_ivp
from torch import Tensor

from torchdiffeq_lmm import odeint

F64 = torch.float64


def counted(f: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[Tensor, Tensor], Tensor], list[int]]:
    calls = [0]

    def call(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return f(t, y)

    return call, calls


def second_difference(size: int) -> sp.csr_array:
    ones = np.ones(size)
    return sp.diags_array([ones[1:], -2 * ones, ones[1:]], offsets=[-1, 0, 1]).tocsr()


def as_numpy(
    f: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> Callable[[float, np.ndarray], np.ndarray]:
    return lambda t, y: f(torch.tensor(t), torch.from_numpy(y.copy()).reshape(shape)).reshape(-1).numpy()


class TestHeatEquation:
    """On the unit square, 100 × 100 points inside, 0 at the boundary, from two eigenfunctions of the matrix."""

    SIZE, END, DIFFUSIVITY, STEPS = 100, 0.02, 0.3, 32

    def mode(self, i: int, j: int) -> tuple[Tensor, float]:
        """An eigenfunction, and its eigenvalue."""
        x = torch.arange(1, self.SIZE + 1, dtype=F64) / (self.SIZE + 1)
        values = [4 * (self.SIZE + 1) ** 2 * sin(k * pi / 2 / (self.SIZE + 1)) ** 2 for k in (i, j)]
        return torch.sin(i * pi * x)[:, None] * torch.sin(j * pi * x), -sum(values)

    @pytest.mark.parametrize("option", slow_but([], ["jac_sparsity", "jac"]))
    def test_solution_and_gradients(self, option: str) -> None:
        line, unit = second_difference(self.SIZE) * (self.SIZE + 1.0) ** 2, sp.eye_array(self.SIZE)
        laplacian = (sp.kron(line, unit) + sp.kron(unit, line)).tocsr()
        diffusivity = torch.tensor(self.DIFFUSIVITY, dtype=F64, requires_grad=True)

        def heat(t: Tensor, y: Tensor) -> Tensor:
            p = torch.nn.functional.pad(y, (1, 1, 1, 1))
            inside = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * y
            return diffusivity * (self.SIZE + 1) ** 2 * inside

        f, calls = counted(heat)
        given = laplacian if option == "jac_sparsity" else lambda t, y: self.DIFFUSIVITY * laplacian
        # The second one, and rounding, are stiff.
        (slow, rate), (fast, fast_rate) = self.mode(1, 2), self.mode(60, 90)
        y0 = (slow + 1e-3 * fast).requires_grad_()
        y = odeint(
            f,
            y0,
            torch.tensor([0.0, self.END], dtype=F64),
            method="bdf2",
            options={"step_size": self.END / self.STEPS, option: given},
        )[-1]
        assert calls[0] <= 3 * self.STEPS + 20
        assert self.DIFFUSIVITY * fast_rate * self.END / self.STEPS < -10
        decay = exp(self.DIFFUSIVITY * rate * self.END)
        torch.testing.assert_close(y.detach(), decay * slow, rtol=0, atol=1e-4)
        by_diffusivity, by_y0 = torch.autograd.grad((slow * y).sum(), [diffusivity, y0])
        wanted = rate * self.END * decay * float((slow**2).sum())
        assert float(by_diffusivity) == pytest.approx(wanted, rel=1e-3)
        torch.testing.assert_close(by_y0, decay * slow, rtol=0, atol=1e-4)


class TestRods:
    """Rods of 300 points each that cool at unlike rates, from the slowest mode of their matrix."""

    SIZE, END, STEPS = 300, 0.02, 40

    @pytest.mark.parametrize("count", slow_but([2], [2, 12]))
    def test_every_rod_has_a_matrix(self, count: int) -> None:
        x = torch.arange(1, self.SIZE + 1, dtype=F64) / (self.SIZE + 1)
        rate = 4 * (self.SIZE + 1) ** 2 * sin(pi / 2 / (self.SIZE + 1)) ** 2
        diffusivity = torch.logspace(-1, 1, count, dtype=F64, requires_grad=True)

        def cool(t: Tensor, y: Tensor) -> Tensor:
            p = torch.nn.functional.pad(y, (1, 1))
            return diffusivity[:, None] * (self.SIZE + 1) ** 2 * (p[:, 2:] - 2 * y + p[:, :-2])

        f, calls = counted(cool)
        t = torch.tensor([0.0, self.END], dtype=F64)
        y = odeint(
            f, torch.sin(pi * x).expand(count, -1), t, method="bdf3", options={"step_size": self.END / self.STEPS}
        )
        # By products with the Jacobian of all of them they were not solved at all.
        assert calls[0] < 5 * self.STEPS
        decay = torch.exp(-diffusivity.detach() * rate * self.END)
        assert (y[-1] - decay[:, None] * torch.sin(pi * x)).abs().max() < 2e-4
        (gradient,) = torch.autograd.grad(y[-1, :, self.SIZE // 2].sum(), diffusivity)
        exact = -rate * self.END * decay * torch.sin(pi * x[self.SIZE // 2])
        assert (gradient - exact).abs().max() < 2e-3


@pytest.mark.slow
class TestBrusselator:
    """In one dimension: Hairer, Wanner, *Solving Ordinary Differential Equations II*, IV.10, with 2 × 500 unknowns."""

    SIZE, END, STEPS = 500, 1.0, 60

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        alpha = (self.SIZE + 1) ** 2 / 50
        u, v = y

        def diffusion(w: Tensor, at_ends: float) -> Tensor:
            p = torch.nn.functional.pad(w, (1, 1), value=at_ends)
            return alpha * (p[2:] + p[:-2] - 2 * w)

        return torch.stack([1 + u * u * v - 4 * u + diffusion(u, 1.0), 3 * u - u * u * v + diffusion(v, 3.0)])

    def test_solution_and_gradient(self) -> None:
        x = torch.arange(1, self.SIZE + 1, dtype=F64) / (self.SIZE + 1)
        y0 = torch.stack([1 + torch.sin(2 * pi * x), torch.full_like(x, 3.0)])
        line, unit = second_difference(self.SIZE), sp.eye_array(self.SIZE)
        structure = sp.block_array([[line, unit], [unit, line]])
        towards = torch.stack([torch.sin(pi * x), torch.cos(pi * x)])

        def reference(start: Tensor) -> Tensor:
            by_scipy = solve_ivp(
                as_numpy(self.f, y0.shape),
                (0, self.END),
                start.reshape(-1).numpy(),
                method="Radau",
                rtol=1e-8,
                atol=1e-8,
                jac_sparsity=structure,
            )
            return torch.from_numpy(by_scipy.y[:, -1].copy()).reshape(y0.shape)

        f, calls = counted(self.f)
        start = y0.clone().requires_grad_()
        y = odeint(
            f,
            start,
            torch.tensor([0.0, self.END], dtype=F64),
            method="bdf3",
            options={"step_size": self.END / self.STEPS, "jac_sparsity": structure},
            rtol=1e-6,
            atol=1e-6,
        )[-1]
        assert calls[0] <= 5 * self.STEPS
        torch.testing.assert_close(y.detach(), reference(y0), rtol=0, atol=1e-4)
        (gradient,) = torch.autograd.grad((y**2).sum(), start)
        change = 1e-3
        ends = [float((reference(y0 + sign * change * towards) ** 2).sum()) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * change)
        assert float((gradient * towards).sum()) == pytest.approx(slope, rel=1e-3)


@pytest.mark.slow
class TestGrayScott:
    """In two dimensions, on 64 × 64 points, periodic: products with the Jacobian alone."""

    SIZE, END, STEPS = 64, 20.0, 10

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        u, v = y
        around = sum(torch.roll(y, shift, dim) for shift in (1, -1) for dim in (1, 2)) - 4 * y
        diffusion = (self.SIZE / 0.5) ** 2 * around * torch.tensor([2e-5, 1e-5], dtype=F64)[:, None, None]
        return diffusion + torch.stack([0.04 * (1 - u) - u * v * v, u * v * v - 0.1 * v])

    def test_solution_and_gradient(self) -> None:
        y0 = torch.stack([torch.ones(self.SIZE, self.SIZE, dtype=F64), torch.zeros(self.SIZE, self.SIZE, dtype=F64)])
        y0[0, 24:40, 24:40], y0[1, 24:40, 24:40] = 0.5, 0.25

        def reference(start: Tensor) -> Tensor:
            by_scipy = solve_ivp(
                as_numpy(self.f, y0.shape), (0, self.END), start.reshape(-1).numpy(), rtol=1e-6, atol=1e-8
            )
            return torch.from_numpy(by_scipy.y[:, -1].copy()).reshape(y0.shape)

        start = y0.clone().requires_grad_()
        y = odeint(
            self.f,
            start,
            torch.tensor([0.0, self.END], dtype=F64),
            method="bdf2",
            options={"step_size": self.END / self.STEPS},
            rtol=1e-5,
            atol=1e-6,
        )[-1]
        torch.testing.assert_close(y.detach(), reference(y0), rtol=0, atol=2e-3)
        (gradient,) = torch.autograd.grad(y[1].sum(), start)
        towards, change = (y0[1] > 0).to(F64) * torch.tensor([0.0, 1.0], dtype=F64)[:, None, None], 1e-3
        ends = [float(reference(y0 + sign * change * towards)[1].sum()) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * change)
        assert float((gradient * towards).sum()) == pytest.approx(slope, rel=2e-2)
