"""`torchdiffeq_lmm.odeint` beside `torchdiffeq.odeint`."""

import importlib
import inspect
import pkgutil

import pytest
import torch
import torchdiffeq

import torchdiffeq_lmm
from torchdiffeq_lmm import LeapfrogFilter

Y0 = torch.tensor([1.0, 2.0])
T = torch.tensor([0.0, 0.5, 1.0])
STEPS = {"step_size": 0.1}


def decay(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y * torch.cos(t)


def test_has_torchdiffeqs_keywords_and_defaults_and_grad_filter() -> None:
    ours, theirs = (inspect.signature(module.odeint).parameters for module in (torchdiffeq_lmm, torchdiffeq))
    assert list(ours) == [*theirs, "grad_filter", "backward", "adjoint_params", "compile"]
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)
    assert ours["grad_filter"].default is None


@pytest.mark.parametrize("method", [None, "rk4", "dopri5", "leapfrog"])
def test_without_filter_it_is_torchdiffeqs(method: str | None) -> None:
    options = STEPS if method in ("rk4", "leapfrog") else None
    ours = torchdiffeq_lmm.odeint(decay, Y0, T, method=method, options=options)
    assert torch.equal(ours, torchdiffeq.odeint(decay, Y0, T, method=method, options=options))


@pytest.mark.parametrize("grad_filter", ["leapfrog", LeapfrogFilter(), LeapfrogFilter(weights="trapezoid")])
def test_keyword_and_option_are_the_same(grad_filter: object) -> None:
    gradients = []
    for odeint, options, keyword in (
        (torchdiffeq_lmm.odeint, STEPS, {"grad_filter": grad_filter}),
        (torchdiffeq_lmm.odeint, {**STEPS, "grad_filter": grad_filter}, {}),
        (torchdiffeq.odeint, {**STEPS, "grad_filter": grad_filter}, {}),
    ):
        rate = torch.tensor(0.7, requires_grad=True)
        given = dict(options)
        solution = odeint(lambda t, y: -rate * y, Y0, T, method="leapfrog", options=options, **keyword)
        assert options == given
        solution[-1].sum().backward()
        gradients.append(rate.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    unfiltered = torch.tensor(0.7, requires_grad=True)
    solution = torchdiffeq.odeint(lambda t, y: -unfiltered * y, Y0, T, method="leapfrog", options=STEPS)
    solution[-1].sum().backward()
    assert not torch.allclose(gradients[0], unfiltered.grad, rtol=1e-4)


def test_events() -> None:
    event_t, solution = torchdiffeq_lmm.odeint(
        decay,
        Y0,
        T[:2],
        event_fn=lambda t, y: y[0] - 0.6,
        method="leapfrog",
        options={"step_size": 0.01},
        grad_filter="leapfrog",
    )
    # y = y0 exp(-sin t)
    assert float(event_t) == pytest.approx(torch.asin(-torch.log(torch.tensor(0.6))).item(), abs=1e-3)
    assert float(solution[-1, 0]) == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize("method", ["midpoint", "euler", "dopri5", None])
@pytest.mark.parametrize("grad_filter", ["leapfrog", LeapfrogFilter(weights="trapezoid")])
def test_a_filter_for_another_method_is_refused(method: str | None, grad_filter: object) -> None:
    options = {"step_size": 0.1} if method in ("midpoint", "euler") else None
    with pytest.raises(ValueError, match=rf"grad_filter.*'leapfrog'.*method {method or 'dopri5'!r}"):
        torchdiffeq_lmm.odeint(decay, Y0, T, method=method, options=options, grad_filter=grad_filter)
    with pytest.raises(ValueError, match="grad_filter"):
        torchdiffeq_lmm.odeint(decay, Y0, T, method=method, options={**(options or {}), "grad_filter": grad_filter})


@pytest.mark.parametrize("odeint", [torchdiffeq.odeint, torchdiffeq_lmm.odeint])
@pytest.mark.parametrize(
    ("grad_filter", "error"),
    [("smoothest", ValueError), ("", ValueError), (True, TypeError), (3, TypeError), (LeapfrogFilter, TypeError)],
)
def test_an_unknown_filter_is_refused_before_any_step(odeint: object, grad_filter: object, error: type) -> None:
    calls = []

    def func(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return y

    with pytest.raises(
        error, match=r"grad_filter must be None, 'auto', 'leapfrog', 'smooth', a CostateFilter or a SmoothFilter"
    ):
        odeint(func, Y0, T, method="leapfrog", options={"grad_filter": grad_filter})
    assert not calls


def test_a_filter_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="grad_filter is given twice"):
        torchdiffeq_lmm.odeint(
            decay, Y0, T, method="leapfrog", options={"grad_filter": "leapfrog"}, grad_filter=LeapfrogFilter()
        )


def test_odeint_adjoint_refuses_a_filter() -> None:
    options = {**STEPS, "grad_filter": "leapfrog"}
    with pytest.raises(ValueError, match="grad_filter must be None in odeint_adjoint, got 'leapfrog'"):
        torchdiffeq.odeint_adjoint(decay, Y0, T, method="leapfrog", options=options, adjoint_params=())


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights must be one of \('step', 'trapezoid'\), got 'simpson'"):
        LeapfrogFilter(weights="simpson")


def test_what_users_meet_can_be_imported() -> None:
    """Exceptions, and the classes of what is returned."""
    modules = [
        importlib.import_module(f"torchdiffeq_lmm.{m.name}") for m in pkgutil.iter_modules(torchdiffeq_lmm.__path__)
    ]
    for module in modules:
        for name, found in vars(module).items():
            if isinstance(found, type) and issubclass(found, Exception) and found.__module__ == module.__name__:
                assert getattr(torchdiffeq_lmm, name) is found
    for returned in (torchdiffeq_lmm.method_info("ab2"), torchdiffeq_lmm.oscillation(torch.ones(3))):
        assert type(returned).__name__ in torchdiffeq_lmm.__all__
    for name in torchdiffeq_lmm.__all__:
        assert hasattr(torchdiffeq_lmm, name)
    assert issubclass(torchdiffeq_lmm.DriftError, RuntimeError)
