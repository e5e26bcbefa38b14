"""torchsde's method table."""

import pytest
import torch
import torchsde
from sde_problems import Pendulum, initial
from torchdiffeq._impl.odeint import SOLVERS
from torchsde._core import adjoint, methods
from torchsde.settings import METHODS

import torchdiffeq_lmm
from torchdiffeq_lmm.hosts.registration import SDE_SOLVERS

OWN = {
    "euler",
    "milstein",
    "srk",
    "midpoint",
    "reversible_heun",
    "adjoint_reversible_heun",
    "heun",
    "log_ode",
    "euler_heun",
}


pytestmark = pytest.mark.usefixtures("_method_tables")


def solve() -> torch.Tensor:
    with torch.no_grad():
        return torchsde.sdeint(Pendulum("diagonal"), initial(), [0.0, 1.0], method="leapfrog", dt=0.1)


def test_import_registers() -> None:
    assert set(METHODS.all()) >= OWN | set(SDE_SOLVERS)
    assert methods.select(method="leapfrog", sde_type="ito") is SDE_SOLVERS["leapfrog"]
    assert methods.select(method="euler", sde_type="ito") is methods.Euler
    assert solve().shape == (2, 4, 2)


def test_registering_again_changes_nothing() -> None:
    before = methods.select, adjoint._select_default_adjoint_method, METHODS.all()
    torchdiffeq_lmm.register()
    torchdiffeq_lmm.register()
    assert before == (methods.select, adjoint._select_default_adjoint_method, METHODS.all())


def test_unregister_leaves_torchsde_as_it_was() -> None:
    torchdiffeq_lmm.unregister()
    torchdiffeq_lmm.unregister()
    own = OWN | {name for name in METHODS.all() if name not in SDE_SOLVERS}
    assert set(METHODS.all()) == own
    assert methods.select.__module__ == methods.__name__
    assert not hasattr(methods.select, "__wrapped__")
    assert not hasattr(adjoint._select_default_adjoint_method, "__wrapped__")
    with pytest.raises(ValueError, match="but found leapfrog"):
        solve()
    torchdiffeq_lmm.register()
    assert solve().shape == (2, 4, 2)


def test_a_foreign_method_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    torchdiffeq_lmm.unregister()
    monkeypatch.setattr(METHODS, "somebodys", "leapfrog", raising=False)
    before = dict(SOLVERS), METHODS.all()
    with pytest.raises(RuntimeError, match="torchsde already has a method 'leapfrog'"):
        torchdiffeq_lmm.register()
    # All or none, of torchdiffeq too.
    assert before == (dict(SOLVERS), METHODS.all())
    torchdiffeq_lmm.unregister()
    assert "leapfrog" in METHODS


def test_a_taken_name_of_torchdiffeq_keeps_torchsde_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torchdiffeq_lmm.unregister()
    monkeypatch.setitem(SOLVERS, "leapfrog", object)
    before = METHODS.all()
    with pytest.raises(RuntimeError, match="torchdiffeq already has"):
        torchdiffeq_lmm.register()
    assert before == METHODS.all()


def test_a_method_of_ones_own_must_not_have_the_name_of_torchsdes() -> None:
    with pytest.raises(RuntimeError, match="torchsde already has a method 'srk'"):
        torchdiffeq_lmm.register_method("srk", [0, -1, 1], [-0.5, 1.5, 0])
    assert "srk" not in SOLVERS
