"""A graph under construction, whose tensors may be in parts; see `components`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from .component_values import Parts, Sum, Value, Zero, described, dtype_of, is_tensor, ndim_of, shape_of

_aten = torch.ops.aten


class Builder:
    """Adds operations to a graph.

    Args:
        axis: of the components of a state, counted from the end.
        shape: of a state, `described`.

    Attributes:
        graph: so far.
        axis, shape: as given.
        of_samples: the shape of a component.
        mixes: whether anything has been made of other components than its own.
        joins: whether an operation has needed components together.
        fits: whether all results lie in memory as they did when they were traced.
    """

    def __init__(self, axis: int, shape: Sequence[str]) -> None:
        self.graph = Graph()
        self.axis, self.shape = axis, list(shape)
        self.of_samples = self.shape[:]
        del self.of_samples[-axis]
        self.mixes, self.joins, self.fits = False, False, True
        self._traced: dict[tuple[Any, str], Any] = {}
        self._slices: dict[tuple[Node, int, int], Node] = {}
        # With the value, for its number is another's once it is gone.
        self._whole: dict[int, tuple[Value, Node]] = {}

    def emitted(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new operation, on whole tensors."""
        args, kwargs = map_aggregate((args, kwargs), self._argument)
        node = self.graph.call_function(target, args, kwargs)
        # To run an operation without values takes longer than to see that one like it has been run.
        key = target, repr(map_aggregate((args, kwargs), _outlined))
        if key not in self._traced:
            of_args, of_kwargs = map_aggregate((args, kwargs), _traced)
            self._traced[key] = target(*of_args, **of_kwargs)
        node.meta["val"] = self._traced[key]
        return node

    def _argument(self, given: Any) -> Any:
        self.joins |= self.has_samples(given)
        return self.whole(given)

    def has_samples(self, given: Any) -> bool:
        """Whether something in parts is of samples, and not of parameters alone."""
        if isinstance(given, Parts):
            return any(self.has_samples(part) or self._is_component(part) for part in given.values)
        return False

    def _is_component(self, value: Value) -> bool:
        return isinstance(value, Node) and described(shape_of(value)) == self.of_samples

    def whole(self, given: Any) -> Any:
        """A value as one tensor; anything else as it is."""
        if not isinstance(given, Parts | Zero | Sum):
            return given
        if id(given) not in self._whole:
            self._whole[id(given)] = given, self._made_whole(given)
        return self._whole[id(given)][1]

    def _made_whole(self, value: Parts | Zero | Sum) -> Node:
        if isinstance(value, Parts):
            return self.emitted(_aten.stack.default, [self.whole(part) for part in value.values], -value.axis)
        if isinstance(value, Zero):
            return self.emitted(_aten.zeros_like.default, value.like)
        total = self.emitted(_aten.sum.default, value.of)
        return self.emitted(_aten.view.default, total, [1] * value.dims) if value.dims else total

    def returned(self, value: Value, traced: Node) -> Node:
        """A value as one tensor that lies in memory as the traced one did."""
        wanted = described(traced.meta["val"].stride())
        if isinstance(value, Parts):
            several = value.axis > len(self.shape)
            states = value.values if several else [value]
            if all(isinstance(state, Parts) and state.axis == self.axis for state in states):
                found = self._laid_out(states, several)  # type: ignore[arg-type]
                if described(found.meta["val"].stride()) == wanted:
                    return found
        node: Node = self.whole(value)
        if described(node.meta["val"].stride()) != wanted:
            node = self._copied(node)
            self.fits &= described(node.meta["val"].stride()) == wanted
        return node

    def _copied(self, states: Node) -> Node:
        """As `state_layout` has it."""
        ndim = ndim_of(states)
        if ndim < len(self.shape):
            return self.emitted(_aten.clone.default, states, memory_format=torch.contiguous_format)
        dim, first = ndim - self.axis, ndim - len(self.shape)
        ahead = [*range(first), dim, *(other for other in range(first, ndim) if other != dim)]
        there = self.emitted(_aten.permute.default, states, ahead)
        there = self.emitted(_aten.clone.default, there, memory_format=torch.contiguous_format)
        return self.emitted(_aten.permute.default, there, [ahead.index(other) for other in range(ndim)])

    def _laid_out(self, states: Sequence[Parts], several: bool) -> Node:
        """As `state_layout` has it. All slices are joined at once, for a buffer of each state would take longer."""
        found = self.emitted(_aten.stack.default, [self.whole(part) for state in states for part in state.values])
        sizes = shape_of(found)[1:]
        dims = list(range(1, 1 + len(sizes)))
        dims.insert(len(dims) + 1 - self.axis, 0)
        if several:
            for i, size in enumerate(sizes):
                if not isinstance(size, int):
                    sizes[i] = self.emitted(_aten.sym_size.int, found, i + 1)
            found = self.emitted(_aten.view.default, found, [len(states), -1, *sizes])
            dims = [0, *(dim + 1 for dim in dims)]
        return self.emitted(_aten.permute.default, found, dims)

    def part(self, given: Any, axis: int, number: int) -> Any:
        """A slice along a dimension, counted from the end, whose only slice is all of them if its size is 1.

        What has fewer dimensions, or none, is all of its slices.
        """
        if not is_tensor(given) or ndim_of(given) < axis:
            return given
        if isinstance(given, Parts):
            if given.axis == axis:
                return given.values[number if len(given.values) > 1 else 0]
            inner = axis - (axis > given.axis)
            return Parts(given.axis - (axis < given.axis), [self.part(part, inner, number) for part in given.values])
        if isinstance(given, Zero):
            return Zero(self.part(given.like, axis, number))
        if isinstance(given, Sum):
            return Sum(given.of, given.dims - 1)
        key = given, axis, 0 if str(shape_of(given)[-axis]) == "1" else number
        if key not in self._slices:
            self._slices[key] = self.emitted(_aten.select.int, given, -axis, key[2])
        return self._slices[key]

    def apart(self, value: Value, axis: int) -> Parts:
        """A value as its slices along a dimension of known size."""
        return Parts(axis, [self.part(value, axis, i) for i in range(shape_of(value)[-axis])])

    def pointwise(self, target: Any, *args: Any, **kwargs: Any) -> Value:
        """An operation that works on the entries one by one."""
        given = [value for value in args if is_tensor(value)]
        for value in given:
            if not isinstance(value, Parts):
                continue
            axis, count = value.axis, len(value.values)
            sizes = {str(shape_of(other)[-axis]) for other in given if ndim_of(other) >= axis}
            if sizes <= {"1", str(count)}:
                parts = ([self.part(other, axis, i) for other in args] for i in range(count))
                return Parts(axis, [self.pointwise(target, *of_part, **kwargs) for of_part in parts])
        if target in (_aten.add.Tensor, _aten.sub.Tensor) and not kwargs and len(given) == 2:
            found = self._added(target, *given)
            if found is not None:
                return found
        return self.emitted(target, *args, **kwargs)

    def _added(self, target: Any, a: Value, b: Value) -> Value | None:
        if dtype_of(a) != dtype_of(b) or described(shape_of(a)) != described(shape_of(b)):
            return None
        if isinstance(b, Zero):
            return a
        if isinstance(a, Zero) and target is _aten.add.Tensor:
            return b
        if isinstance(a, Sum) and isinstance(b, Sum) and described(shape_of(a.of)) == described(shape_of(b.of)):
            return Sum(self.emitted(target, a.of, b.of), a.dims)
        return None


def _outlined(given: Any) -> Any:
    """What the shape, the strides and the dtype of a result depend on."""
    return map_aggregate(_traced(given), _outline)


def _outline(traced: Any) -> Any:
    if isinstance(traced, Tensor):
        return traced.dtype, described(traced.shape), described(traced.stride())
    return str(traced)


def _traced(given: Any) -> Any:
    return given.meta["val"] if isinstance(given, Node) else given
