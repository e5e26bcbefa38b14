"""torchdiffeq's method table."""

import pytest
import torch
import torchdiffeq
from programs import output_of
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_lmm
from torchdiffeq_lmm.hosts.solver import Leapfrog
from torchdiffeq_lmm.hosts.torchdiffeq_host import check_free, remove_solvers


class Foreign:
    """A solver of somebody else."""


pytestmark = pytest.mark.usefixtures("_method_tables")


def solve() -> torch.Tensor:
    t = torch.linspace(0, 1, 3)
    return torchdiffeq.odeint(lambda t, y: -y, torch.ones(2), t, method="leapfrog")


def test_import_registers() -> None:
    assert SOLVERS["leapfrog"] is Leapfrog
    assert solve().shape == (3, 2)


def test_registering_again_changes_nothing() -> None:
    before = dict(SOLVERS)
    torchdiffeq_lmm.register()
    torchdiffeq_lmm.register()
    assert before == SOLVERS


def test_unregister_and_register() -> None:
    everything = dict(SOLVERS)
    others = {
        name: solver
        for name, solver in SOLVERS.items()
        if solver.__module__.partition(".")[0] != torchdiffeq_lmm.__name__
    }
    torchdiffeq_lmm.unregister()
    assert others == SOLVERS
    with pytest.raises(ValueError, match='Invalid method "leapfrog"'):
        solve()
    torchdiffeq_lmm.unregister()
    assert others == SOLVERS
    torchdiffeq_lmm.register()
    assert everything == SOLVERS
    assert solve().shape == (3, 2)


Namesake = type("Leapfrog", (), {"__module__": "another_package.solver"})


@pytest.mark.parametrize(
    "foreign", [Foreign, Foreign(), None, Namesake], ids=["class", "instance", "none", "of the same name"]
)
def test_a_foreign_method_is_not_overwritten(foreign: object) -> None:
    SOLVERS["leapfrog"] = foreign
    before = dict(SOLVERS)
    with pytest.raises(RuntimeError, match=r"'leapfrog'.*not torchdiffeq_lmm's") as error:
        torchdiffeq_lmm.register()
    assert repr(foreign) in str(error.value)
    assert before == SOLVERS


def test_a_foreign_method_is_not_removed() -> None:
    SOLVERS["leapfrog"] = Foreign
    torchdiffeq_lmm.unregister()
    assert SOLVERS["leapfrog"] is Foreign


def test_all_or_none() -> None:
    torchdiffeq_lmm.unregister()
    SOLVERS["taken"] = Foreign
    before = dict(SOLVERS)
    with pytest.raises(RuntimeError, match="'taken'"):
        check_free({"leapfrog": Leapfrog, "taken": Leapfrog})
    assert before == SOLVERS
    remove_solvers({"leapfrog": Leapfrog, "taken": Leapfrog, "missing": Leapfrog})
    assert before == SOLVERS


@pytest.mark.slow
def test_importing_the_package_where_the_name_is_taken_and_anew_and_where_torchsde_lacks_what_is_needed() -> None:
    """In the tables of both torchdiffeq and torchsde."""
    code = """
import sys, torch, torchdiffeq, torchsde
from torchdiffeq._impl.odeint import SOLVERS
has_sympy = "sympy" in sys.modules
SOLVERS["leapfrog"] = foreign = type("Foreign", (), {})
before = dict(SOLVERS)
try:
    import torchdiffeq_lmm
except RuntimeError as error:
    print("leapfrog" in str(error) and "Foreign" in str(error), SOLVERS == before)
del SOLVERS["leapfrog"]
import torchdiffeq_lmm
# SymPy takes as long as all of the package; compiled solves alone need it.
print(SOLVERS["leapfrog"].__module__, ("sympy" in sys.modules) == has_sympy)

from torchsde._core import methods
from torchsde.settings import METHODS

def registered():
    return SOLVERS["leapfrog"], methods.select(method="leapfrog", sde_type="ito")

first = registered()
def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchdiffeq_lmm"]:
        del sys.modules[name]

forget()
import torchdiffeq_lmm
second = registered()
y = torchdiffeq.odeint(lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 3), method="leapfrog")
torchdiffeq_lmm.unregister()
print(first[0] is second[0], tuple(y.shape), "leapfrog" in SOLVERS)
print(first[1] is second[1], second[1].__name__, "leapfrog" in METHODS, hasattr(methods.select, "__wrapped__"))

forget()
import torchsde._core.adjoint
del torchsde._core.adjoint._select_default_adjoint_method
try:
    import torchdiffeq_lmm
except ImportError as error:
    print(error)
"""
    taken, anew = (
        ["True True", "torchdiffeq_lmm.hosts.solver True"],
        ["False (3, 2) False", "False leapfrog False False"],
    )
    *lines, lacks = output_of(code).strip().split("\n")
    assert lines == [*taken, *anew]
    assert lacks.startswith("torchsde 0.2")
