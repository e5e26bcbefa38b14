"""A layer that varies in time, with weights of its own for every step or node of the solver's grid."""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .grid_parameter import GridParameter, Kind


class GridModule(nn.Module):
    """One module after the other on a grid t_0, ..., t_N: called with a time, it is the one of that step.

    It takes the place of a list of layers that is indexed by the time. Its weights are those of the modules, stacked in
    `GridParameter`s, so that a solve may be compiled, and `regrid` and `widths` serve for all of them. With kind
    ``"linear"`` the weights are linear between the nodes.

    Args:
        modules: as many of one structure as there are steps, N, or nodes, N + 1, for ``"linear"``; their weights are
            copied.
        nodes, kind: see `GridParameter`.

    Attributes:
        weights: for each weight of a module the `GridParameter` of its rows, in the order of `names`.
        names: of the weights in a module, such as ``"0.bias"``.

    Raises:
        TypeError: `modules` are not modules.
        ValueError: they are none, or not alike, or have buffers; or `nodes` or `kind` are not as they must be, or there
            is another number of them.
    """

    def __init__(self, modules: Iterable[nn.Module], nodes: Tensor | Sequence[float], kind: Kind = "step") -> None:
        super().__init__()
        given = list(modules)
        _check_alike(given)
        rows = [dict(module.named_parameters()) for module in given]
        self.names = tuple(rows[0])
        stacks = [torch.stack([of_module[name].detach() for of_module in rows]) for name in self.names]
        self.weights = nn.ModuleList(
            GridParameter(stack, nodes, kind).requires_grad_(rows[0][name].requires_grad)
            for name, stack in zip(self.names, stacks, strict=True)
        )
        # In a tuple, for its own weights are nobody's.
        self._called = (deepcopy(given[0]).requires_grad_(False),)

    def forward(self, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """The module of a time, called.

        Args:
            t: see `GridParameter.forward`; 0-d.
            args, kwargs: what the module is called with.
        """
        weights = {name: of_name(t) for name, of_name in zip(self.names, self.weights, strict=True)}
        return torch.func.functional_call(self._called[0], weights, args, kwargs)

    def train(self, mode: bool = True) -> "GridModule":
        """See `torch.nn.Module.train`."""
        self._called[0].train(mode)
        return super().train(mode)


def _check_alike(modules: Sequence[object]) -> None:
    """Raise an error where modules cannot take each other's weights."""
    if not modules:
        raise ValueError("modules must be one or more, got none")
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules must be modules, got {type(module).__name__} as number {i}")
        buffers = [name for name, _ in module.named_buffers()]
        if buffers:
            raise ValueError(f"modules must have no buffers, got {buffers} in number {i}")
        own, first = _structure(module), _structure(modules[0])
        if own != first:
            raise ValueError(f"modules must have weights of the same names, shapes and dtypes, got {first} and {own}")
    if not _structure(modules[0]):
        raise ValueError("modules must have weights, got some that have none")


def _structure(module: object) -> dict[str, tuple[object, ...]]:
    assert isinstance(module, nn.Module)
    return {
        name: (tuple(weight.shape), weight.dtype, weight.device, weight.requires_grad)
        for name, weight in module.named_parameters()
    }
