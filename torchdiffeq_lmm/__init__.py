"""Linear multistep methods for torchdiffeq, with gradients that converge to those of the underlying flow.

Importing the package registers its methods: ``torchdiffeq.odeint(..., method="ab3")``, ``"bdf2"``, ``"leapfrog"``, ...
`method_info` tells of each.
"""

from .backward import Checkpoint, Reversible
from .grad_filter import CostateFilter, LeapfrogFilter, SmoothFilter
from .grid_parameter import GridParameter
from .interface import odeint
from .method_info import MethodInfo
from .oscillation import Oscillation, OscillationReport, oscillation
from .registration import method_info, register, register_method, unregister
from .reversal import DriftError
from .stack_filter import filter_gradient, register_grad_filter

__all__ = [
    "Checkpoint",
    "CostateFilter",
    "DriftError",
    "GridParameter",
    "LeapfrogFilter",
    "MethodInfo",
    "Oscillation",
    "OscillationReport",
    "Reversible",
    "SmoothFilter",
    "filter_gradient",
    "method_info",
    "odeint",
    "oscillation",
    "register",
    "register_grad_filter",
    "register_method",
    "unregister",
]
__version__ = "0.1.0"

register()
