"""A block of a solve and its adjoint, as functions of tensors alone: what is traced and compiled.

They run the stepping loop and auto-differentiation, with the weights of the rows as tensors. The adjoint begins with
the past at the beginning of the block, and makes its states again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.shifted_past import nearest_nodes, product_places
from torchdiffeq_lmm.forward.stepping import History, march
from torchdiffeq_lmm.schemes.block_rows import Pattern
from torchdiffeq_lmm.schemes.weighted_sum import weighted_sum

Slope = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""From the time, the state and the tensors that func depends on to the slope."""

AROUND = 4
"""So many weights of V are of P at the node of the step, P at the next one, and g at the first, without what E sees of
slopes and with it; others are of D."""


class BlockNumbers(NamedTuple):
    """The numbers of a block.

    Attributes:
        weights: of its rows, of shape (`pattern.weights`,), float64.
        times: what func is given for them, of shape (rows,).
        active: whether they are rows of the solve, of shape (rows,); else func is evaluated where the block begins.
    """

    weights: Tensor
    times: Tensor
    active: Tensor


class FilterNumbers(NamedTuple):
    """What the filter needs in a block; products with Jacobians are those of `product_places`.

    Attributes:
        value: weights for V, of shape (rows, AROUND + reach), float64.
        products: weights of D, and of the products before it, for each product, of shape (rows, products, reach +
            products), float64; this and the others None where there are no products.
        observed_value, observed_slope: what V and the last product have of observed nodes, of shape (rows, *x.shape).
        earlier, earlier_times: states of latest nodes before the block, the latest one last, and their times, of shapes
            (n, *x.shape) and (n,), where products need Jacobians there; else None.
    """

    value: Tensor
    products: Tensor | None = None
    observed_value: Tensor | None = None
    observed_slope: Tensor | None = None
    earlier: Tensor | None = None
    earlier_times: Tensor | None = None


class Cotangents(NamedTuple):
    """What the adjoint of a block begins with.

    Attributes:
        window: of the past at its end.
        seen: of the states at the beginnings of its steps, by what E sees of them and of the slopes there, of shape
            (steps, *x.shape).
        states: the same without the slopes, where E sees any and there is a filter; else empty.
        sums: the gradients of the wanted tensors by the blocks after it.
        later: D of the first states of the blocks after it; with a filter.
    """

    window: tuple[Tensor, ...]
    seen: Tensor
    states: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    later: tuple[Tensor, ...] = ()


class AdjointKind(NamedTuple):
    """What is differentiated.

    Attributes:
        wanted: the numbers of the tensors whose gradients are wanted.
        times: whether those of the weights and the times are.
        order: of the filter as this block needs it: 0 for none, 1 for V alone, else of `product_places`.
        earlier: at how many nodes before the block it needs Jacobians.
        later: how many D of the blocks after it are known; 0 without a filter.
        slopes: whether the filter is told what E sees of slopes from the rest.
    """

    wanted: tuple[int, ...]
    times: bool
    order: int
    earlier: int
    later: int
    slopes: bool


class AdjointValues(NamedTuple):
    """What the adjoint of a block leads to.

    Attributes:
        window: the cotangents of the past at its beginning.
        sums: see `Cotangents`.
        numbers: the gradients of the weights and the times, if they are wanted.
        later: see `Cotangents`.
    """

    window: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...]
    later: tuple[Tensor, ...]


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
    slope: Slope, pattern: Pattern, window: Sequence[Tensor], numbers: BlockNumbers, tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The past at the end of a block, and the states at the beginnings of its steps.

    Args:
        slope: f.
        pattern: the structure of its rows.
        window: the past at its beginning: the state, the increments, the slopes.
        numbers: of the block.
        tensors: what f depends on.
    """
    marched = _marched(slope, pattern, window, numbers, tensors)
    return _dense(marched.window), torch.stack(marched.nodes)


def reversed_block(
    slope: Slope, pattern: Pattern, window: Sequence[Tensor], numbers: BlockNumbers, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The past at the beginning of a block from that at its end, by a method that can be run backwards.

    That is one of `is_reversible`, and all rows are rows of the solve.
    """
    x, difference = window
    for number, row in reversed(list(enumerate(pattern.with_weights(numbers.weights)))):
        ((_, e),), ((_, b),) = row.increments, row.slopes
        x = x - difference
        difference = weighted_sum((1 / e, -b / e), (difference, slope(numbers.times[number], x, tensors)))
    return _dense((x, difference))


def adjoint_block(
    slope: Slope,
    pattern: Pattern,
    kind: AdjointKind,
    window: Sequence[Tensor],
    numbers: BlockNumbers,
    tensors: Sequence[Tensor],
    cotangents: Cotangents,
    filters: FilterNumbers | None,
) -> AdjointValues:
    """From the cotangents of a block to those of what it depends on; the arguments as above."""
    with torch.enable_grad():
        window = _leaves(window)
        weights, times = _leaves(numbers[:2]) if kind.times else numbers[:2]
        leaves = [
            tensor.detach().requires_grad_() if i in kind.wanted else tensor.detach()
            for i, tensor in enumerate(tensors)
        ]
        wanted = [leaves[i] for i in kind.wanted]
        numbers = BlockNumbers(weights, times, numbers.active)
        is_filtered = filters is not None
        marched = _marched(slope, pattern, window, numbers, leaves)
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
            jacobians = _Jacobians(slope, pattern, numbers, leaves, marched.arguments, filters)
            grads = _filtered(jacobians, product_places(kind.order), nodes, later, cotangents, wanted)
        sums = tuple(_strided_as(total + grad, total) for total, grad in zip(cotangents.sums, grads, strict=True))
    later = later[: len(cotangents.later)]
    return AdjointValues(_dense(of_window), sums, tuple(of_numbers), _dense(later))


def _marched(
    slope: Slope, pattern: Pattern, window: Sequence[Tensor], numbers: BlockNumbers, tensors: Sequence[Tensor]
) -> _Marched:
    x, *past = window
    known = pattern.begins.increments
    history = History(x, None, past[:known], past[known:])
    nodes, made, arguments = [x], [], []

    def evaluate(number: int, latest: Tensor) -> Tensor:
        # What is evaluated for nothing must be finite, too.
        arguments.append(torch.where(numbers.active[number], latest, x))
        return slope(numbers.times[number], arguments[-1], tensors)

    rows = pattern.with_weights(numbers.weights)
    for number, state in march(history, rows, evaluate, _no_equation):
        is_node = rows[number - 1].is_node
        made.append(history.increments[0] if is_node and history.increments else state)
        if is_node:
            nodes.append(state)
    ends = pattern.ends
    past = [*_filled(history.increments, ends.increments, x), *_filled(history.slopes, ends.slopes, x)]
    return _Marched((history.x, *past), nodes[:-1], made, arguments)


class _Jacobians:
    """The slopes of a block, evaluated again, each at a state of its own; and the products of the filter with them.

    Args:
        slope, pattern, numbers, tensors: see `forward_block`.
        arguments: the states at which f is evaluated, by row.
        filters: see `FilterNumbers`.
    """

    def __init__(
        self,
        slope: Slope,
        pattern: Pattern,
        numbers: BlockNumbers,
        tensors: Sequence[Tensor],
        arguments: Sequence[Tensor],
        filters: FilterNumbers,
    ) -> None:
        self.pattern = pattern
        self.filters = filters
        self._slope = slope
        self._tensors = tensors
        self._at_nodes: list[tuple[Tensor, Tensor]] = []
        if filters.earlier is not None:
            assert filters.earlier_times is not None
            self._at_nodes += map(self._evaluated, filters.earlier_times.unbind(), filters.earlier.unbind())
        self._by_row = [self._evaluated(*given) for given in zip(numbers.times.unbind(), arguments, strict=True)]
        self.slopes = [slope for slope, _ in self._by_row]
        self._nodes: dict[int, int] = {}
        for number, found in enumerate(self._by_row):
            if number == 0 or pattern.rows[number - 1].is_node:
                self._nodes[number] = len(self._at_nodes)
                self._at_nodes.append(found)

    def _evaluated(self, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        cut = state.detach().requires_grad_()
        return self._slope(time.detach(), cut, self._tensors), cut

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


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    # What is compiled takes its inputs for what they were when it was traced, and does not look.
    return tuple(tensor.contiguous() for tensor in tensors)


def _strided_as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _no_equation(*_: object) -> tuple[Tensor, Tensor]:
    raise AssertionError("an explicit row has no equation to solve")
