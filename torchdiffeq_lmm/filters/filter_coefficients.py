"""The filtered cotangents as linear forms: numbers that are known before there are any cotangents.

`filtered_cotangents` is run once for a grid, with symbols in place of cotangents. What comes of it are the weights with
which each filtered cotangent is made of cotangents around it, and of products of such sums with transposed Jacobians at
the state and at nodes before it: what a compiled block needs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_lmm.schemes.discrete_adjoint import AdjointState, Contributions, pass_on
from torchdiffeq_lmm.schemes.recurrence import Layout, Row

from .costate import filtered_cotangents
from .filter_plan import FilterPlan
from .shifted_past import nearest_nodes

Kind = Literal["increment", "window", "seen", "cotangent", "product"]
"""D of a state, P of a node, g of a node, the same with slopes: see `filtered_cotangents`; a product with Jᵀ."""

Symbol = tuple[Kind, int]
Terms = dict[Symbol, float]


class ProductForm(NamedTuple):
    """A product of a sum of cotangents with a transposed Jacobian.

    Attributes:
        place: of the Jacobian: 0 at the state itself, else at that one of `nearest_nodes`.
        terms: the sum, as weights of D.
        products: what it has of the products before it, as weights by their number.
        observed: what it has of g at the observed nodes, of shape (n,); None for nothing.
    """

    place: int
    terms: Terms
    products: dict[int, float]
    observed: Tensor | None


class FilteredCotangent(NamedTuple):
    """ω p̃ at one state: V and all products.

    Attributes:
        value: V, as weights of symbols.
        observed: what V has of g at the observed nodes, of shape (n,); None for nothing.
        products: in the order in which they are worked out.
    """

    value: Terms
    observed: Tensor | None
    products: tuple[ProductForm, ...]


def filter_coefficients(plan: FilterPlan, observed: Sequence[int]) -> dict[int, FilteredCotangent]:
    """The filtered cotangents of all states that receive one.

    Args:
        plan: of an explicit method.
        observed: the nodes that E sees the states of; of the first one, the slope alone.
    """
    count = len(plan.steps) + 1
    units = torch.eye(len(observed), dtype=torch.float64, device="cpu").unbind()
    seen: list[Any] = [None] * count
    cotangents: list[Tensor | None] = [None] * count
    for node, unit in zip(observed, units, strict=True):
        cotangents[node] = unit
        if node:
            seen[node] = _Form({("seen", node): 1.0})
    zero = torch.zeros(len(observed), dtype=torch.float64, device="cpu")
    jacobians = _Products()
    symbols = _symbols(plan.recurrence.rows, jacobians)
    # To what is written for tensors forms are given.
    given: Any = jacobians
    nodes = plan.recurrence.nodes
    node_of = {state: node for node, state in enumerate(nodes)}

    def around(state: int) -> list[int]:
        return [nodes[node] for node in nearest_nodes(plan.with_jacobians, node_of[state], plan.order - 1)]

    return {
        state: jacobians.resolved(state, weight * _as_form(costate), around)
        for state, weight, costate in filtered_cotangents(plan, symbols, seen, cotangents, given, zero)
    }


@dataclass
class _Form:
    """A linear form that takes the place of a cotangent.

    Attributes:
        terms: weights of symbols.
        dense: what it has of the observed nodes.
    """

    terms: Mapping[Symbol, float]
    dense: Tensor | None = None

    def __add__(self, other: "_Form | Tensor") -> "_Form":
        return _plus(self, _as_form(other), 1.0)

    def __radd__(self, other: Tensor) -> "_Form":
        return _plus(_as_form(other), self, 1.0)

    def __sub__(self, other: "_Form | Tensor") -> "_Form":
        return _plus(self, _as_form(other), -1.0)

    def __mul__(self, weight: float) -> "_Form":
        scaled = {symbol: weight * own for symbol, own in self.terms.items()}
        return _Form(scaled, None if self.dense is None else weight * self.dense)

    __rmul__ = __mul__

    def clone(self) -> "_Form":
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.add:
            return _plus(_as_form(args[0]), _as_form(args[1]), (kwargs or {}).get("alpha", 1.0))
        if func is torch.Tensor.add:
            return _plus(_as_form(args[0]), _as_form(args[1]), 1.0)
        return NotImplemented


def _as_form(value: "_Form | Tensor") -> _Form:
    return _Form({}, value) if isinstance(value, Tensor) else value


def _plus(a: _Form, b: _Form, weight: float) -> _Form:
    dense = a.dense
    if b.dense is not None:
        dense = weight * b.dense if dense is None else dense + weight * b.dense
    if not b.terms:
        return _Form(a.terms, dense)
    total = defaultdict(float, a.terms)
    for symbol, own in b.terms.items():
        total[symbol] += weight * own
    return _Form(total, dense)


@dataclass
class _Products:
    """See `costate.Jacobians`; without damping, which explicit methods have none of.

    Attributes:
        made: the state and the vector of every product.
    """

    made: list[tuple[int, _Form]] = field(default_factory=list)

    def product(self, state: int, vector: Any) -> _Form:
        """See `costate.Jacobians`."""
        self.made.append((state, _as_form(vector)))
        return _Form({("product", len(self.made) - 1): 1.0})

    def expand(self, state: int, value: Any, slope: Any, step: float) -> _Form:  # noqa: ARG002
        """See `costate.Jacobians`."""
        form = _Form({}) if value is None else _as_form(value)
        return form if slope is None else _plus(form, self.product(state, slope), 1.0)

    def resolved(self, state: int, form: _Form, around: Callable[[int], list[int]]) -> FilteredCotangent:
        """A form with its products written out: those at the state itself as one, the last one.

        Args:
            state: whose costate it is.
            form: V and products, each of which has the weight ω in it if others are made of it.
            around: from the state of a node to those of `nearest_nodes`.
        """
        value: Terms = {symbol: weight for symbol, weight in form.terms.items() if symbol[0] != "product"}
        own, numbers = _Form({}), []
        for (kind, number), weight in form.terms.items():
            if kind == "product" and weight != 0.0:
                at, vector = self.made[number]
                if at == state:
                    own = _plus(own, vector, weight)
                else:
                    numbers.append(number)
        products: list[ProductForm] = []
        shares: dict[int, tuple[int, float]] = {}
        places = {at: place for place, at in enumerate(around(state))} if numbers else {}
        for number in sorted(numbers):
            at, vector = self.made[number]
            weight = form.terms["product", number]
            products.append(_product_form(places[at], weight * vector, shares))
            shares[number] = len(products) - 1, weight
        if own.terms or own.dense is not None:
            products.append(_product_form(0, own, shares))
        return FilteredCotangent(value, form.dense, tuple(products))


def _product_form(place: int, vector: _Form, shares: Mapping[int, tuple[int, float]]) -> ProductForm:
    """A product, with those before it as they are added up: each with its weight."""
    terms: Terms = {}
    products: dict[int, float] = {}
    for symbol, weight in vector.terms.items():
        if symbol[0] == "product":
            number, share = shares[symbol[1]]
            products[number] = weight / share
        else:
            terms[symbol] = weight
    return ProductForm(place, terms, products, vector.dense)


def _symbols(rows: Sequence[Row], jacobians: _Products) -> Iterator[AdjointState]:
    """As `discrete_adjoint`, for explicit rows, with symbols."""
    layout = Layout(rows)
    slopes: dict[int, Contributions] = {}
    increments: dict[int, Contributions] = {}
    for state in range(len(rows), -1, -1):
        row = rows[state - 1] if state else None
        is_node = row is None or row.is_node
        node = layout.node_before[state]
        later = slopes.pop(state, [])
        window: Any = _Form({("window", node): 1.0} if is_node else {})
        increment: Any = None if row is None else _Form({("increment", state): 1.0})
        pulled: Any = [(1.0, _pulled(rows, state, node, later, jacobians))] if later else []
        yield AdjointState(
            state, node if is_node else None, later, later, pulled, window, window, increment, slopes, increments
        )
        if is_node:
            increments.pop(node, None)
        if row is not None:
            pass_on(row, state, increment, layout, slopes, increments)


def _pulled(rows: Sequence[Row], state: int, node: int, later: Any, jacobians: _Products) -> _Form:
    """Jᵀ times a sum of cotangents."""
    if (state == 0 or rows[state - 1].is_node) and state < len(rows) and rows[state].is_node:
        # By P_n = P_{n+1} + g_n + Jᵀ μ_n, for nothing else is made of the state.
        return _Form({("window", node): 1.0, ("window", node + 1): -1.0, ("cotangent", node): -1.0})
    total = _Form({})
    for weight, form in later:
        total = _plus(total, form, weight)
    return jacobians.product(state, total)
