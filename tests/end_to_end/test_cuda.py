"""On a GPU: the same numbers as on the CPU, no more waiting for it when there are more steps, CUDA graphs."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torchdiffeq
import torchsde
from compiled_solves import NEEDS_TORCH
from methods import NAMES
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, Compile, GridParameter, odeint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = 40
EXPLICIT = ("leapfrog", "ab4", "abm3", "nystrom3")


class Field(nn.Module):
    """A network with a value of its own for every step; for torchsde, the drift of an SDE."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).to(dtype)
        self.theta = GridParameter(torch.randn(STEPS, width, dtype=dtype), torch.linspace(0, 1, STEPS + 1, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * t.cos() + self.theta(t)

    f = forward

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * y


Solve = Callable[[nn.Module, Tensor, Tensor], Tensor]


def smooth_field() -> Field:
    """One without jumps, where a step's length depends on rounding."""
    func = Field()
    with torch.no_grad():
        func.theta.values.zero_()
    return func


def solved(func: nn.Module, y0: Tensor, t: Tensor, solve: Solve) -> list[Tensor]:
    """The states and the gradients, on the CPU."""
    y0 = y0.detach().clone().requires_grad_()
    states = solve(func, y0, t)
    wanted = (y0, *(parameter for parameter in func.parameters() if parameter.requires_grad))
    grads = torch.autograd.grad(states.square().sum(), wanted)
    return [found.detach().cpu() for found in (states, *grads)]


def assert_same_on_both(
    solve: Solve, func: Field | None = None, dtype: torch.dtype = torch.float64, rtol: float = 1e-9
) -> None:
    func = Field(dtype) if func is None else func
    y0 = torch.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3)
    t = torch.tensor([0.0, 0.31, 1.0], dtype=dtype)
    wanted = solved(func, y0, t, solve)
    got = solved(copy.deepcopy(func).cuda(), y0.cuda(), t.cuda(), solve)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


def with_options(**keywords: Any) -> Solve:
    keywords = {"options": {"step_size": 1 / STEPS}, **keywords}
    return lambda func, y0, t: odeint(func, y0, t, **keywords)


@pytest.mark.parametrize("method", NAMES)
def test_every_method_with_its_filter(method: str) -> None:
    assert_same_on_both(with_options(method=method, grad_filter="auto"))


@pytest.mark.parametrize("method", ["bdf", "adams"])
@pytest.mark.parametrize("grad_filter", [None, "auto"])
def test_adaptive_methods(method: str, grad_filter: str | None) -> None:
    assert_same_on_both(
        with_options(method=method, grad_filter=grad_filter, options={}, rtol=1e-5, atol=1e-7),
        smooth_field(),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "keywords",
    [
        {"backward": "checkpoint"},
        {"backward": Checkpoint(3), "grad_filter": "auto"},
        {"backward": "reversible"},
        {"grad_filter": torchdiffeq_lmm.CostateFilter(order=3)},
        {"grad_filter": torchdiffeq_lmm.CostateFilter("trapezoid", order="method")},
        {"options": {"step_size": 0.023, "interp": "cubic"}, "grad_filter": "auto"},
        {"options": {"step_size": 1 / STEPS, "jump_t": [0.5]}, "grad_filter": "auto"},
    ],
    ids=repr,
)
def test_backward_passes_and_options(keywords: dict[str, Any]) -> None:
    method = "leapfrog" if keywords.get("backward") == "reversible" else "ab4"
    assert_same_on_both(with_options(method=method, **keywords))


def test_single_precision() -> None:
    for method in ("leapfrog", "abm4", "bdf2"):
        assert_same_on_both(with_options(method=method, grad_filter="auto"), dtype=torch.float32, rtol=3e-4)


@pytest.mark.parametrize("method", ["leapfrog", "ab3", "bdf"])
def test_the_default_device_is_the_gpu(method: str) -> None:
    options = {} if method == "bdf" else {"step_size": 0.05}

    def compute() -> list[Tensor]:
        weight = torch.tensor([[0.1, 2.0], [-2.0, 0.1]], dtype=torch.float64, requires_grad=True)
        y0, t = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.linspace(0, 1, 3, dtype=torch.float64)
        y = torchdiffeq.odeint(lambda t, y: torch.tanh(weight @ y), y0, t, method=method, options=options)
        (grad,) = torch.autograd.grad(y.square().sum(), weight)
        return [y.detach().cpu(), grad.cpu()]

    wanted = compute()
    with torch.device("cuda"):
        got = compute()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_events() -> None:
    def solve(func: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
        _, states = odeint(
            func,
            y0,
            t[:2],
            method="ab4",
            event_fn=lambda t, y: t - 0.53,
            options={"step_size": 0.02},
            grad_filter="auto",
        )
        return states

    assert_same_on_both(solve)


@pytest.mark.parametrize("method", ["leapfrog", "abm3", "bdf2"])
def test_sdes(method: str) -> None:
    def solve(func: nn.Module, y0: Tensor, t: Tensor) -> Tensor:
        # The same noise on both, drawn on the CPU.
        brownian = torchsde.BrownianInterval(0.0, 1.0, size=(4, 3), dtype=torch.float64, device="cpu", entropy=7)

        class Moved:
            levy_area_approximation, shape = "none", (4, 3)
            dtype, device = torch.float64, y0.device

            def __call__(self, *times: Any, **keywords: Any) -> Any:
                return brownian(*times, **keywords).to(y0.device)

        return torchsde.sdeint(func, y0, t, bm=Moved(), dt=0.05, method=method, options={"grad_filter": "auto"})

    assert_same_on_both(solve)


class TestStiff:
    """Batches by block Jacobians, coupled systems, large ones."""

    @pytest.mark.parametrize("method", ["bdf2", "bdf3", "bdf"])
    def test_a_batch_of_robertson(self, method: str) -> None:
        rates = torch.stack([torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64) * s for s in (1.0, 0.3, 2.0, 1.3)])

        def compute(device: str) -> list[Tensor]:
            k = rates.to(device).requires_grad_()

            def robertson(t: Tensor, y: Tensor) -> Tensor:
                a, b, c = y.unbind(-1)
                slow, mixed, fast = k[:, 0] * a, k[:, 1] * b * c, k[:, 2] * b * b
                return torch.stack([-slow + mixed, slow - mixed - fast, fast], -1)

            y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, device=device).repeat(4, 1)
            nodes = torch.cat([torch.zeros(1), torch.logspace(-5, 2, 60)]).double().to(device)
            times = nodes[[0, -1]] if method == "bdf" else nodes
            y = odeint(robertson, y0, times, method=method, rtol=1e-6, atol=1e-9)
            (grad,) = torch.autograd.grad(y[-1].square().sum(), k)
            return [y.detach().cpu(), grad.cpu()]

        (y, grad), (y_cpu, grad_cpu) = compute("cuda"), compute("cpu")
        torch.testing.assert_close(y, y_cpu, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(grad * rates, grad_cpu * rates, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("given", [None, "jac_sparsity"])
    def test_the_heat_equation(self, given: str | None) -> None:
        size, end = 400, 0.02
        matrix = sp.diags_array([np.ones(size - 1), -2 * np.ones(size), np.ones(size - 1)], offsets=[-1, 0, 1]).tocsr()
        x = torch.arange(1, size + 1, dtype=torch.float64, device="cuda") / (size + 1)
        mode, rate = torch.sin(np.pi * x), -4 * (size + 1) ** 2 * np.sin(np.pi / 2 / (size + 1)) ** 2

        def heat(t: Tensor, y: Tensor) -> Tensor:
            padded = nn.functional.pad(y, (1, 1))
            return (size + 1) ** 2 * (padded[2:] + padded[:-2] - 2 * y)

        options: dict[str, Any] = {"step_size": end / 32}
        if given is not None:
            options[given] = matrix
        with warnings.catch_warnings():
            # That factors are for the CPU.
            warnings.simplefilter("ignore")
            t = torch.tensor([0.0, end], dtype=torch.float64, device="cuda")
            y0 = mode.clone().requires_grad_()
            y = odeint(heat, y0, t, method="bdf2", options=options)[-1]
        torch.testing.assert_close(y.detach(), float(np.exp(rate * end)) * mode, rtol=0, atol=2e-4)
        (grad,) = torch.autograd.grad((y * mode).sum(), y0)
        torch.testing.assert_close(grad, float(np.exp(rate * end)) * mode, rtol=0, atol=2e-4)


WAYS: dict[str, dict[str, Any]] = {
    "leapfrog": {"method": "leapfrog"},
    "leapfrog, filtered": {"method": "leapfrog", "grad_filter": "leapfrog"},
    "leapfrog, reversible": {"method": "leapfrog", "backward": "reversible", "grad_filter": "auto"},
    "leapfrog, three checkpoints": {"method": "leapfrog", "backward": Checkpoint(3)},
    "ab4, filtered": {"method": "ab4", "grad_filter": "auto"},
    "abm3, three checkpoints": {"method": "abm3", "grad_filter": "auto", "backward": Checkpoint(3)},
}


def waits(steps: int, keywords: dict[str, Any]) -> int:
    """How often a solve and its backward pass make the CPU wait for the GPU."""
    torch.manual_seed(0)
    func, y0 = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).cuda(), torch.ones(2, 3, device="cuda")
    t = torch.tensor([0.0, 0.5, 1.0], device="cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            y = odeint(
                lambda t, y: func(y),
                y0,
                t,
                options={"step_size": 1 / steps},
                adjoint_params=tuple(func.parameters()) if keywords.get("backward", "autograd") != "autograd" else None,
                **keywords,
            )
            y.square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("way", WAYS)
def test_no_step_waits(way: str) -> None:
    # More steps than times are made at once.
    few, many = waits(300, WAYS[way]), waits(600, WAYS[way])
    assert few == many <= 40


@NEEDS_TORCH
class TestCompiled:
    """Compiled solves, also as CUDA graphs."""

    @pytest.mark.parametrize("mode", ["default", None])
    @pytest.mark.parametrize("method", EXPLICIT)
    @pytest.mark.parametrize("grad_filter", [None, "auto"])
    def test_the_same_as_eager(self, method: str, grad_filter: str | None, mode: str | None) -> None:
        keywords: dict[str, Any] = {"method": method, "grad_filter": grad_filter, "options": {"step_size": 1 / 23}}
        y0 = torch.linspace(-1, 1, 12, dtype=torch.float64, device="cuda").reshape(4, 3)
        t, func = torch.tensor([0.0, 0.31, 1.0], dtype=torch.float64, device="cuda"), Field().cuda()
        wanted = solved(func, y0, t, lambda f, y, t: odeint(f, y, t, **keywords))
        for _ in range(2):
            got = solved(func, y0, t, lambda f, y, t: odeint(f, y, t, compile=Compile(block=5, mode=mode), **keywords))
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    def test_graphs_keep_their_outputs_apart(self) -> None:
        func, t = Field().cuda(), torch.tensor([0.0, 1.0], dtype=torch.float64, device="cuda")
        settings = Compile(block=5)

        def solve(scale: float, compile: Compile | None) -> Tensor:  # noqa: A002
            y0 = scale * torch.ones(4, 3, dtype=torch.float64, device="cuda")
            return odeint(func, y0, t, method="ab3", options={"step_size": 0.05}, compile=compile)[-1]

        both = [solve(scale, settings) for scale in (0.5, 1.0)]
        wanted = [solve(scale, None) for scale in (0.5, 1.0)]
        torch.testing.assert_close(both, wanted, rtol=1e-9, atol=1e-9)
        grads, expected = (
            torch.autograd.grad(sum((i + 1) * y.square().sum() for i, y in enumerate(found)), list(func.parameters()))
            for found in (both, wanted)
        )
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)

    def test_batches_of_several_sizes(self) -> None:
        # A batch of matrices, and two ways to fail for symbols that there are on GPUs alone.
        weight = torch.linspace(-1, 1, 9, dtype=torch.float64, device="cuda").reshape(3, 3).requires_grad_()

        def products(t: Tensor, y: Tensor) -> Tensor:
            return (torch.stack([y, y.cos()], -2) @ weight).sum(-2).tanh()

        def mixed(t: Tensor, y: Tensor) -> Tensor:
            return torch.lerp(y, y.flip(-1), weight.sum() + 0.6) @ weight

        def reduced(t: Tensor, y: Tensor) -> Tensor:
            return y - torch.logsumexp(y @ weight, -1, keepdim=True)

        t = torch.linspace(0, 1, 9, dtype=torch.float64, device="cuda")
        for func in (products, mixed, reduced):
            for batch in (3, 5, 4):
                y0 = torch.linspace(-1, 1, 3 * batch, dtype=torch.float64, device="cuda").reshape(batch, 3)
                found = []
                for settings in (None, Compile(block=5)):
                    y = odeint(func, y0, t, method="ab2", grad_filter="auto", compile=settings)
                    found.append([y.detach(), *torch.autograd.grad(y.square().sum(), weight)])
                torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)

    def test_what_cannot_be_captured_is_run(self) -> None:
        weight = torch.eye(3, dtype=torch.float64, device="cuda").requires_grad_()
        y0, t = torch.ones(2, 3, dtype=torch.float64, device="cuda"), torch.linspace(0, 1, 9).double().cuda()

        def solve(**keywords: Any) -> list[Tensor]:
            # It copies coefficients from the CPU.
            y = odeint(lambda t, y: y @ torch.matrix_exp(-weight), y0, t, method="ab2", **keywords)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), weight)]

        with pytest.warns(UserWarning, match="without a CUDA graph, for it cannot be captured"):
            found = solve(compile=Compile(block=5))
        torch.testing.assert_close(found, solve(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(solve(compile=Compile(block=5)), solve(), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("mode", ["default", None])
    def test_no_block_waits(self, mode: str | None) -> None:
        keywords = {"method": "leapfrog", "grad_filter": "auto", "compile": Compile(block=5, mode=mode)}
        first = [waits(steps, keywords) for steps in (300, 600)]
        again = [waits(steps, keywords) for steps in (300, 600)]
        assert again[0] == again[1] <= 40
        # A new grid is planned on the CPU, and moved at once.
        assert first[1] - again[1] <= 20
