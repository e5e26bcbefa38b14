"""What compiled blocks and their adjoints take and return."""

from typing import NamedTuple

from torch import Tensor

AROUND = 4
"""So many weights of V are of P at the node of the step, P at the next one, and g at the first, without what E sees of
slopes and with it; others are of D."""


class BlockNumbers(NamedTuple):
    """The numbers of a block.

    Attributes:
        weights: of its rows, of shape (`pattern.weights`,), float64.
        times: what func is given for them, of shape (rows,).
        active: whether they are rows of the solve, of shape (rows,); else func is evaluated where the block begins.
        looked_up: for each lookup of func what it leads to at the times, of shape (rows, ...); see `time_lookups`.
    """

    weights: Tensor
    times: Tensor
    active: Tensor
    looked_up: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, weights: Tensor, times: Tensor, active: Tensor, *looked_up: Tensor) -> "BlockNumbers":
        """From `flat`."""
        return cls(weights, times, active, looked_up)

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """All that it has."""
        return self.weights, self.times, self.active, *self.looked_up


class FilterNumbers(NamedTuple):
    """What the filter needs in a block; products with Jacobians are those of `product_places`.

    Attributes:
        value: weights for V, of shape (rows, AROUND + reach), float64.
        products: weights of D, and of the products before it, for each product, of shape (rows, products, reach +
            products), float64; this and the others None where there are no products.
        observed_value, observed_slope: what V and the last product have of observed nodes, of shape (rows, *x.shape).
        earlier, earlier_times, earlier_looked_up: states of latest nodes before the block, the latest one last, their
            times, and what is looked up then, of shapes (n, *x.shape), (n,) and (n, ...), where products need Jacobians
            there; else None.
    """

    value: Tensor
    products: Tensor | None = None
    observed_value: Tensor | None = None
    observed_slope: Tensor | None = None
    earlier: Tensor | None = None
    earlier_times: Tensor | None = None
    earlier_looked_up: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls,
        value: Tensor,
        products: Tensor | None = None,
        observed_value: Tensor | None = None,
        observed_slope: Tensor | None = None,
        earlier: Tensor | None = None,
        earlier_times: Tensor | None = None,
        *looked_up: Tensor,
    ) -> "FilterNumbers":
        """From `flat`."""
        return cls(value, products, observed_value, observed_slope, earlier, earlier_times, looked_up)

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """All that it has."""
        given = self.products, self.observed_value, self.observed_slope, self.earlier, self.earlier_times
        return self.value, *(tensor for tensor in given if tensor is not None), *self.earlier_looked_up


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
        lookups: the numbers of the lookups whose gradients are wanted.
    """

    wanted: tuple[int, ...]
    times: bool
    order: int
    earlier: int
    later: int
    slopes: bool
    lookups: tuple[int, ...]


class AdjointValues(NamedTuple):
    """What the adjoint of a block leads to.

    Attributes:
        window: the cotangents of the past at its beginning.
        sums: see `Cotangents`.
        numbers: the gradients of the weights and the times, if they are wanted.
        looked_up: those of the wanted lookups, see `BlockNumbers`.
        later: see `Cotangents`.
    """

    window: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...]
    looked_up: tuple[Tensor, ...]
    later: tuple[Tensor, ...]
