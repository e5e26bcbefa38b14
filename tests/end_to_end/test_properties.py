"""Properties on random grids, states and outputs, against plain reference loops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import LeapfrogFilter

stable = settings(
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

SHAPES = [(), (1,), (3,), (2, 3), (0,)]
Func = Callable[[Tensor, Any], Any]


@dataclass(frozen=True)
class Case:
    """A solve.

    Attributes:
        nodes: the grid, increasing or decreasing, float64.
        t: the output times, float64.
        places: of each output, its node and its fraction of the step that begins there.
        options: torchdiffeq's options, which lead to these nodes.
        anchored: whether the inner nodes move with t[0].
        is_grid: whether t is the grid.
    """

    nodes: Tensor
    t: Tensor
    places: list[tuple[int, float]]
    options: dict[str, Any]
    anchored: bool = False
    is_grid: bool = False

    @property
    def cubic(self) -> bool:
        return self.options["interp"] == "cubic"

    def moving_nodes(self, t: Tensor) -> Tensor:
        """The nodes as what they are of t."""
        if self.is_grid:
            return t
        inner = self.nodes[1:-1] + (t[0] - t[0].detach() if self.anchored else 0.0)
        return torch.cat([t[:1], inner, t[-1:]])

    def amplification(self) -> float:
        """How much the formula may amplify rounding."""
        h = self.nodes.diff().abs()
        return 1 + float((h.max() / h.min()) ** 2)


@st.composite
def cases(draw: st.DrawFn, spread: float = 50.0) -> Case:
    """Solves on grids whose steps differ by factors up to `spread`."""
    kind = draw(st.sampled_from(["t", "step_size", "grid_constructor"]))
    direction = draw(st.sampled_from([1, -1]))
    start = draw(st.sampled_from([0.0, -1.5, 2.0]))
    interp = draw(st.sampled_from(["linear", "cubic"]))
    count = draw(st.integers(1, 8))
    if kind == "step_size":
        h = draw(st.sampled_from([0.1, 0.25, 0.3, 0.07]))
        last = draw(st.sampled_from([1.0, 0.7, 1 / spread]))
        lengths = [h * n for n in range(count)] + [h * (count - 1 + last)]
        offsets = torch.tensor(lengths, dtype=torch.float64)
        options: dict[str, Any] = {"step_size": h}
    else:
        exponents = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
        steps = 0.4 * spread ** -(torch.tensor(exponents, dtype=torch.float64) / 20)
        offsets = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        options = {}
    nodes = start + direction * offsets
    if kind == "t":
        return Case(nodes, nodes, [(n, 0.0) for n in range(count + 1)], {"interp": interp}, is_grid=True)
    if kind == "grid_constructor":
        options = {"grid_constructor": lambda func, y0, t: nodes.to(t)}
    places = [(0, 0.0)]
    for n in range(count):
        if n > 0 and draw(st.booleans()):
            places.append((n, 0.0))
        places += [(n, s / 10) for s in sorted(draw(st.sets(st.integers(1, 9), max_size=2)))]
    places.append((count, 0.0))
    after = torch.cat([nodes[1:], nodes[-1:]])
    t = torch.stack([nodes[n] + s * (after[n] - nodes[n]) for n, s in places])
    return Case(nodes, t, places, {**options, "interp": interp}, anchored=kind == "step_size")


def reference(case: Case, func: Func, y0: Tensor, t: Tensor) -> Tensor:
    """Leapfrog in the form of states, and its outputs, of shape (n, *y0.shape); differentiable."""
    nodes = case.moving_nodes(t)
    h = nodes.diff()
    x, f = [y0], [func(nodes[0], y0)]
    for n in range(len(h)):
        if len(h) == 1:
            following = x[0] + h[0] / 2 * (f[0] + func(nodes[1], x[0] + h[0] * f[0]))
        elif n == 0:
            following = x[0] + h[0] * f[0]
        else:
            r = h[n] / h[n - 1]
            following = (1 - r**2) * x[n] + r**2 * x[n - 1] + h[n] * (1 + r) * f[n]
        x.append(following)
        f.append(func(nodes[n + 1], following))
    outputs = []
    for i, (n, fraction) in enumerate(case.places):
        if fraction == 0.0:
            # An output at an inner node moves along f when its time moves away from the node.
            outputs.append(x[n] + (t[i] - nodes[n]) * f[n] if 0 < n < len(h) and not case.is_grid else x[n])
            continue
        s = (t[i] - nodes[n]) / h[n]
        if case.cubic:
            value = (1 + 2 * s) * (1 - s) ** 2 * x[n] + s**2 * (3 - 2 * s) * x[n + 1]
            value = value + h[n] * (s * (1 - s) ** 2 * f[n] - s**2 * (1 - s) * f[n + 1])
        else:
            value = x[n] + s * (x[n + 1] - x[n])
        outputs.append(value)
    return torch.stack(outputs)


def field(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A nonlinear, time-dependent field on a flat state."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        bounded = y / (1 + (y * y.conj()).real)
        return weight[0] * torch.cos(3 * t) * y + weight[1] * bounded.sum() + weight[2] * bounded

    return func


def shaped(func: Func, shapes: list[tuple[int, ...]], is_tuple: bool) -> Func:
    """`func` for a state of these shapes."""

    def wrapped(t: Tensor, y: Any) -> Any:
        parts = y if is_tuple else (y,)
        slopes = func(t, torch.cat([part.reshape(-1) for part in parts]))
        return unflatten(slopes, shapes) if is_tuple else slopes.reshape(shapes[0])

    return wrapped


def unflatten(flat: Tensor, shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return tuple(part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))


def random(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def solve(case: Case, func: Func, y0: Any, t: Tensor, grad_filter: Any = None) -> Any:
    return torchdiffeq_lmm.odeint(func, y0, t, method="leapfrog", options=case.options, grad_filter=grad_filter)


def flat_solve(
    case: Case, weight: Tensor, y0: Tensor, t: Tensor, shapes: list[tuple[int, ...]], is_tuple: bool, **keywords: Any
) -> Tensor:
    """The solve of `field` in the given shapes, as a matrix of shape (n, number of entries)."""
    state = unflatten(y0, shapes)
    out = solve(case, shaped(field(weight), shapes, is_tuple), state if is_tuple else state[0], t, **keywords)
    parts = out if is_tuple else (out,)
    assert [part.shape for part in parts] == [(len(t), *shape) for shape in shapes]
    assert {part.dtype for part in parts} == {y0.dtype}
    return torch.cat([part.reshape(len(t), -1) for part in parts], dim=1)


def gradients(out: Tensor, cotangent: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    loss = (cotangent.conj() * out).sum().real
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def check_close(actual: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> None:
    if expected.numel():
        scale = max(1.0, scale, float(expected.detach().abs().max()))
        assert actual.shape == expected.shape
        assert float((actual.detach() - expected.detach()).abs().max()) <= tolerance * scale


def largest(tensors: tuple[Tensor, ...]) -> float:
    return max((float(x.abs().max()) for x in tensors if x.numel()), default=1.0)


states = st.one_of(
    st.tuples(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=1), st.just(False)),
    st.tuples(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), st.just(True)),
)


def check_against_the_loop(
    case: Case, dtype: torch.dtype, state: tuple[list[tuple[int, ...]], bool], t_grad: bool, seed: int
) -> None:
    shapes, is_tuple = state
    size = sum(int(np.prod(shape)) for shape in shapes)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    # Numbers that every dtype can hold.
    y0, weight, cotangent = (
        random(seed + i, n, torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
        for i, n in enumerate((size, 3, size * len(case.t)))
    )
    cotangent = cotangent.reshape(len(case.t), size)
    results = []
    for kind in (dtype, wide):
        inputs = (
            y0.to(kind).requires_grad_(),
            weight.to(kind).requires_grad_(),
            case.t.clone().requires_grad_(t_grad),
        )
        if kind is dtype and not results:
            out = flat_solve(case, inputs[1], inputs[0], inputs[2], shapes, is_tuple)
        else:
            out = reference(case, field(inputs[1]), inputs[0], inputs[2])
        grads = gradients(out, cotangent.to(kind), inputs if t_grad else inputs[:2])
        results.append((out.to(wide), grads))
    (actual, actual_grads), (expected, expected_grads) = results
    tolerance = 30 * torch.finfo(dtype).eps * case.amplification()
    check_close(actual, expected, tolerance)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        check_close(a.to(b.dtype), b, 20 * tolerance, largest(expected_grads))


@stable
@given(
    cases(),
    st.sampled_from([torch.float64, torch.complex128, torch.float32, torch.complex64]),
    states,
    st.booleans(),
    st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_loop(
    case: Case, dtype: torch.dtype, state: tuple[list[tuple[int, ...]], bool], t_grad: bool, seed: int
) -> None:
    check_against_the_loop(case, dtype, state, t_grad, seed)


@settings(stable, max_examples=20)
@given(cases(spread=1.5), states, st.booleans(), st.integers(0, 1000))
def test_bfloat16_is_the_loop_to_its_precision(
    case: Case, state: tuple[list[tuple[int, ...]], bool], t_grad: bool, seed: int
) -> None:
    check_against_the_loop(case, torch.bfloat16, state, t_grad, seed)


@pytest.mark.slow
@stable
@given(
    cases(),
    st.sampled_from([torch.float64, torch.complex128]),
    states,
    st.sampled_from(["leapfrog", LeapfrogFilter("trapezoid")]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_the_filter_leaves_values_and_the_other_gradients(
    case: Case,
    dtype: torch.dtype,
    state: tuple[list[tuple[int, ...]], bool],
    grad_filter: Any,
    t_grad: bool,
    seed: int,
) -> None:
    shapes, is_tuple = state
    size = sum(int(np.prod(shape)) for shape in shapes)
    weight = random(seed, 3, dtype).requires_grad_()
    y0 = random(seed + 1, size, dtype).requires_grad_()
    t = case.t.clone().requires_grad_(t_grad)
    cotangent = random(seed + 2, size * len(t), dtype).reshape(len(t), size)
    plain = flat_solve(case, weight, y0, t, shapes, is_tuple)
    filtered = flat_solve(case, weight, y0, t, shapes, is_tuple, grad_filter=grad_filter)
    tolerance = 1e-14 * case.amplification()
    check_close(filtered, plain, tolerance)
    inputs = (y0, t) if t_grad else (y0,)
    expected = gradients(plain, cotangent, inputs)
    for a, b in zip(gradients(filtered, cotangent, inputs), expected, strict=True):
        check_close(a, b, 100 * tolerance, largest(expected))


@dataclass
class FilteredAdjoint:
    """Values and filtered gradients of f = A_m x + θ_m at node m, explicitly, for E = Re Σ conj(c_i) · output_i."""

    outputs: np.ndarray
    matrices: np.ndarray
    biases: np.ndarray


def filtered_adjoint(
    case: Case, matrices: np.ndarray, biases: np.ndarray, y0: np.ndarray, cotangent: np.ndarray, trapezoid: bool
) -> FilteredAdjoint:
    nodes = case.nodes.numpy()
    h = np.diff(nodes)
    steps = len(h)
    r = np.concatenate([[0.0], h[1:] / h[:-1]])
    gain = np.concatenate([h[:1], h[1:] * (1 + r[1:])])

    x = [y0]
    for n in range(steps):
        following = (1 - r[n] ** 2) * x[n] + gain[n] * (matrices[n] @ x[n] + biases[n])
        x.append(following + (r[n] ** 2 * x[n - 1] if n else 0))
    predicted = x[1]
    if steps == 1:
        # A single step is Heun's.
        at_ends = [matrices[n] @ x[n] + biases[n] for n in range(2)]
        x[1] = x[0] + h[0] / 2 * (at_ends[0] + at_ends[1])
    f = [matrices[n] @ x[n] + biases[n] for n in range(steps + 1)]

    # What E sees of the states and of the values of f.
    seen = np.zeros((steps + 1, len(y0)), dtype=y0.dtype)
    direct = np.zeros_like(seen)
    outputs = []
    for (n, s), c in zip(case.places, cotangent, strict=True):
        if s == 0.0:
            outputs.append(x[n])
            seen[n] += c
            continue
        if case.cubic:
            a, b = (1 + 2 * s) * (1 - s) ** 2, s**2 * (3 - 2 * s)
            u, v = h[n] * s * (1 - s) ** 2, -h[n] * s**2 * (1 - s)
        else:
            a, b, u, v = 1 - s, s, 0.0, 0.0
        outputs.append(a * x[n] + b * x[n + 1] + u * f[n] + v * f[n + 1])
        seen[n] += a * c
        seen[n + 1] += b * c
        direct[n] += u * c
        direct[n + 1] += v * c

    def pull_back(n: int, cotangent: np.ndarray) -> np.ndarray:
        return matrices[n].conj().T @ cotangent

    costate = np.zeros((steps + 2, len(y0)), dtype=y0.dtype)
    window = np.zeros((steps + 1, len(y0)), dtype=y0.dtype)
    costate[steps] = window[steps] = seen[steps] + pull_back(steps, direct[steps])
    for n in reversed(range(steps)):
        at_slope = gain[n] * costate[n + 1] + direct[n]
        costate[n] = seen[n] + (1 - r[n] ** 2) * costate[n + 1] + pull_back(n, at_slope)
        if n + 1 < steps:
            costate[n] += r[n + 1] ** 2 * costate[n + 2]
        window[n] = window[n + 1] + pull_back(n, at_slope) + seen[n]

    filtered = direct.copy()
    if steps == 1:
        last = costate[1]
        at_end = pull_back(1, h[0] / 2 * last)
        p = last + at_end + pull_back(0, h[0] / 2 * last + h[0] * at_end + direct[0])
        width = h[0] / 2 if trapezoid else h[0]
        filtered += width * np.stack([p, last])
        own = [np.outer(filtered[0], y0.conj())]
        own.append(np.outer(direct[1], x[1].conj()) + np.outer(width * last, predicted.conj()))
        return FilteredAdjoint(np.stack(outputs), np.stack(own), filtered)
    for m in range(steps):
        p = window[0] - seen[0]
        if m > 0:
            # What E sees of f between the nodes comes after node m, and is no part of a jump there.
            next_window = window[m + 1] + pull_back(m, direct[m])
            p = (h[m - 1] * window[m] + h[m] * next_window) / (h[m - 1] + h[m])
        width = h[m]
        if trapezoid:
            width = h[m] / 2 + (h[m - 1] / 2 if m else 0) + (h[m] / 2 if m == steps - 1 else 0)
        filtered[m] += width * p
    return FilteredAdjoint(
        np.stack(outputs), np.stack([np.outer(q, y.conj()) for q, y in zip(filtered, x, strict=True)]), filtered
    )


@stable
@given(
    cases(),
    st.sampled_from([torch.float64, torch.complex128]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
@pytest.mark.slow
def test_filtered_gradients_are_those_of_the_definition(
    case: Case, dtype: torch.dtype, size: int, trapezoid: bool, t_grad: bool, seed: int
) -> None:
    count = len(case.nodes)
    matrices = random(seed, count * size**2, dtype).reshape(count, size, size).requires_grad_()
    biases = random(seed + 1, count * size, dtype).reshape(count, size).requires_grad_()
    y0 = random(seed + 2, size, dtype)
    cotangent = random(seed + 3, len(case.t) * size, dtype).reshape(-1, size)

    def func(t: Tensor, y: Tensor) -> Tensor:
        m = int((case.nodes - t.detach()).abs().argmin())
        return matrices[m] @ y + biases[m]

    t = case.t.clone().requires_grad_(t_grad)
    out = solve(case, func, y0, t, LeapfrogFilter("trapezoid" if trapezoid else "step"))
    grads = gradients(out, cotangent, (matrices, biases))
    expected = filtered_adjoint(
        case, matrices.detach().numpy(), biases.detach().numpy(), y0.numpy(), cotangent.numpy(), trapezoid
    )
    tolerance = 1e-13 * case.amplification()
    check_close(out, torch.as_tensor(expected.outputs), tolerance)
    expected_grads = torch.as_tensor(expected.matrices), torch.as_tensor(expected.biases)
    for a, b in zip(grads, expected_grads, strict=True):
        check_close(a, b, 100 * tolerance, largest(expected_grads))
