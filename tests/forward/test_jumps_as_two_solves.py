"""A solve with jump_t is two solves, one after the other: states, gradients, random numbers."""

import numpy as np
import pytest
import torch
import torchdiffeq
from jumping import END, JUMPS, SOME, WAYS, Switched, f64, jumping, start
from methods import NAMES, in_turn, slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Reversible


@pytest.mark.parametrize(("name", "way"), in_turn(WAYS, few=1, names=[*NAMES, "heun2", "midpoint"]), ids=str)
def test_it_is_two_solves(name: str, way: dict) -> None:
    """States and gradients, to rounding; the right-hand side does not depend on time but by the jump."""
    if name in ("heun2", "midpoint") and list(way) != ["grad_filter"]:
        pytest.skip("torchdiffeq's own, and not filtered")
    first, second = f64(0.0, 0.2, 0.51), f64(0.51, 0.8, 1.0)
    options = {"step_size": 0.08}
    y0, field = start(), Switched(0.51)
    together = torchdiffeq_lmm.odeint(
        field, y0, f64(0.0, 0.2, 0.51, 0.8, 1.0), method=name, options={**options, "jump_t": [0.51]}, **way
    )
    gradient = torch.autograd.grad(together.square().sum(), (y0, *field.parameters()))

    matrices = list(field.parameters())
    fields = [Switched(None, number) for number in range(2)]
    for other in fields:
        other.matrices = nn.ParameterList(matrices)
    before = torchdiffeq_lmm.odeint(fields[0], y0, first, method=name, options=options, **way)
    after = torchdiffeq_lmm.odeint(fields[1], before[-1], second, method=name, options=options, **way)
    apart = torch.cat([before, after[1:]])
    expected = torch.autograd.grad(apart.square().sum(), (y0, *matrices))
    # The times of the second solve begin at 0.51 and not at 0: so do those of the piece.
    torch.testing.assert_close(together, apart, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


def test_it_is_two_solves_run_backwards_and_smoothed() -> None:
    """Leapfrog's own ways, and one drift for every piece."""
    for way in ({"backward": "reversible"}, {"grad_filter": "smooth"}):
        y0, field = start(), Switched(0.5)
        options = {"step_size": 0.05}
        t = f64(0.0, 0.5, 1.0)
        together = torchdiffeq_lmm.odeint(field, y0, t, method="leapfrog", options={**options, "jump_t": [0.5]}, **way)
        gradient = torch.autograd.grad(together[-1].square().sum(), (y0, *field.parameters()))
        fields = [Switched(None, number) for number in range(2)]
        for other in fields:
            other.matrices = field.matrices
        middle = torchdiffeq_lmm.odeint(fields[0], y0, t[:2], method="leapfrog", options=options, **way)[-1]
        last = torchdiffeq_lmm.odeint(fields[1], middle, t[1:], method="leapfrog", options=options, **way)[-1]
        expected = torch.autograd.grad(last.square().sum(), (y0, *field.parameters()))
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)
    drifts: list[float] = []
    way = Reversible(report=drifts.append)
    y = torchdiffeq_lmm.odeint(
        Switched(0.5), start(), t, method="leapfrog", options={"step_size": 0.05, "jump_t": [0.5]}, backward=way
    )
    y[-1].sum().backward()
    assert len(drifts) == 2
    assert all(drift < 1e-10 for drift in drifts)


@pytest.mark.parametrize("backward", ["autograd", "checkpoint"])
def test_random_functions_draw_the_same_numbers_again(backward: str) -> None:
    results = []
    for way in ("autograd", backward):
        torch.manual_seed(3)
        field = Switched(0.5)
        dropout = nn.Dropout(0.5)
        y = torchdiffeq_lmm.odeint(
            lambda t, y, field=field: dropout(field(t, y)),
            start(),
            f64(0.0, 1.0),
            method="ab3",
            options={"step_size": 0.1, "jump_t": [0.3, 0.6]},
            backward=way,
            adjoint_params=None if way == "autograd" else tuple(field.parameters()),
        )
        y[-1].sum().backward()
        results.append([parameter.grad for parameter in field.parameters()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.bfloat16])
@pytest.mark.parametrize("name", SOME)
@pytest.mark.one_in(3)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Times of float32, of which 0.3 is none; y' = -y, then y' = 1."""
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.05}.get(dtype, 1e-3)
    y0 = torch.ones(2, dtype=dtype)
    states = torchdiffeq.odeint(
        lambda t, y: -y if t < 0.3 else torch.ones_like(y),
        y0,
        torch.tensor([0.0, 0.3, 1.0]),
        method=name,
        options={"step_size": 0.05, "jump_t": [0.3]},
    )
    assert states.dtype is dtype
    exact_states = torch.tensor([1.0, np.exp(-0.3), np.exp(-0.3) + 0.7], dtype=torch.float64)
    got = (states.real if dtype.is_complex else states).double()
    torch.testing.assert_close(got, exact_states[:, None].expand(3, 2), rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("name", slow_but(["leapfrog", "ab4"], SOME))
def test_tuples(name: str) -> None:
    options = {"step_size": 0.05, "jump_t": f64(*JUMPS)}
    whole = torchdiffeq.odeint(jumping, f64(1.0, 0.5), f64(0.0, END), method=name, options=options)

    def parts(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slope = jumping(t, torch.stack([y[0], y[1][0]]))
        return slope[0], slope[1:]

    a, b = torchdiffeq.odeint(parts, (f64(1.0)[0], f64(0.5)), f64(0.0, END), method=name, options=options)
    torch.testing.assert_close(torch.stack([a, b[:, 0]], 1), whole, rtol=1e-9, atol=1e-9)
