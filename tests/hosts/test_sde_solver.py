"""Solves by torchsde.sdeint: the recurrence that they obey, torchsde's contract, and what is refused."""

import itertools
import math
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torchdiffeq
import torchsde
from methods import FAMILIES, IMPLICIT, slow_but
from sde_problems import NOISES, FunctionsOnly, Path, Pendulum, initial
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm.hosts.registration import SDE_SOLVERS

METHODS = ("leapfrog", "ab2", "ab3", "abm4", "am2", "bdf2", "milne_simpson", "nystrom3")
TIGHT = {"rtol": 1e-7, "atol": 1e-9}
FORMULAS = {
    "leapfrog": ([-1, 0, 1], [0, 2, 0]),
    "ab2": ([0, -1, 1], [-1 / 2, 3 / 2, 0]),
    "ab3": ([0, 0, -1, 1], [5 / 12, -16 / 12, 23 / 12, 0]),
    "bdf2": ([1 / 3, -4 / 3, 1], [0, 0, 2 / 3]),
    "milne_simpson": ([-1, 0, 1], [1 / 3, 4 / 3, 1 / 3]),
}


def solve(
    sde: object, method: str, times: list[float], dt: float = 1 / 16, y0: Tensor | None = None, **options: object
) -> Tensor:
    y0 = initial() if y0 is None else y0
    return torchsde.sdeint(sde, y0, torch.tensor(times, dtype=y0.dtype), method=method, dt=dt, **{**TIGHT, **options})


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("method", slow_but(["leapfrog", "bdf2"], FORMULAS))
def test_obeys_the_maruyama_formula(method: str, noise: str) -> None:
    alpha, beta = FORMULAS[method]
    gamma = [sum(alpha[j + 1 :]) for j in range(len(alpha))]
    sde, h = Pendulum(noise), 1 / 16
    path = Path(4, sde.channels, 16)
    times = [n * h for n in range(17)]
    with torch.no_grad():
        x = solve(sde, method, times, bm=path, rtol=1e-12, atol=1e-12)
        f = [sde.f(torch.tensor(t), y) for t, y in zip(times, x, strict=True)]
        kicks = [
            FunctionsOnly(sde)._product(sde.g(torch.tensor(t), y), path(t, t + h))
            for t, y in zip(times[:-1], x, strict=False)
        ]
        k = len(alpha) - 1
        # The first steps are the start's.
        for n in range(3, 16 - k):
            left = sum(a * x[n + j] for j, a in enumerate(alpha))
            right = sum(h * b * f[n + j] for j, b in enumerate(beta))
            right = right + sum(gamma[j] * kicks[n + j] for j in range(k))
            assert (left - right).abs().max() < 1e-13


@pytest.mark.parametrize("method", slow_but(FAMILIES, SDE_SOLVERS))
@pytest.mark.one_in(2)
def test_without_noise_it_is_the_method_for_odes(method: str) -> None:
    sde, times = Pendulum("diagonal", epsilon=0.0), torch.tensor([0.0, 0.31, 0.6, 1.03], dtype=torch.float64)
    with torch.no_grad():
        x = solve(sde, method, times.tolist(), dt=0.1)
        ode = torchdiffeq.odeint(sde.f, initial(), times, **TIGHT, method=method, options={"step_size": 0.1})
    assert (x - ode).abs().max() < 2e-15


@pytest.mark.parametrize("noise", NOISES)
def test_of_order_one_it_is_torchsdes_euler(noise: str) -> None:
    sde = Pendulum(noise)
    path = Path(4, sde.channels, 64)
    with torch.no_grad():
        ours, theirs = (solve(sde, method, [0.0, 0.3, 0.51, 1.0], bm=path) for method in ("ab1", "euler"))
    assert (ours - theirs).abs().max() < 1e-14


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.one_in(3)
def test_outputs_between_the_nodes_and_a_last_step_cut_short(method: str) -> None:
    sde = Pendulum("diagonal")
    path = Path(4, 2, 160)
    with torch.no_grad():
        nodes = solve(sde, method, [0.0, 0.25, 0.5, 0.75, 0.9], dt=0.25, bm=path)
        outputs = solve(sde, method, [0.0, 0.1, 0.5, 0.6, 0.81, 0.9], dt=0.25, bm=path)
    assert (outputs[1] - (0.6 * nodes[0] + 0.4 * nodes[1])).abs().max() < 1e-14
    assert (outputs[2] - nodes[2]).abs().max() < 1e-14
    assert (outputs[3] - (0.6 * nodes[2] + 0.4 * nodes[3])).abs().max() < 1e-14
    assert (outputs[4] - (0.6 * nodes[3] + 0.4 * nodes[4])).abs().max() < 1e-14
    assert (outputs[5] - nodes[4]).abs().max() < 1e-14


@pytest.mark.parametrize("method", slow_but(["leapfrog"], ["leapfrog", "bdf2", "abm2"]))
@pytest.mark.parametrize(
    "names", [("f", "g"), ("f_and_g",), ("f", "g_prod"), ("f_and_g_prod",), ("f_and_g", "g_prod")], ids="-".join
)
@pytest.mark.parametrize("noise", ["diagonal", "general"])
def test_any_of_torchsdes_functions_will_do(method: str, names: tuple[str, ...], noise: str) -> None:
    sde = Pendulum(noise)
    bm = Path(4, sde.channels, 16)
    with torch.no_grad():
        expected = solve(sde, method, [0.0, 1.0], bm=bm)
        assert torch.equal(solve(FunctionsOnly(sde, *names), method, [0.0, 1.0], bm=bm), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.one_in(3)
def test_names_and_logqp(method: str) -> None:
    sde = Pendulum("diagonal")
    times, bm = [0.0, 0.5, 1.0], Path(4, 2, 16)
    with torch.no_grad():
        renamed = solve(sde, method, times, bm=bm, names={"drift": "h"})
        sde.f = sde.h
        assert torch.equal(renamed, solve(sde, method, times, bm=bm))
        # With drift and prior drift a constant apart the ratio grows evenly.
        sde.g = lambda t, y: 2 * torch.ones_like(y)
        sde.f = lambda t, y: -y + 3
        padded = Path(4, 3, 16)
        padded.values[:, :, :2] = bm.values
        ys, ratio = solve(sde, method, times, bm=padded, logqp=True)
        assert ratio.shape == (2, 4)
        assert (ratio - 0.5 * 2 * (3 / 2) ** 2 * 0.5).abs().max() < 1e-14
        assert (ys - solve(sde, method, times, bm=bm)).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("method", "dt"),
    slow_but(
        list(itertools.product(("leapfrog", "ab3"), (1 / 16, 1 / 32))),
        # The implicit methods, whose steps take many times as long, take turns.
        [
            *((method, dt) for method in METHODS if method not in IMPLICIT for dt in (1 / 16, 1 / 32)),
            *(("am2", 1 / 16), ("bdf2", 1 / 32), ("milne_simpson", 1 / 16)),
        ],
    ),
)
def test_continues_another_solve(method: str, dt: float) -> None:
    """By steps of the same length, or of half of it."""
    sde = Pendulum("general")
    bm = Path(4, 3, 64, horizon=2.0)
    first, extra = solve(sde, method, [0.0, 1.0], bm=bm, extra=True)
    rest = solve(sde, method, [1.0, 1.5, 2.0], dt, first[-1].detach(), bm=bm, extra_solver_state=_detached(extra))
    anew = solve(sde, method, [1.0, 1.5, 2.0], dt, first[-1].detach(), bm=bm)
    # The trapezoidal rule, a one-step method, has no past.
    assert method == "am2" or (anew - rest).abs().max() > 1e-6
    if dt == 1 / 16:
        whole = solve(sde, method, [0.0, 1.5, 2.0], bm=bm)
        assert (rest[1:] - whole[1:]).abs().max() < 1e-10
    else:
        assert (rest[-1] - _step_by_step(sde, method, bm)).abs().max() < 1e-10


def _detached(extra: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in extra)


def _step_by_step(sde: Pendulum, method: str, bm: Path) -> Tensor:
    """The end of a solve with steps of 1/16 and then of 1/32, every one of these a solve of its own."""
    x, extra = solve(sde, method, [0.0, 1.0], bm=bm, extra=True)
    for n in range(32, 64):
        times = [n / 32, (n + 1) / 32]
        x, extra = solve(
            sde, method, times, 1 / 32, x[-1].detach(), bm=bm, extra=True, extra_solver_state=_detached(extra)
        )
    return x[-1]


def test_a_gradient_through_what_is_continued() -> None:
    sde, bm = Pendulum("diagonal"), Path(4, 2, 32, horizon=2.0)
    first, extra = solve(sde, "ab3", [0.0, 1.0], bm=bm, extra=True)
    rest = solve(sde, "ab3", [1.0, 2.0], y0=first[-1], bm=bm, extra_solver_state=extra)
    whole = solve(sde, "ab3", [0.0, 2.0], bm=bm)
    gradients = [torch.autograd.grad(y[-1].sin().sum(), sde.pull)[0] for y in (rest, whole)]
    assert abs(gradients[0] - gradients[1]) < 1e-12


def test_few_steps_leave_no_past() -> None:
    with torch.no_grad():
        assert solve(Pendulum("diagonal"), "ab3", [0.0, 0.125], extra=True)[1] == ()
        one = torch.tensor([0.5], dtype=torch.float64)
        ys, extra = torchsde.sdeint(
            Pendulum("diagonal"),
            initial(),
            one,
            method="ab3",
            dt=0.1,
            extra=True,
            bm=torchsde.BrownianInterval(0.0, 1.0, (4, 2), dtype=torch.float64),
        )
    assert torch.equal(ys, initial().unsqueeze(0))
    assert extra == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", slow_but(["leapfrog", "ab3"], METHODS))
def test_dtypes_and_torchsdes_brownian_motions(method: str, dtype: torch.dtype) -> None:
    sde = Pendulum("diagonal").to(dtype)
    y0, ts = initial().to(dtype), torch.tensor([0.0, 0.33, 1.0], dtype=dtype)
    kind = {"dtype": dtype}
    for bm in (
        None,
        torchsde.BrownianInterval(0.0, 1.0, (4, 2), **kind),
        torchsde.BrownianPath(0.0, torch.zeros(4, 2, **kind)),
        torchsde.BrownianTree(0.0, torch.zeros(4, 2, **kind), t1=1.0),
    ):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            ys = torchsde.sdeint(sde, y0, ts, bm=bm, method=method, dt=0.1, **TIGHT)
        assert ys.dtype is dtype
        assert ys.shape == (3, 4, 2)
        assert torch.isfinite(ys).all()


@pytest.mark.slow
def test_many_steps_in_single_precision_are_equal() -> None:
    # Times added up in single precision, as torchsde does, would make steps of various lengths.
    sde = Pendulum("additive").float()
    seen = []
    f = sde.f
    sde.f = lambda t, y: (seen.append(float(t)), f(t, y))[1]
    with torch.no_grad():
        torchsde.sdeint(sde, initial().float(), [0.0, 1.0], method="ab2", dt=1e-3)
    # One evaluation is torchsde's own check.
    assert len(seen) == 1001
    assert max(abs(b - a - 1e-3) for a, b in pairwise(seen[1:])) < 1e-6


def test_a_method_of_ones_own() -> None:
    sde, bm = Pendulum("scalar"), Path(4, 1, 16)
    torchdiffeq_lmm.register_method("sde_own_ab2", [0, -1, 1], [-0.5, 1.5, 0])
    with torch.no_grad():
        own, ab2 = (solve(sde, method, [0.0, 1.0], bm=bm) for method in ("sde_own_ab2", "ab2"))
        assert (own - ab2).abs().max() < 1e-14
        first, extra = solve(sde, "sde_own_ab2", [0.0, 0.5], bm=bm, extra=True)
        with pytest.raises(ValueError, match="equal steps"):
            solve(sde, "sde_own_ab2", [0.5, 1.0], 1 / 8, first[-1], bm=bm, extra_solver_state=extra)


def test_stratonovich_with_additive_noise_is_the_same() -> None:
    bm = Path(4, 2, 16)
    with torch.no_grad():
        ito, stratonovich = (
            solve(Pendulum("additive", sde_type=kind), "ab2", [0.0, 1.0], bm=bm) for kind in ("ito", "stratonovich")
        )
    assert torch.equal(ito, stratonovich)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sde": Pendulum("diagonal", sde_type="stratonovich")}, ValueError, "Stratonovich SDE with diagonal noise"),
        ({"adaptive": True}, ValueError, "adaptive must be False"),
        ({"dt": 0.0}, ValueError, "dt must be positive and finite, got 0.0"),
        ({"dt": "0.1"}, TypeError, "dt must be a positive real number"),
        ({"dt": 1e-9}, ValueError, "dt 1e-09 makes"),
        ({"options": {"grad_filter": "none"}}, ValueError, "'leapfrog' or a CostateFilter, got 'none'"),
        ({"options": {"grad_filter": 3}}, TypeError, "grad_filter must be None"),
        ({"options": {"grad_filter": "smooth"}}, ValueError, "'leapfrog' or a CostateFilter, got 'smooth'"),
        ({"ts": [0.0, math.inf]}, ValueError, "ts must be finite, got"),
        ({"options": {"grad_filter": "leapfrog"}, "method": "ab2"}, ValueError, "is for method 'leapfrog'"),
        ({"extra_solver_state": (torch.ones(3),)}, ValueError, "extra_solver_state must be what"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"sde": Pendulum("diagonal"), "y0": initial(), "ts": [0.0, 1.0], "method": "leapfrog", "dt": 0.1}
    with pytest.raises(error, match=message):
        torchsde.sdeint(**{**arguments, **change})


def test_extra_state_where_it_cannot_be_differentiated() -> None:
    sde, bm = Pendulum("diagonal"), Path(4, 2, 16)
    for method, options in (("bdf2", {}), ("ab2", {"grad_filter": "auto"})):
        ys, extra = solve(sde, method, [0.0, 0.5], bm=bm, extra=True, options=options)
        with pytest.raises(RuntimeError, match="extra_solver_state"):
            extra[2].sum().backward()
    with pytest.raises(ValueError, match="must not be given with grad_filter"):
        solve(sde, "ab2", [0.5, 1.0], y0=ys[-1], bm=bm, extra_solver_state=extra, options={"grad_filter": "auto"})
    _, extra = solve(sde, "bdf2", [0.0, 0.5], bm=bm, extra=True)
    with pytest.raises(ValueError, match="must not require a gradient"):
        solve(sde, "bdf2", [0.5, 1.0], y0=ys[-1], bm=bm, extra_solver_state=extra)


def test_unknown_options_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="options of method 'ab2': Unexpected arguments"):
        solve(Pendulum("diagonal"), "ab2", [0.0, 1.0], options={"grad_free": True})


def test_an_equation_that_is_not_solved() -> None:
    sde = Pendulum("diagonal")
    sde.f = lambda t, y: torch.where(t > 0.5, torch.nan, 1.0) * y
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"method 'bdf2' at t = 0\.5625"):
        solve(sde, "bdf2", [0.0, 1.0])


@pytest.mark.parametrize("change", [{"method": "ab2"}, {"method": "euler", "adjoint_method": "leapfrog"}])
def test_sdeint_adjoint_refuses(change: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"in sdeint_adjoint, got '(ab2|leapfrog)'.*torchsde.sdeint"):
        torchsde.sdeint_adjoint(Pendulum("diagonal"), initial(), [0.0, 1.0], dt=0.1, **change)


@pytest.mark.parametrize("run", [torchsde.sdeint, torchsde.sdeint_adjoint])
def test_torchsdes_own_methods_go_on(run: Callable[..., Tensor]) -> None:
    results = []
    for registers in (True, False):
        sde = Pendulum("diagonal")
        (torchdiffeq_lmm.register if registers else torchdiffeq_lmm.unregister)()
        try:
            for method in ("euler", "milstein", "srk"):
                bm = torchsde.BrownianInterval(
                    0.0, 1.0, (4, 2), dtype=torch.float64, entropy=3, levy_area_approximation="space-time"
                )
                ys = run(sde, initial(), torch.tensor([0.0, 1.0]).double(), bm=bm, method=method, dt=0.1)
                results.append((ys[-1].detach(), *torch.autograd.grad(ys[-1].sum(), [sde.pull, sde.scale])))
        finally:
            torchdiffeq_lmm.register()
    for ours, theirs in zip(results[:3], results[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.one_in(3)
def test_the_sde_may_return_the_same_memory_again_and_again(method: str) -> None:
    fresh, drift, diffusion = Pendulum("diagonal"), torch.empty(4, 2).double(), torch.empty(4, 2).double()

    class Reused:
        sde_type, noise_type = "ito", "diagonal"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return drift.copy_(fresh.f(t, y))

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return diffusion.copy_(fresh.g(t, y))

    path = Path(4, 2, 16)
    with torch.no_grad():
        expected, found = (solve(sde, method, [0.0, 0.4, 1.0], bm=path) for sde in (fresh, Reused()))
    assert torch.equal(expected, found)
