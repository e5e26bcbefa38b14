"""Linear multistep methods for torchdiffeq, with gradients that converge to those of the underlying flow.

Importing the package registers its methods: ``torchdiffeq.odeint(..., method="ab3")``, ``"bdf2"``, ``"leapfrog"``, ...,
and ``"bdf"`` and ``"adams"``, which choose their steps.
`method_info` tells of each.
"""

from .autodiff.checkpoints import Checkpoint
from .autodiff.compile_settings import Compile
from .autodiff.reversal import DriftError, Reversible
from .filters.grad_filter import CostateFilter, LeapfrogFilter, SmoothFilter
from .filters.stack_filter import filter_gradient, register_grad_filter
from .forward.newton_options import Newton
from .forward.solve_report import SolveReport
from .hosts.interface import odeint
from .hosts.registration import method_info, register, register_method, unregister
from .parameters.grid_module import GridModule
from .parameters.grid_parameter import GridParameter
from .parameters.oscillation import Oscillation, OscillationReport, oscillation
from .schemes.method_info import MethodInfo

__all__ = [
    "Checkpoint",
    "Compile",
    "CostateFilter",
    "DriftError",
    "GridModule",
    "GridParameter",
    "LeapfrogFilter",
    "MethodInfo",
    "Newton",
    "Oscillation",
    "OscillationReport",
    "Reversible",
    "SmoothFilter",
    "SolveReport",
    "filter_gradient",
    "method_info",
    "odeint",
    "oscillation",
    "register",
    "register_grad_filter",
    "register_method",
    "unregister",
]
__version__ = "0.2.0"

register()
