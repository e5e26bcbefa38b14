"""The filtered gradient beside a jump, against a continuous adjoint by pieces."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from jumping import f64
from methods import IMPLICIT, ORDER, in_turn
from problems import orders
from scipy.integrate import solve_ivp
from torch import Tensor

import torchdiffeq_lmm
from torchdiffeq_lmm import CostateFilter, method_info

FILTER_JUMP, FILTER_END = 0.8, 2.0


TARGET = np.array([0.3, -0.2])


def theta(t: np.ndarray) -> np.ndarray:
    return np.stack([1 + 0.5 * np.sin(3 * t), 1.5 + t])


def pushed(x: Tensor, th: Tensor, is_after: bool, lib: object) -> Tensor:
    pendulum = lib.stack([x[1] * th[0], -lib.sin(x[0]) * th[1] - 0.3 * x[1]])
    return pendulum + (2.0 if is_after else -1.0) * lib.stack([0 * x[0] + 1, x[0]])


@cache
def filter_reference(is_observed: bool) -> tuple[Callable[[float, bool], np.ndarray], np.ndarray]:
    """The density (∂f/∂θ)ᵀ p at a time, seen from the left or the right, for ½ |x(T) - target|², and |x(J)|² / 2."""
    tight = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13, "dense_output": True}
    flows, costates, x = [], [], np.array([1.0, 0.5])
    spans = ((0.0, FILTER_JUMP), (FILTER_JUMP, FILTER_END))
    for is_after, span in enumerate(spans):
        solved = solve_ivp(lambda t, x, a=bool(is_after): pushed(x, theta(t), a, np), span, x, **tight)
        flows.append(solved.sol)
        x = solved.y[:, -1]

    def adjoint(t: float, p: np.ndarray, is_after: int) -> np.ndarray:
        x, th, push = flows[is_after](t), theta(t), 2.0 if is_after else -1.0
        return -np.stack([(-np.cos(x[0]) * th[1] + push) * p[1], th[0] * p[0] - 0.3 * p[1]])

    p = x - TARGET
    for is_after in (1, 0):
        solved = solve_ivp(lambda t, p, a=is_after: adjoint(t, p, a), spans[is_after][::-1], p, **tight)
        costates.insert(0, solved.sol)
        p = solved.y[:, -1] + (flows[0](FILTER_JUMP) if is_observed and is_after else 0)

    def density(t: float, is_after: bool) -> np.ndarray:
        x, p = flows[is_after](t), costates[is_after](t)
        return np.stack([x[1] * p[0], -np.sin(x[0]) * p[1]])

    return density, p


def errors_of(
    name: str, grad_filter: CostateFilter, is_observed: bool, counts: tuple[int, ...], rtol: float
) -> tuple[list[float], list[float]]:
    """Of the density at the worst node, and of the gradient of y0, for so many steps on either side of the jump.

    One parameter per node, that of the jump for both its sides; with steps of another length after it.
    """
    density, costate = filter_reference(is_observed)
    is_at_end = name in IMPLICIT or method_info(name).evaluations == 2
    errors, of_y0 = [], []
    for n in counts:
        before = np.linspace(0, FILTER_JUMP, n + 1)
        nodes = torch.from_numpy(np.concatenate([before, np.linspace(FILTER_JUMP, FILTER_END, n + 1)[1:]]))
        parameters = torch.tensor(theta(nodes.numpy()).T.copy()).requires_grad_()
        y0 = f64(1.0, 0.5, requires_grad=True)

        def func(t: Tensor, x: Tensor, nodes: Tensor = nodes, parameters: Tensor = parameters) -> Tensor:
            index = int((nodes - t).abs().argmin())
            return pushed(x, parameters[index], bool(t > FILTER_JUMP), torch)

        states = torchdiffeq_lmm.odeint(
            func,
            y0,
            f64(0.0, FILTER_JUMP, FILTER_END),
            method=name,
            options={"grid_constructor": lambda f, y, t, nodes=nodes: nodes, "jump_t": [FILTER_JUMP]},
            grad_filter=grad_filter,
            rtol=rtol,
            atol=0.1 * rtol,
        )
        loss = 0.5 * (states[2] - torch.from_numpy(TARGET)).square().sum()
        (loss + (0.5 * states[1].square().sum() if is_observed else 0)).backward()

        # What the sides own, and the density that each sees.
        steps = nodes.diff().tolist()
        left, right = steps[0], steps[-1]
        expected = []
        for m, t in enumerate(nodes.tolist()):
            around = [steps[m - 1] if m else 0.0, steps[m] if m < 2 * n else 0.0]
            width = around[1] or around[0]
            if grad_filter.weights == "trapezoid":
                width = sum(around) / 2
                if not is_at_end and m in (n - 1, 2 * n - 1):
                    # Its half cell is left to the node before.
                    width = 1.5 * steps[m]
            if m != n:
                expected.append(width * density(t, m > n))
            elif not is_at_end:
                expected.append((right if grad_filter.weights == "step" else right / 2) * density(t, True))
            else:
                share = left / (left + right)
                expected.append(width * (share * density(t, False) + (1 - share) * density(t, True)))
        difference = (parameters.grad - torch.from_numpy(np.stack(expected))).abs().amax(1)
        errors.append(float(difference[: None if is_at_end else -1].max()) * n)
        of_y0.append(float((y0.grad - torch.from_numpy(costate)).abs().max()))
    return errors, of_y0


@pytest.mark.parametrize(
    ("name", "weights", "is_observed"),
    in_turn(
        [("step", True), ("trapezoid", True), ("step", False)],
        few=1,
        fast=("leapfrog", "ab3"),
        names=["leapfrog", "ab1", "ab3", "abm3", "am2", "am3", "milne_simpson", "bdf2", "bdf4"],
    ),
)
def test_the_filtered_gradient_is_second_order_at_every_node(name: str, weights: str, is_observed: bool) -> None:
    counts = (10, 20, 40) if name in IMPLICIT else (16, 32, 64)
    errors, of_y0 = errors_of(name, CostateFilter(weights), is_observed, counts, 1e-9)
    order = min(2, ORDER[name])
    assert orders(errors)[-1] > order - 0.25, errors
    assert np.mean(orders(errors)) > order - 0.4, errors
    assert of_y0[-1] < (0.1 if order == 1 else 5e-3)


@pytest.mark.parametrize(
    ("name", "is_observed"),
    in_turn([True, False], few=1, fast=(), names=["nystrom3", "ab3", "ab5", "abm4", "am4", "bdf4"]),
)
def test_higher_order_at_every_node(name: str, is_observed: bool) -> None:
    counts = (12, 24, 48) if name in IMPLICIT else (20, 40, 80)
    errors, _ = errors_of(name, CostateFilter(order="method"), is_observed, counts, 1e-12)
    order = orders(errors)[-1]
    assert order > min(ORDER[name], 5) - 0.5, errors
