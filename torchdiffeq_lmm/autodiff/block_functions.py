"""A block of a solve and its adjoint, as functions of tensors alone: what is traced and compiled.

They run the stepping loop and auto-differentiation, with the weights of the rows as tensors. The adjoint begins with
the past at the beginning of the block, and makes its states again: see `kept_products` for what it need not.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.shifted_past import nearest_nodes, product_places
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.block_rows import Pattern
from torchdiffeq_lmm.schemes.weighted_sum import weighted_sum

from .block_values import AdjointKind, AdjointValues, BlockNumbers, Cotangents, FilterNumbers
from .state_layout import laid_out

Slope = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""From the time, the state and the tensors that func depends on to the slope."""


class _Marched(NamedTuple):
    """The states of a block.

    Attributes:
        window: the past at its end.
        nodes: the states at the beginnings of its steps.
        made: by row, the increment that it makes where later ones are made of it, else the state.
        arguments: by row, the state that it evaluates func at.
    """

    window: tuple[Tensor, ...]
    nodes: list[Tensor]
    made: list[Tensor]
    arguments: list[Tensor]


def forward_block(
    slope: Slope,
    pattern: Pattern,
    window: Sequence[Tensor],
    numbers: BlockNumbers,
    tensors: Sequence[Tensor],
    axis: int,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The past at the end of a block, and the states at the beginnings of its steps.

    Args:
        slope: f.
        pattern: the structure of its rows.
        window: the past at its beginning: the state, the increments, the slopes.
        numbers: of the block.
        tensors: what f depends on.
        axis: see `laid_out`.
    """
    return _outputs(_marched(_Field(slope, numbers, tensors), pattern, window), axis)


def reversed_block(
    slope: Slope,
    pattern: Pattern,
    window: Sequence[Tensor],
    numbers: BlockNumbers,
    tensors: Sequence[Tensor],
    axis: int,
) -> tuple[Tensor, ...]:
    """The past at the beginning of a block from that at its end, by a method that can be run backwards.

    That is one of `is_reversible`, and all rows are rows of the solve.
    """
    x, difference = window
    field = _Field(slope, numbers, tensors)
    for number, row in reversed(list(enumerate(pattern.with_weights(numbers.weights)))):
        ((_, e),), ((_, b),) = row.increments, row.slopes
        x = x - difference
        difference = weighted_sum((1 / e, -b / e), (difference, field(number, x)))
    return _laid_out((x, difference), x, axis)


def block_and_adjoint(
    slope: Slope,
    pattern: Pattern,
    kind: AdjointKind,
    window: Sequence[Tensor],
    numbers: BlockNumbers,
    tensors: Sequence[Tensor],
    axis: int,
    cotangents: Cotangents,
    filters: FilterNumbers | None,
) -> tuple[tuple[Tensor, ...], Tensor, AdjointValues]:
    """What `forward_block` returns; and from the cotangents of that to those of what it depends on."""
    with torch.enable_grad():
        window = _leaves(window)
        weights, times = _leaves(numbers[:2]) if kind.times else numbers[:2]
        leaves = [
            tensor.detach().requires_grad_() if i in kind.wanted else tensor.detach()
            for i, tensor in enumerate(tensors)
        ]
        looked_up = tuple(
            of_rows.detach().requires_grad_(i in kind.lookups) for i, of_rows in enumerate(numbers.looked_up)
        )
        wanted = [*(leaves[i] for i in kind.wanted), *(looked_up[i] for i in kind.lookups)]
        field = _Field(slope, BlockNumbers(weights, times, numbers.active, looked_up), leaves)
        is_filtered = filters is not None
        marched = _marched(field, pattern, window)
        inputs = [*window, *((weights, times) if kind.times else ())]
        of_inputs = len(inputs)
        end = marched.window[0]
        inputs += [*marched.nodes[1:], end, *marched.made] if is_filtered else wanted
        found = _grads((*marched.window, *marched.nodes), (*cotangents.window, *cotangents.seen.unbind()), inputs)
        of_window, of_numbers = found[: len(window)], found[len(window) : of_inputs]
        later: Sequence[Tensor] = ()
        if filters is None:
            grads = found[of_inputs:]
        else:
            nodes = [of_window[0], *found[of_inputs : of_inputs + len(marched.nodes)]]
            later = [*found[of_inputs + len(marched.nodes) :], *cotangents.later]
            jacobians = _Jacobians(field, pattern, marched.arguments, filters)
            grads = _filtered(jacobians, product_places(kind.order), nodes, later, cotangents, wanted)
        of_lookups = grads[len(kind.wanted) :]
        sums = tuple(_strided_as(total + grad, total) for total, grad in zip(cotangents.sums, grads, strict=False))
    later = later[: len(cotangents.later)]
    past, following = (_laid_out(given, end, axis) for given in (of_window, later))
    values = AdjointValues(past, sums, tuple(of_numbers), _dense(of_lookups), following)
    return *_outputs(marched, axis), values


class _Field:
    """f in a block.

    Args:
        slope, numbers, tensors: see `forward_block`.

    Attributes:
        slope: as given.
        numbers: as given.
        tensors: as given.
    """

    def __init__(self, slope: Slope, numbers: BlockNumbers, tensors: Sequence[Tensor]) -> None:
        self.slope = slope
        self.numbers = numbers
        self.tensors = tensors
        self._looked_up = [of_rows.unbind() for of_rows in numbers.looked_up]

    def __call__(self, number: int, x: Tensor) -> Tensor:
        """f at the time of a row."""
        return self.slope(self.numbers.times[number], x, self.tensors_at(number))

    def tensors_at(self, number: int) -> list[Tensor]:
        """What f depends on at the time of a row."""
        return [*self.tensors, *(of_rows[number] for of_rows in self._looked_up)]


def _marched(field: _Field, pattern: Pattern, window: Sequence[Tensor]) -> _Marched:
    x, *past = window
    known = pattern.begins.increments
    history = History(x, None, past[:known], past[known:])
    nodes, made, arguments, active = [x], [], [], field.numbers.active

    def evaluate(number: int, latest: Tensor) -> Tensor:
        # What is evaluated for nothing must be finite, too.
        arguments.append(torch.where(active[number], latest, x))
        return field(number, arguments[-1])

    rows = pattern.with_weights(field.numbers.weights)
    for number, state in march(history, rows, evaluate, _no_equation):
        is_node = rows[number - 1].is_node
        made.append(history.increments[0] if is_node and history.increments else state)
        if is_node:
            nodes.append(state)
    ends = pattern.ends
    past = [*_filled(history.increments, ends.increments, x), *_filled(history.slopes, ends.slopes, x)]
    return _Marched((history.x, *past), nodes[:-1], made, arguments)


def _outputs(marched: _Marched, axis: int) -> tuple[tuple[Tensor, ...], Tensor]:
    x = marched.window[0]
    window = _laid_out([tensor.detach() for tensor in marched.window], x, axis)
    return window, laid_out(torch.stack(marched.nodes).detach(), x.ndim, axis)


class _Jacobians:
    """The slopes of a block, evaluated again, each at a state of its own; and the products of the filter with them.

    Args:
        field: f.
        pattern: see `forward_block`.
        arguments: the states at which f is evaluated, by row.
        filters: see `FilterNumbers`.
    """

    def __init__(
        self,
        field: _Field,
        pattern: Pattern,
        arguments: Sequence[Tensor],
        filters: FilterNumbers,
    ) -> None:
        self.pattern = pattern
        self.filters = filters
        self._slope = field.slope
        self._at_nodes: list[tuple[Tensor, Tensor]] = []
        if filters.earlier is not None:
            assert filters.earlier_times is not None
            looked_up = [of_nodes.unbind() for of_nodes in filters.earlier_looked_up]
            for node, given in enumerate(zip(filters.earlier_times.unbind(), filters.earlier.unbind(), strict=True)):
                tensors = [*field.tensors, *(of_nodes[node] for of_nodes in looked_up)]
                self._at_nodes.append(self._evaluated(*given, tensors))
        self._by_row = [
            self._evaluated(time, state, field.tensors_at(number))
            for number, (time, state) in enumerate(zip(field.numbers.times.unbind(), arguments, strict=True))
        ]
        self.slopes = [slope for slope, _ in self._by_row]
        self._nodes: dict[int, int] = {}
        for number, found in enumerate(self._by_row):
            if number == 0 or pattern.rows[number - 1].is_node:
                self._nodes[number] = len(self._at_nodes)
                self._at_nodes.append(found)

    def _evaluated(self, time: Tensor, state: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        cut = state.detach().requires_grad_()
        return self._slope(time.detach(), cut, tensors), cut

    def products(self, number: int, places: Sequence[int], increments: Tensor) -> list[Tensor]:
        """All products of a row; see `FilterNumbers`.

        Args:
            number: of the row.
            places: of the products.
            increments: D of the state that each row makes, and of some after these, of shape (n, *x.shape).
        """
        weights, observed = self.filters.products, self.filters.observed_slope
        assert weights is not None
        assert observed is not None
        around = [self._by_row[number]]
        if number in self._nodes:
            nodes = nearest_nodes(range(len(self._at_nodes)), self._nodes[number], max(places) + 1)
            around = [self._at_nodes[node] for node in nodes]
        found: list[Tensor] = []
        reach = weights.shape[2] - len(places)
        used = increments[number : number + reach]
        # All sums at once: written out one by one they would be most of what is traced.
        vectors = weights[number, :, : len(used)].to(used.dtype) @ used.flatten(1)
        for own, vector, place in zip(weights[number], vectors, places, strict=True):
            if place >= len(around):
                found.append(torch.zeros_like(observed[number]))
                continue
            vector = vector.view(used.shape[1:])
            if found:
                vector = vector + weighted_sum(*_weighted(own[reach:], found))
            if place == 0:
                vector = vector + observed[number]
            slope, cut = around[place]
            found += _grads((slope,), (vector,), (cut,))
        return found


def _filtered(
    jacobians: _Jacobians,
    places: Sequence[int],
    nodes: Sequence[Tensor],
    increments: Sequence[Tensor],
    cotangents: Cotangents,
    wanted: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients of the wanted tensors from the filtered cotangents of every slope.

    Args:
        jacobians: of the block.
        places: of the products.
        nodes: P at the beginnings of all steps, and at the end.
        increments: D of the state that each row makes, and of some after these.
        cotangents: see `Cotangents`.
        wanted: the tensors.
    """
    costates, step, filters = [], 0, jacobians.filters
    (states,) = cotangents.states or (cotangents.seen,)
    stacked = torch.stack(list(increments)) if places else None
    for number, row in enumerate(jacobians.pattern.rows):
        around = (nodes[step], nodes[step + 1], states[step], cotangents.seen[step])
        value = weighted_sum(*_weighted(filters.value[number], (*around, *increments[number:])))
        if places:
            assert filters.observed_value is not None
            assert stacked is not None
            value = value + filters.observed_value[number]
            for product in jacobians.products(number, places, stacked):
                value = value + product
        costates.append(value)
        step += row.is_node
    return _grads(jacobians.slopes, costates, wanted)


def _weighted(weights: Tensor, tensors: Sequence[Tensor]) -> tuple[Iterator[Tensor], Sequence[Tensor]]:
    used = tensors[: len(weights)]
    return iter(weights.unbind()[: len(used)]), used


def _grads(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the inputs, 0 where nothing depends on them."""
    pairs = [(output, given) for output, given in zip(outputs, cotangents, strict=True) if output.requires_grad]
    # Of a func that depends on the time alone slopes have no graph.
    asked = [given for given in inputs if given.requires_grad]
    if not (pairs and asked):
        return [torch.zeros_like(given) for given in inputs]
    roots, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, asked, given, retain_graph=True, allow_unused=True))
    grads = [next(found) if given.requires_grad else None for given in inputs]
    return [torch.zeros_like(at) if grad is None else grad for at, grad in zip(inputs, grads, strict=True)]


def _leaves(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def _filled(tensors: Sequence[Tensor], count: int, like: Tensor) -> list[Tensor]:
    return [*tensors[:count], *(torch.zeros_like(like) for _ in range(count - len(tensors)))]


def _laid_out(states: Sequence[Tensor], x: Tensor, axis: int) -> tuple[Tensor, ...]:
    # What is compiled takes its inputs for what they were when it was traced, and does not look.
    return tuple(laid_out(state, x.ndim, axis) for state in states)


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _strided_as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _no_equation(*_: object) -> tuple[Tensor, Tensor]:
    raise AssertionError("an explicit row has no equation to solve")
