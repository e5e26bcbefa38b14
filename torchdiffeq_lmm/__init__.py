"""Linear multistep methods for torchdiffeq, with gradients that converge to those of the underlying flow.

Importing the package registers its methods: ``torchdiffeq.odeint(..., method="leapfrog")``.
"""

from .grad_filter import LeapfrogFilter, filter_gradient, register_grad_filter
from .interface import odeint
from .registration import register, unregister

__all__ = ["LeapfrogFilter", "filter_gradient", "odeint", "register", "register_grad_filter", "unregister"]
__version__ = "0.1.0"

register()
