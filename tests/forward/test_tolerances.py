"""rtol and atol: refused before any work where they are used and cannot be, and left alone where they are not."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchdiffeq
import torchsde
from sde_problems import Pendulum, initial
from torch import Tensor

T = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
Y0 = torch.ones(2, 3, dtype=torch.float64)

REFUSED: list[tuple[Any, type[Exception], str]] = [
    (math.nan, ValueError, "must be finite and not negative, got nan"),
    (-1e-3, ValueError, "must be finite and not negative, got -0.001"),
    (math.inf, ValueError, "must be finite and not negative, got inf"),
    (torch.tensor([1e-3, math.nan, 1e-3]), ValueError, "must be finite and not negative, got tensor.*nan"),
    (torch.ones(2), ValueError, r"must broadcast with y0, of shape \(\d, \d\), got shape \(2,\)"),
    (torch.ones(1, 1, 1), ValueError, r"must broadcast with y0, of shape \(\d, \d\), got shape \(1, 1, 1\)"),
    (None, TypeError, "must be a real number, or a real tensor that broadcasts with y0, got None"),
    ("1e-3", TypeError, "must be a real number, .* got '1e-3'"),
    (True, TypeError, "must be a real number, .* got True"),
    ([1e-3] * 3, TypeError, r"must be a real number, .* got \[0.001"),
    (torch.ones(3, dtype=torch.complex64), TypeError, "must be a real number, .* got dtype torch.complex64"),
]


def unreached(t: Tensor, y: Any) -> Any:
    raise AssertionError("func was evaluated")


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


@pytest.mark.parametrize("argument", ["rtol", "atol"])
@pytest.mark.parametrize(("value", "error", "message"), REFUSED)
def test_refused_before_an_implicit_solve(value: Any, error: type[Exception], message: str, argument: str) -> None:
    for method in ("bdf2", "am3", "milne_simpson"):
        with pytest.raises(error, match=f"{argument} {message}"):
            torchdiffeq.odeint(unreached, Y0, T, method=method, **{argument: value})


@pytest.mark.parametrize(("value", "error", "message"), REFUSED)
def test_refused_before_the_search_for_an_event(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"atol {message}"):
        torchdiffeq.odeint(
            unreached,
            Y0,
            T[:2],
            method="ab2",
            atol=value,
            options={"step_size": 0.1},
            event_fn=lambda t, y: y.sum() - 1,
        )


@pytest.mark.parametrize("argument", ["rtol", "atol"])
@pytest.mark.parametrize(("value", "error", "message"), REFUSED)
def test_refused_before_an_implicit_sde(value: Any, error: type[Exception], message: str, argument: str) -> None:
    y0 = initial()
    if isinstance(value, Tensor) and value.shape == (3,):
        value = value[:2]
    elif isinstance(value, Tensor):
        value, message = torch.ones(3), message.replace("(2,", "(3,").replace("1, 1, 1", "3,")
    with pytest.raises(error, match=f"{argument} {message}"):
        torchsde.sdeint(Pendulum("diagonal"), y0, T.to(y0.dtype), method="bdf2", dt=0.1, **{argument: value})


def test_an_entry_of_a_tuple_is_refused() -> None:
    y0 = (torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"rtol must be finite and not negative, got tensor.*nan"):
        torchdiffeq.odeint(unreached, y0, T, method="bdf2", rtol=(1e-3, math.nan))


@pytest.mark.parametrize("argument", ["rtol", "atol"])
@pytest.mark.parametrize("value", [math.nan, None, "any"])
def test_explicit_steps_use_none(value: Any, argument: str) -> None:
    """As torchdiffeq's own explicit methods, which take anything."""
    for method in ("leapfrog", "ab3", "abm3", "rk4"):
        found = torchdiffeq.odeint(decay, Y0, T, method=method, **{argument: value})
        assert torch.equal(found, torchdiffeq.odeint(decay, Y0, T, method=method))


@pytest.mark.parametrize(
    "tolerances",
    [
        {"rtol": 0, "atol": 1e-9},
        {"rtol": 1e-9, "atol": 0.0},
        {"rtol": 0.0, "atol": 0},
        {"rtol": np.float32(1e-8)},
        {"rtol": torch.tensor(1e-8), "atol": torch.tensor([0, 0, 0])},
        {"atol": torch.full((2, 1), 1e-9)},
    ],
)
def test_what_is_accepted(tolerances: dict[str, Any]) -> None:
    """The trapezoidal rule, of which a step multiplies by (1 - h / 2) / (1 + h / 2)."""
    found = torchdiffeq.odeint(decay, Y0, T, method="am2", **tolerances)
    torch.testing.assert_close(found, 0.6 ** torch.arange(3, dtype=Y0.dtype)[:, None, None] * Y0, rtol=1e-8, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_tolerances_of_a_tuple_of_states_on_a_gpu() -> None:
    y0 = (torch.ones(2, device="cuda"), torch.ones(3, device="cuda"))
    found = torchdiffeq.odeint(
        lambda t, y: (-y[0], -y[1]), y0, T.cuda().float(), method="am2", rtol=(1e-5, 1e-6), atol=(1e-7, 1e-8)
    )
    torch.testing.assert_close(found[1][-1].cpu(), torch.full((3,), 0.36), rtol=1e-4, atol=0)
