"""Grid parameters whose rows are not those of a filtered solve: a warning, and that it is right."""

import warnings
from typing import Any

import pytest
import torch
import torchsde
from torch import Tensor

from torchdiffeq_lmm import GridParameter, odeint

STEPS = 20
NODES = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)


def density(method: str, kind: str, nodes: Tensor = NODES, end: float = 1.0, **options: Any) -> Tensor:
    """The gradient of y(1) for y' = θ(t) y and θ = 1, per unit of time: e at every row."""
    rows = len(nodes) - (kind == "step")
    theta = GridParameter(torch.ones(rows, 1, dtype=torch.float64), nodes, kind)
    t = torch.tensor([float(nodes[0]), end], dtype=torch.float64)
    if method not in ("bdf", "adams"):
        options = {"step_size": 1 / STEPS, **options}
    y0 = torch.ones(1, dtype=torch.float64)
    y = odeint(lambda t, y: theta(t) * y, y0, t, method=method, options=options, grad_filter="auto")
    y[-1].backward()
    assert theta.values.grad is not None
    return theta.values.grad[:, 0] / theta.widths


@pytest.mark.parametrize("method", ["abm2", "am2", "milne_simpson", "bdf3", "filtered_heun2"])
def test_a_row_for_each_step_where_a_node_more_is_seen(method: str) -> None:
    with pytest.warns(UserWarning, match="row 19 is looked up at 2 nodes, and is of 1 steps.*kind='linear'"):
        found = density(method, "step")
    assert found[-1] > 1.9 * found[-2]


@pytest.mark.parametrize("method", ["leapfrog", "nystrom3", "ab1", "ab4"])
def test_a_row_for_each_step(method: str) -> None:
    torch.testing.assert_close(density(method, "step"), torch.full((STEPS,), torch.e).double(), rtol=0.1, atol=0)


@pytest.mark.parametrize("method", ["abm2", "am2", "milne_simpson", "bdf3"])
def test_a_row_for_each_node(method: str) -> None:
    inner = density(method, "linear")[1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, torch.e), rtol=0.1, atol=0)


@pytest.mark.parametrize("method", ["leapfrog", "bdf2"])
def test_an_sde(method: str) -> None:
    theta = GridParameter(torch.ones(STEPS, 1, dtype=torch.float64), NODES)

    class Growth:
        sde_type, noise_type = "ito", "diagonal"

        def f(self, t: Tensor, y: Tensor) -> Tensor:
            return theta(t) * y

        def g(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.full_like(y, 1e-3)

    def solve() -> None:
        y0, ts, options = torch.ones(2, 1, dtype=torch.float64), NODES[[0, -1]], {"grad_filter": "auto"}
        torchsde.sdeint(Growth(), y0, ts, method=method, dt=1 / STEPS, options=options)

    if method == "leapfrog":
        solve()
    else:
        with pytest.warns(UserWarning, match="row 19 is looked up at 2 nodes, and is of 1 steps"):
            solve()


@pytest.mark.parametrize("step", [0.03, 0.1])
def test_nodes_that_are_not_those_of_the_solve(step: float) -> None:
    with pytest.warns(UserWarning, match=r"row \d+ is looked up at \d nodes, and is of \d steps.*a row for each step"):
        found = density("leapfrog", "step", step_size=step)
    assert float((found - torch.e).abs().max()) > 1


@pytest.mark.parametrize("kind", ["step", "linear"])
@pytest.mark.parametrize("method", ["bdf", "adams"])
def test_steps_chosen_by_a_tolerance(method: str, kind: str) -> None:
    with pytest.warns(UserWarning, match="or solve with fixed steps, if they are chosen by a tolerance"):
        found = density(method, kind)
    assert float((found - torch.e).abs().max()) > 1


@pytest.mark.parametrize(("method", "row", "step"), [("bdf2", 1, 0.1), ("bdf2", 1, 0.03), ("ab3", 20, 0.05)])
def test_a_row_at_no_node(method: str, row: int, step: float) -> None:
    with pytest.warns(UserWarning, match=f"row {row} is at no node at which func is evaluated"):
        found = density(method, "linear", step_size=step)
    assert float((found - torch.e).abs().max()) > 1


@pytest.mark.parametrize(
    ("given", "keywords"),
    [
        ("leapfrog", {"step_size": 1 / 40}),
        ("leapfrog", {"step_size": 1 / 441}),
        ("leapfrog", {"end": 0.5}),
        ("filtered_midpoint", {}),
        ("leapfrog", {"end": 1.5}),
        ("ab2", {"nodes": 1 - NODES, "end": 0.0}),
        ("ab2", {"nodes": (1000 + NODES / 20).float(), "end": 1000.05, "step_size": 1 / 400}),
        ("bdf", {"jump_t": NODES[1:-1]}),
    ],
    ids=["finer", "much finer", "shorter", "middles", "longer", "backwards", "rounded", "jumps"],
)
def test_nothing_is_said_where_all_is_well(given: str, keywords: dict[str, Any]) -> None:
    density(given, "step", **keywords)


def test_nothing_is_said_without_a_filter_or_a_gradient() -> None:
    theta = GridParameter(torch.ones(STEPS, 1), torch.linspace(0, 1, STEPS + 1))
    for grad_filter, wanted in ((None, True), ("auto", False)):
        theta.requires_grad_(wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            odeint(
                lambda t, y: theta(t) * y,
                torch.ones(1),
                torch.tensor([0.0, 1.0]),
                method="bdf2",
                options={"step_size": 0.03},
                grad_filter=grad_filter,
            )
