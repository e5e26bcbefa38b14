"""Compiled solves: the values and gradients of eager ones, and of a reference; by the backend without machine code."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from compiled_solves import INSIDE, NEEDS_TORCH, REGULAR, TRACED, UNEQUAL, Field, Light, assert_same, solved, start
from methods import IMPLICIT, NAMES, slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Compile, CostateFilter, DriftError, Reversible
from torchdiffeq_lmm.autodiff import compiled_solve

# Grids on which rows are not those of steps are meant: what is compared is the same with each.
pytestmark = [NEEDS_TORCH, pytest.mark.filterwarnings("ignore:a GridParameter of kind")]

METHOD = CostateFilter("trapezoid", order="method")
SETTINGS = (
    (UNEQUAL, None),
    (INSIDE, REGULAR),
    (INSIDE.flip(0), {"step_size": 0.033}),
    (UNEQUAL.clone().requires_grad_(), None),
)

SHORT = ("leapfrog", "ab1", "ab2", "abm2")

CASES = [
    ("leapfrog", "auto", 1),
    ("leapfrog", CostateFilter("trapezoid"), 2),
    ("ab2", None, 1),
    ("abm2", "auto", 1),
    # Those with a long start take long to trace: each has a filter or none, and one of the grids.
    ("ab1", "auto", 1),
    ("ab3", CostateFilter(order="method"), 0),
    ("ab4", METHOD, 1),
    ("ab5", None, 1),
    ("nystrom3", "auto", 0),
    ("abm3", CostateFilter(order=3), 1),
    ("abm4", None, 3),
    ("abm5", None, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "grad_filter", "setting"), CASES)
def test_values_and_gradients_are_those_of_an_eager_solve(method: str, grad_filter: Any, setting: int) -> None:
    t, options = SETTINGS[setting]
    func = Field() if method in SHORT else Light()
    keywords = {"options": options, "grad_filter": grad_filter}
    compiled = solved(func, start(), t, method, compile=TRACED, **keywords)
    assert_same(compiled, solved(func, start(), t, method, **keywords))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("leapfrog", {"grad_filter": "auto", "backward": Reversible(anchors=2)}),
        ("ab2", {"grad_filter": CostateFilter(order=3)}),
    ],
)
def test_how_many_blocks_are_run_at_once_makes_no_difference(
    method: str, keywords: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    func, found = Light(), []
    # All at once, three, and each by itself; outputs in some of them, then in all.
    for t in (torch.tensor([0.0, 0.11, 1.0], dtype=torch.float64), torch.linspace(0, 1, 41, dtype=torch.float64)):
        for size in (2**20, 3 * 5 * start().nbytes, 1):
            monkeypatch.setattr(compiled_solve, "_RUN_BYTES", size)
            options = {"step_size": 0.025}
            found.append(solved(func, start(), t, method, compile=TRACED, options=options, **keywords))
        first, *others = found[-3:]
        for other in others:
            assert_same(other, first, 1e-13)
        eager = {name: given for name, given in keywords.items() if name != "backward"}
        assert_same(first, solved(func, start(), t, method, options=options, **eager))


def test_every_explicit_method_is_compared() -> None:
    assert {method for method, *_ in CASES} == set(NAMES) - IMPLICIT


@pytest.mark.slow
@pytest.mark.parametrize(("method", "setting"), [("midpoint", 1), ("heun2", 0)])
def test_filtered_two_stage_methods(method: str, setting: int) -> None:
    func, (t, options) = Light(), SETTINGS[setting]
    keywords = {"options": options, "grad_filter": "auto"}
    compiled = solved(func, start(), t, method, compile=TRACED, **keywords)
    assert_same(compiled, solved(func, start(), t, method, **keywords))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "grad_filter"), [("ab2", "auto"), ("leapfrog", None)])
def test_gradients_of_times(method: str, grad_filter: Any) -> None:
    func, t = Field(), UNEQUAL.clone().requires_grad_()
    compiled = solved(func, start(), t, method, compile=TRACED, grad_filter=grad_filter)
    assert_same(compiled, solved(func, start(), t, method, grad_filter=grad_filter))


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences() -> None:
    rate = torch.tensor([0.3, -1.1], dtype=torch.float64, requires_grad=True)
    y0 = start().requires_grad_()
    t = torch.tensor([0.0, 0.2, 0.45, 0.8, 1.0, 1.1, 1.3, 1.6, 2.0], dtype=torch.float64, requires_grad=True)

    def solve(y0: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        return torchdiffeq_lmm.odeint(lambda t, y: rate * y.sin() + t, y0, t, method="ab2", compile=TRACED)

    assert torch.autograd.gradcheck(solve, (y0, t, rate))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "order"), [("leapfrog", 2), ("ab3", 3)])
def test_states_and_gradients_converge_to_the_closed_form(method: str, order: int) -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.rate * y

    func, errors = Decay(), []
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for steps in (20, 40, 80):
        options = {"step_size": 1 / steps}
        end = torchdiffeq_lmm.odeint(
            func, torch.ones((), dtype=torch.float64), t, method=method, options=options, compile=TRACED
        )[-1]
        (grad,) = torch.autograd.grad(end, (func.rate,))
        # Both are e^{-0.7}.
        errors.append(max(abs(float(found.detach()) - math.exp(-0.7)) for found in (end, grad)))
    measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert all(abs(found - order) < 0.2 for found in measured), measured


@pytest.mark.slow
def test_a_filtered_gradient_converges_to_the_density_and_a_plain_one_oscillates() -> None:
    # x' = -x + θ(t), E = x(1): the density of dE/dθ at t is e^{t - 1}.
    class Forced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Of one shape, so that all numbers of steps have one compilation.
            self.theta = nn.Parameter(torch.zeros(81, dtype=torch.float64))
            self.register_buffer("steps", torch.zeros((), dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.theta.index_select(0, (t * self.steps).round().long().reshape(1))[0] - y

    func, t, errors = Forced(), torch.tensor([0.0, 1.0], dtype=torch.float64), {}
    for grad_filter in (None, "auto"):
        for steps in (20, 40, 80):
            func.steps.fill_(steps)
            options = {"step_size": 1 / steps}
            end = torchdiffeq_lmm.odeint(
                func,
                torch.ones((), dtype=torch.float64),
                t,
                method="leapfrog",
                options=options,
                grad_filter=grad_filter,
                compile=TRACED,
            )[-1]
            grad = torch.autograd.grad(end, (func.theta,))[0][:steps]
            exact = torch.exp(torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1] - 1)
            errors[grad_filter, steps] = float((grad * steps - exact).abs().max())
    assert errors[None, 80] > 0.3
    for steps in (20, 40):
        assert math.log2(errors["auto", steps] / errors["auto", 2 * steps]) > 1.8


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        position, speed = y
        return speed.expand_as(position) * self.rate, -position.sum(-1, keepdim=True)


@pytest.mark.parametrize("sign", slow_but((-1.0,), (1.0, -1.0)))
def test_a_tuple_of_tensors(sign: float) -> None:
    func, t = Pair(), sign * INSIDE
    found = []
    for compile in (None, TRACED):  # noqa: A001
        y0 = (start().requires_grad_(), start()[:, :1].clone().requires_grad_())
        states = torchdiffeq_lmm.odeint(func, y0, t, method="ab2", options=REGULAR, compile=compile)
        loss = states[0].square().sum() + states[1].sum()
        found.append([*states, *torch.autograd.grad(loss, (*y0, func.rate))])
    assert_same([part.detach() for part in found[1]], [part.detach() for part in found[0]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "leapfrog", "grad_filter": "smooth", "options": REGULAR},
        {"method": "leapfrog", "grad_filter": "auto", "options": {**REGULAR, "interp": "cubic"}},
        {"method": "ab2", "options": {**REGULAR, "interp": "cubic", "perturb": True}},
        {"method": "ab4", "options": {"step_size": 0.5}},
    ],
    ids=["smooth", "cubic, filtered", "cubic, perturb", "shorter than a block"],
)
def test_other_outputs_and_grids(keywords: dict[str, Any]) -> None:
    func = Field()
    # One of them is in the first step.
    t = torch.cat([INSIDE[:1], torch.tensor([0.01], dtype=torch.float64), INSIDE[1:]])
    compiled = solved(func, start(), t, compile=TRACED, **keywords)
    assert_same(compiled, solved(func, start(), t, **keywords))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_other_dtypes(dtype: torch.dtype) -> None:
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.tensor([[0.0, 1.0], [-1.0, 0.3]], dtype=dtype))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return (1j if dtype.is_complex else 1) * y @ self.turn * t

    func = Turn()
    found = []
    for compile in (None, TRACED):  # noqa: A001
        y0 = start().to(dtype).requires_grad_()
        t = INSIDE.to(dtype.to_real())
        states = torchdiffeq_lmm.odeint(func, y0, t, method="ab2", options=REGULAR, grad_filter="auto", compile=compile)
        found.append([states.detach(), *torch.autograd.grad(states.abs().square().sum(), (y0, func.turn))])
    assert_same(found[1], found[0], 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.slow
def test_without_gradients_there_are_none() -> None:
    func, options = Field(), REGULAR
    expected = torchdiffeq_lmm.odeint(func, start(), INSIDE, method="ab2", options=options).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = torchdiffeq_lmm.odeint(func, start(), INSIDE, method="ab2", options=options, compile=TRACED)
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_rows_that_fill_up_a_block_do_not_evaluate_func_beyond_the_end() -> None:
    # At the end f has an infinite derivative.
    def func(t: Tensor, y: Tensor) -> Tensor:
        return (1 - t).sqrt() * (2 - y).sqrt()

    t = torch.linspace(0, 1, 8, dtype=torch.float64)
    y0 = torch.ones((), dtype=torch.float64, requires_grad=True)
    end = torchdiffeq_lmm.odeint(func, y0, t, method="ab1", compile=TRACED)[-1]
    (grad,) = torch.autograd.grad(end, (y0,))
    assert math.isfinite(float(grad))


@pytest.mark.slow
def test_the_length_of_a_block_does_not_matter() -> None:
    # Of the others of this file it is 5. The time runs backwards.
    func, t, options = Light(), *SETTINGS[2]
    keywords = {"options": options, "grad_filter": "auto"}
    settings = Compile(block=8, backend="eager")
    compiled = solved(func, start(), t, "leapfrog", compile=settings, **keywords)
    assert_same(compiled, solved(func, start(), t, "leapfrog", **keywords))


class TestReversible:
    """Run backwards from the last block, with a few states that are kept on the way."""

    @pytest.mark.slow
    def test_the_gradient_is_that_of_auto_differentiation(self) -> None:
        """Filtered: unfiltered it is compared in `test_time_lookups`."""
        func, drifts = Light(), list[float]()
        keywords = {"method": "leapfrog", "options": {"step_size": 1 / 230}, "grad_filter": "auto"}
        backward = Reversible(anchors=2, report=drifts.append)
        compiled = solved(func, start(), INSIDE, compile=TRACED, backward=backward, **keywords)
        assert_same(compiled, solved(func, start(), INSIDE, **keywords))
        assert len(drifts) == 1
        assert 0 < drifts[0] < 1e-12

    @pytest.mark.slow
    def test_what_is_kept_does_not_grow_with_the_steps(self) -> None:
        def kept(steps: int, **keywords: Any) -> int:
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
                t, options = torch.tensor([0.0, 1.0], dtype=torch.float64), {"step_size": 1 / steps}
                torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options=options, compile=TRACED, **keywords)
            return sum(tensor.numel() for tensor in saved)

        def func(t: Tensor, y: Tensor) -> Tensor:
            return -y.sin()

        y0 = start().requires_grad_()
        # What is traced, in the first solve of each kind, is saved as well.
        first = [kept(400), kept(400, backward="reversible")]
        assert all(first)
        # Two tensors of the past before each block, with 8 states on the way, the first three and the last one.
        most = 2 * 12 * y0.numel()
        assert max(kept(steps, backward="reversible") for steps in (400, 800)) <= most < kept(400) < kept(800)

    @pytest.mark.slow
    def test_drift_is_an_error_or_begins_again(self) -> None:
        # The parasitic mode grows as e^{10 t} on the way back.
        def solve(backward: Any) -> Tensor:
            t, options = torch.tensor([0.0, 2.0], dtype=torch.float64), {"step_size": 0.01}
            y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
            states = torchdiffeq_lmm.odeint(
                lambda t, y: -10 * y, y0, t, method="leapfrog", options=options, compile=TRACED, backward=backward
            )
            return torch.autograd.grad(states[-1].sum(), (y0,))[0]

        with pytest.raises(DriftError, match="off by"):
            solve(Reversible(anchors=0))
        torch.testing.assert_close(
            solve(Reversible(anchors=0, on_drift="checkpoint")), solve("autograd"), rtol=1e-12, atol=0
        )


@pytest.mark.slow
def test_layouts_and_conjugates_of_states_and_parameters() -> None:
    # Slopes come out transposed, y0 is conjugated by a mark alone.
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128).t())

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return (self.weight @ y.t()).t() * t

    func, found = Transposed(), []
    y0 = (start(3).reshape(2, 3) * (1 + 2j)).requires_grad_()
    for compile in (None, TRACED):  # noqa: A001
        states = torchdiffeq_lmm.odeint(func, y0.conj(), INSIDE, method="ab2", options=REGULAR, compile=compile)
        found.append([states.detach(), *torch.autograd.grad((states * states.conj()).real.sum(), (y0, func.weight))])
    assert_same(found[1], found[0])


@pytest.mark.slow
def test_one_graph_for_states_of_several_shapes() -> None:
    def ends(y0: Tensor, **keywords: Any) -> Tensor:
        return torchdiffeq_lmm.odeint(lambda t, y: -t * y, y0, INSIDE, method="ab1", options=REGULAR, **keywords)

    for shape in ((2, 3), (4, 3), (5, 3), (2, 2), (4, 2), (6, 2), (4,), (6,), ()):
        y0 = torch.ones(shape, dtype=torch.float64)
        torch.testing.assert_close(ends(y0, compile=TRACED), ends(y0), rtol=1e-12, atol=0)
