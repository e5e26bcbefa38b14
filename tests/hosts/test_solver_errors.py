"""Bad input to a solve: an error that names it, before any work is done."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from leapfrog import curved, decay, on, solve, tensor
from torch import Tensor

import torchdiffeq_lmm


def refuses(func: Any, y0: Any, t: Tensor, **options: Any) -> tuple[Exception, int]:
    """The exception that a solve raises, and how often func was evaluated before."""
    count = 0

    def counted(t: Tensor, y: Any) -> Any:
        nonlocal count
        count += 1
        return func(t, y)

    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        solve(counted, y0, t, **options)
    return error.value, count


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"step_size": 0.0}, ValueError, ("step_size", "0.0", "positive")),
        ({"step_size": -0.1}, ValueError, ("step_size", "-0.1", "positive", "decreasing")),
        ({"step_size": math.nan}, ValueError, ("step_size", "nan", "finite")),
        ({"step_size": math.inf}, ValueError, ("step_size", "inf", "finite")),
        ({"step_size": "0.1"}, TypeError, ("step_size", "'0.1'", "number")),
        ({"step_size": True}, TypeError, ("step_size", "True", "number")),
        ({"step_size": [0.1]}, TypeError, ("step_size", "[0.1]", "number")),
        ({"step_size": torch.ones(2)}, TypeError, ("step_size", "tensor([1., 1.])", "number")),
        ({"step_size": 1e-8}, ValueError, ("step_size", "1e-08", "10000000")),
        ({"step_size": 0.1, "grid_constructor": curved}, ValueError, ("step_size", "grid_constructor", "exclusive")),
        ({"grid_constructor": on(tensor(0.0, 0.5, 0.5, 1.0))}, ValueError, ("grid_constructor", "0.5", "monotonic")),
        ({"grid_constructor": on(tensor(0.0, 0.5))}, ValueError, ("grid_constructor", "0.5", "t[-1]")),
        ({"grid_constructor": on(tensor(0.5, 1.0))}, ValueError, ("grid_constructor", "0.5", "t[0]")),
        ({"grid_constructor": on(tensor(0.0, math.inf))}, ValueError, ("grid_constructor", "inf")),
        ({"grid_constructor": on(tensor(0.0, math.nan, 1.0))}, ValueError, ("grid_constructor", "nan")),
        ({"interp": "quadratic"}, ValueError, ("interp", "'quadratic'", "cubic")),
        ({"grad_filter": "midpoint"}, ValueError, ("grad_filter", "'midpoint'", "leapfrog")),
        ({"grad_filter": 3}, TypeError, ("grad_filter", "3", "leapfrog")),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    error, count = refuses(decay, tensor(1.0), tensor(0.0, 1.0), **options)
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []
    assert count == 0


@pytest.mark.parametrize("made", [None, [0.0, 1.0], 3.0])
@pytest.mark.parametrize("direction", [1, -1])
def test_a_grid_constructor_that_returns_no_tensor(direction: int, made: Any) -> None:
    error, count = refuses(decay, tensor(1.0), direction * tensor(0.0, 1.0), grid_constructor=lambda func, y0, t: made)
    assert isinstance(error, TypeError)
    assert "grid_constructor must return a floating-point tensor of times" in str(error)
    assert type(made).__name__ in str(error)
    assert count == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_integer_states(is_tuple: bool, dtype: torch.dtype) -> None:
    y0 = torch.ones(2, dtype=dtype)
    error, count = refuses(decay, (y0, y0) if is_tuple else y0, tensor(0.0, 1.0))
    assert isinstance(error, TypeError)
    assert "y0" in str(error)
    assert str(dtype) in str(error)
    assert "float" in str(error)
    assert count == 0


def test_empty_times() -> None:
    error, count = refuses(decay, tensor(1.0), tensor())
    assert isinstance(error, ValueError)
    assert "t must" in str(error)
    assert "empty" in str(error)
    assert count == 0


@pytest.mark.parametrize("times", [(0.0, math.inf), (-math.inf, 0.0), (math.nan,), (0.0, -math.inf)])
def test_times_that_are_not_finite(times: tuple[float, ...]) -> None:
    error, count = refuses(decay, tensor(1.0), tensor(*times))
    assert isinstance(error, ValueError)
    assert "t must be finite" in str(error)
    assert count == 0


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (lambda y: y[:1], ValueError, ("func", "(1,)", "(2,)")),
        (lambda y: y[None], ValueError, ("func", "(1, 2)", "(2,)")),
        (lambda y: y.sum(), ValueError, ("func", "()", "(2,)")),
        (lambda y: y.float(), TypeError, ("func", "float32", "float64")),
        (lambda y: y + 0j, TypeError, ("func", "complex128", "float64")),
        (lambda y: y.to("meta"), ValueError, ("func", "meta", "cpu")),
        (lambda y: y.tolist(), TypeError, ("func", "list", "tensor")),
        (lambda y: (y,), TypeError, ("func", "tuple", "tensor")),
        (lambda y: None, TypeError, ("func", "NoneType", "tensor")),
    ],
)
@pytest.mark.parametrize("grad_filter", [None, "leapfrog"])
def test_bad_answers_of_func(
    grad_filter: str | None, bad: Callable[[Tensor], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    error, count = refuses(lambda t, y: bad(y), tensor(1.0, 2.0), tensor(0.0, 1.0, 2.0), grad_filter=grad_filter)
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []
    # Before any step is taken.
    assert count == 1


def test_a_filter_for_another_method() -> None:
    for method in ("rk4", "dopri5", None):
        with pytest.raises(ValueError, match=rf"grad_filter .*'leapfrog'.*{method or 'dopri5'}"):
            torchdiffeq_lmm.odeint(decay, tensor(1.0), tensor(0.0, 1.0), method=method, grad_filter="leapfrog")


def test_unknown_options_are_warned_of_in_torchdiffeqs_words() -> None:
    t = tensor(0.0, 1.0)
    with pytest.warns(UserWarning, match=r"Leapfrog: Unexpected arguments \{'stepsize': 0.1, 'first': 2\}") as record:
        out = solve(decay, tensor(1.0), t, stepsize=0.1, first=2)
    assert len(record) == 1
    assert torch.equal(out, solve(decay, tensor(1.0), t))


def test_known_options_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchdiffeq.odeint(
            decay,
            tensor(1.0),
            tensor(0.0, 1.0),
            rtol=1e-3,
            atol=1e-4,
            method="leapfrog",
            options={"step_size": 0.5, "interp": "cubic", "perturb": True, "norm": torch.linalg.norm},
        )
