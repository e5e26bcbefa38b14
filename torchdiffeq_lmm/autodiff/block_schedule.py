"""What is known of a compiled solve before any state: its blocks, their numbers, where outputs are, the filter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.filter_coefficients import FilteredCotangent, filter_coefficients
from torchdiffeq_lmm.filters.filter_plan import FilterPlan
from torchdiffeq_lmm.filters.shifted_past import product_places
from torchdiffeq_lmm.forward.step_source import FixedSteps
from torchdiffeq_lmm.schemes.block_rows import (
    Block,
    ExplicitMethod,
    Pattern,
    all_weights,
    blocks_of,
    weight_indices,
)

from .block_values import AROUND, BlockNumbers


class FilteredBlock(NamedTuple):
    """What the filter needs in a block; see `FilterNumbers`. Of a run, these of all of its blocks.

    Attributes:
        value, products: see there.
        observed_value, observed_slope: weights of g at the observed nodes, of shape (rows, nodes); None for none.
        earlier: the states whose times are `earlier_times` there.
        earlier_rows: which of the rows of all blocks they are the arguments of.
    """

    value: Tensor
    products: Tensor | None = None
    observed_value: Tensor | None = None
    observed_slope: Tensor | None = None
    earlier: Tensor | None = None
    earlier_rows: Tensor | None = None


@dataclass(frozen=True)
class ScheduledBlock:
    """A block of a solve; all tensors are on the CPU.

    Attributes:
        block: its rows.
        first_row: the number of its first one among the rows of all blocks.
        weights, times: which weights and times of all are its rows'.
        active: which of its rows are rows of the solve.
        seen: the steps at whose beginnings there are outputs.
        filtered: what the filter needs; None without.
        order, earlier: see `AdjointKind`.
    """

    block: Block
    first_row: int
    weights: Tensor
    times: Tensor
    active: Tensor
    seen: list[int]
    filtered: FilteredBlock | None
    order: int
    earlier: int

    def is_like(self, other: "ScheduledBlock") -> bool:
        """Whether one compiled function serves both, with numbers of the same kinds."""
        given, others = (tuple(part is None for part in block.filtered or ()) for block in (self, other))
        is_same = self.block.pattern is other.block.pattern and given == others
        return is_same and (self.order, self.earlier) == (other.order, other.earlier)


@dataclass(frozen=True)
class ScheduledRun:
    """Blocks on end that are alike; its tensors are on the device of the state, of shape (blocks, ...).

    Attributes:
        pattern, order, earlier: of each block.
        blocks: how many.
        first: the number of the first one.
        first_row: the number of its first row among the rows of all blocks.
        weights, times, active, filtered: see `ScheduledBlock`.
        seen: which of the steps of all of them have outputs at their beginnings.
        sees_end: whether there is one at its end.
        numbers: None where they have a gradient.
    """

    pattern: Pattern
    order: int
    earlier: int
    blocks: int
    first: int
    first_row: int
    weights: Tensor
    times: Tensor
    active: Tensor
    filtered: FilteredBlock | None
    seen: Tensor | None
    sees_end: bool
    numbers: BlockNumbers | None = None

    def numbers_of(self, weights: Tensor, times: Tensor) -> BlockNumbers:
        """The numbers, by the weights and times of all rows."""
        return BlockNumbers(weights[self.weights], times[self.times], self.active)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it has."""
        given = (self.weights, self.times, self.active, self.seen, *(self.filtered or ()))
        return [tensor for tensor in given if tensor is not None]

    def with_tensors(self, tensors: Iterator[Tensor]) -> "ScheduledRun":
        """The same with other tensors, as many as it has."""

        def taken(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else next(tensors)

        weights, times, active = next(tensors), next(tensors), next(tensors)
        seen, filtered = taken(self.seen), self.filtered
        if filtered is not None:
            filtered = FilteredBlock(next(tensors), *map(taken, filtered[1:]))
        return replace(self, weights=weights, times=times, active=active, seen=seen, filtered=filtered)


@dataclass(frozen=True)
class Schedule:
    """What is known of a solve.

    Attributes:
        blocks: from the first one on.
        observed: the nodes with outputs, in their order; the first one for its slope alone.
        sees_end: whether there is an output at the end of the last block.
        weights: of all rows, on the device of the state; None where they have a gradient.
        times: what func is given for the times of all states, without a gradient.
        later: how many D of later blocks the filter needs; 0 without.
    """

    blocks: list[ScheduledBlock]
    observed: Sequence[int]
    sees_end: bool
    weights: Tensor | None
    times: Tensor
    later: int
    _runs: dict[int, list[ScheduledRun]] = field(default_factory=dict)

    @cached_property
    def unlike(self) -> list[ScheduledBlock]:
        """One of all blocks for which one compiled function serves."""
        return list({(id(one.block.pattern), one.order, one.earlier): one for one in self.blocks}.values())

    @cached_property
    def row_times(self) -> Tensor:
        """Which of the times are those of all rows of all blocks, on the device of the state."""
        return torch.cat([block.times for block in self.blocks]).to(self.times.device)

    def runs(self, most: int) -> list[ScheduledRun]:
        """The blocks in runs, each of so many at most, but of one at least."""
        # For all sizes of a batch there are few different ones.
        most = 1 << max(0, min(most, len(self.blocks) * 2 - 1).bit_length() - 1)
        if most not in self._runs:
            self._runs[most] = self._made(most)
        return self._runs[most]

    def _made(self, most: int) -> list[ScheduledRun]:
        parts: list[list[ScheduledBlock]] = []
        for block in self.blocks:
            if parts and len(parts[-1]) < most and block.is_like(parts[-1][-1]):
                parts[-1].append(block)
            else:
                parts.append([block])
        first, runs = 0, []
        for part in parts:
            runs.append(_run_of(part, first, self.sees_end and first + len(part) == len(self.blocks)))
            first += len(part)
        moved = iter(_moved([tensor for run in runs for tensor in run.tensors], self.times.device))
        runs = [run.with_tensors(moved) for run in runs]
        if self.weights is None:
            return runs
        return [replace(run, numbers=run.numbers_of(self.weights, self.times)) for run in runs]


def _run_of(blocks: Sequence[ScheduledBlock], first: int, sees_end: bool) -> ScheduledRun:
    """Blocks that are alike.

    Args:
        blocks: on end.
        first: the number of the first one.
        sees_end: whether there is an output at their end.
    """
    one, steps = blocks[0], blocks[0].block.pattern.steps
    seen = [step + i * steps for i, block in enumerate(blocks) for step in block.seen]
    filtered = None
    if one.filtered is not None:
        value, *others = zip(*(block.filtered for block in blocks if block.filtered is not None), strict=True)
        filtered = FilteredBlock(
            torch.stack(value), *(None if given[0] is None else torch.stack(given) for given in others)
        )
    return ScheduledRun(
        pattern=one.block.pattern,
        order=one.order,
        earlier=one.earlier,
        blocks=len(blocks),
        first=first,
        first_row=one.first_row,
        weights=torch.stack([block.weights for block in blocks]),
        times=torch.stack([block.times for block in blocks]),
        active=torch.stack([block.active for block in blocks]),
        filtered=filtered,
        seen=torch.tensor(seen, device="cpu") if seen else None,
        sees_end=sees_end,
    )


def schedule(
    method: ExplicitMethod,
    source: FixedSteps,
    observed: Sequence[int],
    plan: FilterPlan | None,
    steps: int,
) -> Schedule | None:
    """Plan a solve; None where it has no more steps than its start.

    Args:
        method: an explicit method.
        source: the steps.
        observed: the nodes with outputs, in their order; the first one for its slope alone.
        plan: the filter.
        steps: of a block.
    """
    recurrence = source.recurrence
    blocks = blocks_of(method, recurrence, steps)
    if not blocks:
        return None
    forms = None if plan is None else filter_coefficients(plan, observed)
    later = 0 if plan is None else blocks[-1].pattern.reach
    made: list[ScheduledBlock] = []
    first_row, sees_end = 0, False
    for block, weights in zip(blocks, weight_indices(recurrence, blocks), strict=True):
        pattern, count = block.pattern, len(block.pattern.rows)
        rows = torch.arange(count, device="cpu")
        is_last, made_steps = block is blocks[-1], sum(row.is_node for row in pattern.rows[: block.rows])
        ends_inside = is_last and made_steps < pattern.steps
        sees_end = is_last and not ends_inside
        seen = [n - block.node for n in observed if block.node <= n < block.node + made_steps + ends_inside]
        order = earlier = 0
        filtered = None
        if plan is not None and forms is not None:
            order = _order(block, forms, plan)
            earlier = min(max(0, order - 2), made[-1].block.pattern.steps if made else 0)
            nodes = recurrence.nodes[block.node - earlier : block.node]
            before = made[-1].first_row - made[-1].block.first if made else 0
            filtered = _filtered(block, forms, len(observed), product_places(order), nodes, before)
        made.append(
            ScheduledBlock(
                block,
                first_row,
                torch.tensor(weights, device="cpu"),
                torch.where(rows < block.rows, rows + block.first, block.first),
                rows < block.rows,
                seen,
                filtered,
                order,
                earlier,
            )
        )
        first_row += count
    times = source.every_user_time().detach()
    of_rows = None if source.requires_grad else all_weights(recurrence).to(times.device)
    return Schedule(made, observed, sees_end, of_rows, times, later)


def _order(block: Block, forms: Mapping[int, FilteredCotangent], plan: FilterPlan) -> int:
    """Of the filter as a block needs it; see `AdjointKind`."""
    rows = range(block.first, block.first + block.rows)
    of_rows = [forms[row] for row in rows if row in forms]
    places = [product.place for form in of_rows for product in form.products]
    if any(place > 0 for place in places):
        return plan.order
    return 2 if places or any(form.observed is not None for form in of_rows) else 1


def _moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on a device; all of one dtype are moved at once, for the CPU waits for every transfer to a GPU."""
    if device.type == "cpu":
        return list(tensors)
    moved = list(tensors)
    for dtype in {tensor.dtype for tensor in tensors}:
        numbers = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        there = torch.cat([tensors[i].reshape(-1) for i in numbers]).to(device)
        for i, part in zip(numbers, there.split([tensors[i].numel() for i in numbers]), strict=True):
            moved[i] = part.view(tensors[i].shape)
    return moved


def _filtered(
    block: Block,
    forms: Mapping[int, FilteredCotangent],
    observed: int,
    places: Sequence[int],
    earlier: Sequence[int],
    before: int,
) -> FilteredBlock:
    """The numbers of a block.

    Args:
        block: its rows.
        forms: the filtered cotangents, by state.
        observed: how many nodes are.
        places: of the products.
        earlier: the states of the nodes before the block at which there are Jacobians.
        before: to be added to their numbers for those of their rows among the rows of all blocks.
    """
    rows, reach, count = len(block.pattern.rows), block.pattern.reach, len(places)
    value = torch.zeros(rows, AROUND + reach, dtype=torch.float64, device="cpu")
    products = torch.zeros(rows, count, reach + count, dtype=torch.float64, device="cpu")
    observed_value = torch.zeros(rows, observed, dtype=torch.float64, device="cpu")
    observed_slope = torch.zeros_like(observed_value)
    node = block.node
    for i, row in enumerate(block.pattern.rows[: block.rows]):
        form = forms.get(block.first + i)
        if form is not None:
            for (kind, number), weight in form.value.items():
                if kind == "increment":
                    column = AROUND + _lag(number, block.first + i + 1, reach)
                elif kind == "window":
                    column = _lag(number, node, 2)
                else:
                    column = (2 if kind == "seen" else 3) + _lag(number, node, 1)
                value[i, column] += weight
            if form.observed is not None:
                observed_value[i] = form.observed
            slots: list[int] = []
            for product in form.products:
                slots.append(places.index(product.place, slots[-1] + 1 if slots else 0))
                for (_, number), weight in product.terms.items():
                    products[i, slots[-1], _lag(number, block.first + i + 1, reach)] += weight
                for other, weight in product.products.items():
                    products[i, slots[-1], reach + slots[other]] += weight
                if product.observed is not None:
                    assert product.place == 0, "only a layer has what is observed in its products"
                    observed_slope[i] = product.observed
        node += row.is_node
    if not places:
        return FilteredBlock(value)
    has_observed = bool(observed_value.any() or observed_slope.any())
    states = torch.tensor(earlier, device="cpu") if earlier else None
    return FilteredBlock(
        value,
        products,
        observed_value if has_observed else None,
        observed_slope if has_observed else None,
        states,
        None if states is None else states + before,
    )


def _lag(number: int, first: int, count: int) -> int:
    """How far a symbol is from the first one that a row may have."""
    lag = number - first
    assert 0 <= lag < count, "a filtered cotangent is made of what is around it"
    return lag
