"""Adaptive steps go on without samples for which no step is short enough, if that is asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import SolveReport

T = torch.tensor([0.0, 0.5, 0.9, 1.5], dtype=torch.float64)
OTHERS = [0, 1, 3]


def blow_up(rate: Tensor, y0: Tensor, **keywords: Any) -> Tensor:
    """y' = a y² with y(0) = 1 for sample 2, which ends at t = 1 / a."""
    options = {"on_failure": "nan", **keywords.pop("options", {})}
    return torchdiffeq_lmm.odeint(
        lambda _, y: rate * y * y, y0, T, method="bdf", rtol=1e-5, atol=1e-8, options=options, **keywords
    )


@pytest.fixture
def rate() -> Tensor:
    return torch.tensor(1.0, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def y0() -> Tensor:
    return torch.tensor([[-1.0], [0.5], [1.0], [-0.3]], dtype=torch.float64, requires_grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("grad_filter", [None, "auto"])
def test_a_sample_that_ends_is_nan_and_the_others_are_right(rate: Tensor, y0: Tensor, grad_filter: Any) -> None:
    report = SolveReport()
    with pytest.warns(
        UserWarning, match=r"no step of method 'bdf' was short enough for 1 of 4 samples, \[2\]: they are"
    ):
        y = blow_up(rate, y0, grad_filter=grad_filter, options={"report": report})
    exact = y0 / (1 - rate * T[:, None, None] * y0)
    assert torch.isfinite(y[:3]).all()
    assert torch.isnan(y[3, 2]).all()
    torch.testing.assert_close(y[:, OTHERS], exact[:, OTHERS], rtol=0, atol=1e-3)
    # Beyond it steps are as long as the others need.
    assert report.times[-1] - report.times[-2] > 1e-3
    found, expected = (torch.autograd.grad(of[:, OTHERS].sum(), (rate, y0)) for of in (y, exact))
    for one, other in zip(found, expected, strict=True):
        # The filter is of second order in steps that are long at this tolerance.
        torch.testing.assert_close(one, other, rtol=3e-3 if grad_filter is None else 4e-2, atol=1e-6)


def test_func_that_is_nan_for_a_sample_and_a_jump_after_it(rate: Tensor) -> None:
    y0 = torch.tensor([[1.0, 1.0], [3.0, 1.0], [0.5, 2.0]], dtype=torch.float64, requires_grad=True)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where((y0.detach()[:, :1] > 2) & (t > 0.6), torch.nan, 0.0) - rate * y

    options = {"on_failure": "nan", "jump_t": torch.tensor([1.2], dtype=torch.float64)}
    with pytest.warns(UserWarning, match=r"for 1 of 3 samples, \[1\]"):
        y = torchdiffeq_lmm.odeint(func, y0, T, method="bdf", rtol=1e-6, atol=1e-8, options=options)
    exact = y0 * torch.exp(-rate * T)[:, None, None]
    assert torch.isnan(y[:, 1]).any(1).tolist() == [False, False, True, True]
    torch.testing.assert_close(y[:, [0, 2]], exact[:, [0, 2]], rtol=0, atol=1e-4)
    found, expected = (torch.autograd.grad(of[:, [0, 2]].sum(), (rate, y0)) for of in (y, exact))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_where_no_sample_would_be_left_there_is_an_error(rate: Tensor) -> None:
    y0 = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"found no step that is accurate enough at t = (1|0\.99)"):
        blow_up(rate, y0)


@pytest.mark.parametrize(
    ("method", "keywords"),
    [("adams", {}), ("bdf", {"backward": "checkpoint", "adjoint_params": ()})],
    ids=["explicit", "checkpoint"],
)
def test_it_is_for_bdf_and_autograd(method: str, keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"on_failure must be 'raise' for method .*, got 'nan', which is for 'bdf'"):
        torchdiffeq_lmm.odeint(
            lambda _, y: -y, torch.ones(2, 1), T, method=method, options={"on_failure": "nan"}, **keywords
        )
