"""What becomes of operations on dimensions, and of matrix products, where tensors are in parts; see `components`.

A rule takes the arguments of its operation. It returns NotImplemented where it has nothing to say: then the operation
is one on whole tensors.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from .component_builder import Builder
from .component_values import Parts, Sum, Value, Zero, described, dtype_of, from_end, ndim_of, shape_of
from .small_products import is_small
from .state_layout import MOST_COMPONENTS

Rule = Callable[..., Any]

_aten = torch.ops.aten

_MOST_PRODUCTS = 8
"""A matrix product of more multiplications a sample stays one."""


def _item(_: Builder, values: Any, number: int) -> Any:
    return values[number] if isinstance(values, list) else NotImplemented


def _select(builder: Builder, value: Value, dim: int, index: int) -> Any:
    axis = from_end(value, dim)
    size = shape_of(value)[-axis]
    if index < 0:
        if not isinstance(size, int):
            return NotImplemented
        index += size
    builder.mixes |= isinstance(value, Parts) and value.axis == axis
    return builder.part(value, axis, index)


def _unbind(builder: Builder, value: Value, dim: int = 0) -> Any:
    axis = from_end(value, dim)
    if not isinstance(value, Parts) or value.axis != axis:
        return NotImplemented
    builder.mixes = True
    return list(value.values)


def _slice(builder: Builder, value: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    axis = from_end(value, dim)
    if not isinstance(value, Parts):
        return NotImplemented
    if value.axis != axis:
        inner = -(axis - (axis > value.axis))
        return Parts(
            value.axis,
            [_ruled(builder, _aten.slice.Tensor, part, inner, start, end, step) for part in value.values],
        )
    found = value.values[start:end:step]
    builder.mixes |= len(found) < len(value.values)
    return Parts(axis, found) if found else NotImplemented


def _split(builder: Builder, value: Value, size: int, dim: int = 0) -> Any:
    if not isinstance(value, Parts) or value.axis != from_end(value, dim):
        return NotImplemented
    return [_slice(builder, value, dim, begin, begin + size) for begin in range(0, len(value.values), size)]


def _flip(builder: Builder, value: Value, dims: Sequence[int]) -> Any:
    if not isinstance(value, Parts) or [from_end(value, dim) for dim in dims] != [value.axis]:
        return NotImplemented
    builder.mixes = True
    return Parts(value.axis, value.values[::-1])


def _stack(builder: Builder, values: Sequence[Value], dim: int = 0) -> Any:
    ndim = ndim_of(values[0]) + 1
    axis = ndim - dim % ndim
    are_components = axis == builder.axis and len(values) <= MOST_COMPONENTS
    builder.mixes |= are_components
    return Parts(axis, values) if are_components or all(isinstance(v, Parts) for v in values) else NotImplemented


def _cat(builder: Builder, values: Sequence[Value], dim: int = 0) -> Any:
    axis = from_end(values[0], dim)
    sizes: list[Any] = [shape_of(value)[-axis] if ndim_of(value) >= axis else None for value in values]
    if axis != builder.axis or not all(isinstance(size, int) for size in sizes) or sum(sizes) > MOST_COMPONENTS:
        return NotImplemented
    builder.mixes = True
    return Parts(axis, [part for value in values for part in builder.apart(value, axis).values])


def _unsqueeze(builder: Builder, value: Value, dim: int) -> Any:
    ndim = ndim_of(value) + 1
    axis = ndim - dim % ndim
    if isinstance(value, Parts):
        is_right = axis <= value.axis
        inner = -(axis if is_right else axis - 1)
        parts = [_ruled(builder, _aten.unsqueeze.default, part, inner) for part in value.values]
        return Parts(value.axis + is_right, parts)
    return Sum(value.of, value.dims + 1) if isinstance(value, Sum) else NotImplemented


def _t(builder: Builder, value: Value) -> Any:
    return _permute(builder, value, [1, 0]) if ndim_of(value) == 2 else NotImplemented


def _transpose(builder: Builder, value: Value, one: int, other: int) -> Any:
    dims = list(range(ndim_of(value)))
    dims[one], dims[other] = dims[other], dims[one]
    return _permute(builder, value, dims)


def _permute(builder: Builder, value: Value, dims: Sequence[int]) -> Any:
    ndim = len(dims)
    dims = [dim % ndim for dim in dims]
    if dims == list(range(ndim)):
        return value
    if not isinstance(value, Parts):
        return NotImplemented
    own = ndim - value.axis
    inner = [dim - (dim > own) for dim in dims if dim != own]
    parts = [_ruled(builder, _aten.permute.default, part, inner) for part in value.values]
    return Parts(ndim - dims.index(own), parts)


def _expand(builder: Builder, value: Value, sizes: Sequence[Any], *, implicit: bool = False) -> Any:
    if implicit or not isinstance(value, Parts):
        return NotImplemented
    rest, count = [*sizes], len(value.values)
    size = rest.pop(len(sizes) - value.axis)
    if not isinstance(size, int) or (size not in (-1, count) and (count > 1 or size > MOST_COMPONENTS)):
        return NotImplemented
    parts = [_ruled(builder, _aten.expand.default, part, rest) for part in value.values]
    return Parts(value.axis, parts if size in (-1, count) else parts * size)


def _view(builder: Builder, value: Value, sizes: Sequence[Any]) -> Any:
    if isinstance(value, Sum):
        return Sum(value.of, len(sizes))
    if not isinstance(value, Parts):
        return NotImplemented
    # Dimensions of size 1 may come and go before that of the parts.
    old, new, axis = described(shape_of(value)), described(sizes), value.axis
    ahead = [[size for size in shape[: len(shape) - axis] if size != "1"] for shape in (old, new)]
    if len(new) < axis or old[-axis:] != new[-axis:] or ahead[0] != ahead[1]:
        return NotImplemented
    rest = [*sizes]
    del rest[-axis]
    return Parts(axis, [_viewed(builder, part, rest) for part in value.values])


def _viewed(builder: Builder, value: Value, sizes: Sequence[Any]) -> Value:
    if described(shape_of(value)) == described(sizes):
        return value
    found: Value = _view(builder, value, sizes)
    return builder.emitted(_aten.reshape.default, value, list(sizes)) if found is NotImplemented else found


def _same(_: Builder, value: Value, **__: Any) -> Any:
    return NotImplemented if isinstance(value, Node) else value


def _zeros_like(builder: Builder, value: Value, **settings: Any) -> Any:
    if any(setting not in (None, False) for setting in settings.values()):
        return NotImplemented
    if isinstance(value, Parts):
        return Parts(value.axis, [_zeros_like(builder, part) for part in value.values])
    return Zero(value)


def _select_backward(builder: Builder, grad: Value, sizes: Sequence[Any], dim: int, index: int) -> Any:
    axis = len(sizes) - dim % len(sizes)
    if not _has_components(builder, sizes, axis):
        return NotImplemented
    values: list[Value] = [_zeros_like(builder, grad)] * sizes[-axis]
    values[index] = grad
    return Parts(axis, values)


def _slice_backward(
    builder: Builder, grad: Value, sizes: Sequence[Any], dim: int, start: int, end: int, step: int
) -> Any:
    axis = len(sizes) - dim % len(sizes)
    if not _has_components(builder, sizes, axis) or shape_of(grad)[-axis] == 0:
        return NotImplemented
    given = builder.apart(grad, axis).values
    values: list[Value] = [_zeros_like(builder, given[0])] * sizes[-axis]
    values[start:end:step] = given
    return Parts(axis, values)


def _has_components(builder: Builder, sizes: Sequence[Any], axis: int) -> bool:
    """Whether slices along a dimension are worth having: those of states, and of a few parameters."""
    is_few = isinstance(sizes[-axis], int) and sizes[-axis] <= MOST_COMPONENTS
    return is_few and (axis == builder.axis or len(sizes) == 1)


def _sum(builder: Builder, value: Value, dims: Sequence[int] | None = None, keepdim: bool = False, **given: Any) -> Any:
    if given.get("dtype") is not None:
        return NotImplemented
    ndim = ndim_of(value)
    axes = sorted({ndim - dim % ndim for dim in dims}) if dims else list(range(1, ndim + 1))
    return _summed(builder, value, axes, keepdim)


def _norm(
    builder: Builder, value: Value, order: float = 2, dims: Any = None, keepdim: bool = False, **given: Any
) -> Any:
    if order != 2 or not isinstance(value, Parts) or given.get("dtype") is not None or dtype_of(value).is_complex:
        return NotImplemented
    squares = _sum(builder, builder.pointwise(_aten.mul.Tensor, value, value), dims, keepdim)
    return builder.pointwise(_aten.sqrt.default, squares)


def _summed(builder: Builder, value: Value, axes: Sequence[int], keepdim: bool) -> Value:
    """The sum over dimensions, counted from the end."""
    if not axes:
        return value
    if not isinstance(value, Parts):
        is_full = len(axes) == ndim_of(value) and isinstance(value, Node)
        if is_full and described(shape_of(value)) == builder.of_samples:
            return Sum(value, len(axes) if keepdim else 0)  # type: ignore[arg-type]
        return builder.emitted(_aten.sum.dim_IntList, value, [-axis for axis in axes], keepdim)
    axis = value.axis
    inner = [other - (other > axis) for other in axes if other != axis]
    parts = [_summed(builder, part, inner, keepdim) for part in value.values]
    if axis not in axes:
        return Parts(axis if keepdim else axis - sum(1 for other in axes if other < axis), parts)
    builder.mixes = True
    total = _total(builder, parts)
    return _ruled(builder, _aten.unsqueeze.default, total, -axis) if keepdim else total


def _mm(builder: Builder, a: Value, b: Value) -> Any:
    found = _product(builder, a, b)
    builder.mixes |= found is not NotImplemented
    return found


def _addmm(builder: Builder, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Any:
    total = _mm(builder, a, b) if (beta, alpha) == (1, 1) else NotImplemented
    return NotImplemented if total is NotImplemented else builder.pointwise(_aten.add.Tensor, c, total)


def _product(builder: Builder, a: Value, b: Value) -> Any:
    """A product of samples by a few weights, one over samples, or a small one as a sum."""
    (rows, inner), (_, columns) = shape_of(a), shape_of(b)
    if isinstance(a, Parts) and a.axis == 1 and isinstance(columns, int) and inner * columns <= _MOST_PRODUCTS:
        return Parts(1, [_weighted(builder, a.values, builder.part(b, 1, column)) for column in range(columns)])
    if isinstance(b, Parts) and b.axis == 2 and isinstance(rows, int) and rows * inner <= _MOST_PRODUCTS:
        return Parts(2, [_weighted(builder, b.values, builder.part(a, 2, row)) for row in range(rows)])
    over_samples = isinstance(a, Parts) and isinstance(b, Parts) and (a.axis, b.axis) == (2, 1)
    if over_samples and rows * columns <= _MOST_PRODUCTS:
        return Parts(2, [Parts(1, [_dot(builder, x, y) for y in b.values]) for x in a.values])  # type: ignore[union-attr]
    one, other = builder.whole(a), builder.whole(b)
    if not is_small(one.meta["val"], other.meta["val"]):
        return NotImplemented
    builder.joins |= builder.has_samples(a) or builder.has_samples(b)
    # As `SMALL_PRODUCTS` has it.
    wide, high = (builder.emitted(_aten.unsqueeze.default, given, dim) for given, dim in ((one, 2), (other, 0)))
    return builder.emitted(_aten.sum.dim_IntList, builder.emitted(_aten.mul.Tensor, wide, high), [1])


def _weighted(builder: Builder, values: Sequence[Value], weights: Value) -> Value:
    terms = [builder.pointwise(_aten.mul.Tensor, value, builder.part(weights, 1, i)) for i, value in enumerate(values)]
    return _total(builder, terms)


def _total(builder: Builder, terms: Sequence[Value]) -> Value:
    return reduce(lambda total, term: builder.pointwise(_aten.add.Tensor, total, term), terms)


def _dot(builder: Builder, x: Value, y: Value) -> Value:
    return _summed(builder, builder.pointwise(_aten.mul.Tensor, x, y), [1], keepdim=False)


RULES: dict[Any, Rule] = {
    operator.getitem: _item,
    _aten.select.int: _select,
    _aten.unbind.int: _unbind,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.flip.default: _flip,
    _aten.stack.default: _stack,
    _aten.cat.default: _cat,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.t.default: _t,
    _aten.transpose.int: _transpose,
    _aten.permute.default: _permute,
    _aten.expand.default: _expand,
    _aten.view.default: _view,
    _aten._unsafe_view.default: _view,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.zeros_like.default: _zeros_like,
    _aten.select_backward.default: _select_backward,
    _aten.slice_backward.default: _slice_backward,
    _aten.sum.dim_IntList: _sum,
    _aten.sum.default: _sum,
    _aten.linalg_vector_norm.default: _norm,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
}
"""By operation."""


def _ruled(builder: Builder, target: Any, *args: Any) -> Any:
    """What an operation leads to, by its rule or on whole tensors."""
    found = RULES[target](builder, *args)
    return builder.emitted(target, *args) if found is NotImplemented else found
