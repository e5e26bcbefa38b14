"""What is found inside torchdiffeq's wrappers."""

import pytest
import torch
import torchdiffeq
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_lmm.forward.vector_field import HostedFunction
from torchdiffeq_lmm.hosts.torchdiffeq_host import unwrap

FOUND: list[HostedFunction] = []


class Spy:
    """A solver that keeps what it finds, and solves nothing."""

    def __init__(self, func: object, y0: Tensor, **_: object) -> None:
        FOUND.append(unwrap(func))
        self.y0 = y0

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        return {"callback_step"}

    def integrate(self, t: Tensor) -> Tensor:
        return torch.stack([self.y0] * len(t))


@pytest.fixture(autouse=True)
def spy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "spy", Spy)
    FOUND.clear()


def func(t: Tensor, y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_finds_the_users_function(reverse: bool, is_tuple: bool) -> None:
    t = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0])
    y0 = (torch.ones(2), torch.ones(1, 3)) if is_tuple else torch.ones(2)
    torchdiffeq.odeint(func, y0, t, method="spy")
    (found,) = FOUND
    assert found.call is func
    assert found.reversed is reverse
    assert found.shapes == ((torch.Size([2]), torch.Size([1, 3])) if is_tuple else None)
    assert found.callback_step is None
    assert not found.in_adjoint
    assert not found.is_adjoint


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("is_tuple", [False, True])
def test_tells_both_solves_of_odeint_adjoint(reverse: bool, is_tuple: bool) -> None:
    t = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0])
    y0 = torch.ones(2, requires_grad=True)
    states = torchdiffeq.odeint_adjoint(
        (lambda t, y: (y[0],)) if is_tuple else func, (y0,) if is_tuple else y0, t, method="spy", adjoint_params=()
    )
    (states[0] if is_tuple else states).sum().backward()
    forward, backward = FOUND
    assert (forward.in_adjoint, forward.is_adjoint) == (True, False)
    assert (backward.in_adjoint, backward.is_adjoint) == (True, True)
    assert forward.reversed is reverse


def test_finds_the_callback() -> None:
    seen = []

    class WithCallback(torch.nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return y

        def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
            seen.append(float(t0))

    torchdiffeq.odeint(WithCallback(), torch.ones(2), torch.tensor([1.0, 0.0]), method="spy")
    FOUND[0].callback_step(torch.tensor(-0.5), torch.ones(2), torch.tensor(0.1))
    assert seen == [0.5]
