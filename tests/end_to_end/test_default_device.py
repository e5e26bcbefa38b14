"""With another default device than that of the tensors: every tensor that the package makes has a device of its own."""

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
import torchsde
from methods import slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import Checkpoint, GridParameter, Reversible
from torchdiffeq_lmm.hosts.registration import ODE_SOLVERS
from torchdiffeq_lmm.parameters.grid_parameter import parameters_of

# Rows that are not those of steps do no harm to what is compared here.
pytestmark = pytest.mark.filterwarnings("ignore:a GridParameter of kind")

DEVICES = ["meta", "cuda"] if torch.cuda.is_available() else ["meta"]
PACKAGE = Path(torchdiffeq_lmm.__file__).parent
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros"),
}


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        # To name a device, be it the CPU, would slow every later operation down.
        torch.set_default_device(None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Field(nn.Module):
    """A network; for torchsde, the drift of an SDE."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        self.rate = rate
        self.theta = GridParameter(draw(5, 3), torch.linspace(0, 1, 5, dtype=torch.float64), "linear")
        self.weight = nn.Parameter(draw(3, 3, seed=1))

    def forward(self, t: Tensor, y: Any) -> Any:
        if isinstance(y, tuple):
            return tuple(self(t, part) for part in y)
        driven = torch.tanh(y[..., :3] @ self.weight + self.theta(t))
        return torch.cat([driven] * (y.shape[-1] // 3), dim=-1) - self.rate * y

    f = forward

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * y * self.weight[0]


Case = Callable[[], list[Tensor]]


def case(
    t: Any = (0.0, 0.45, 1.0),
    y0: Any = None,
    rate: float = 1.0,
    run: Callable = torchdiffeq_lmm.odeint,
    **arguments: Any,
) -> Case:
    """Solve, and give the solution and all gradients."""
    func, y0 = Field(rate), draw(3) if y0 is None else y0
    times = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    parts = [part.requires_grad_() for part in (y0 if isinstance(y0, tuple) else (y0,))]
    if arguments.get("backward", "autograd") != "autograd":
        arguments["adjoint_params"] = parameters_of(func)

    def compute() -> list[Tensor]:
        solution = run(func, y0, times, **arguments)
        found = [x for x in solution if x.requires_grad] if isinstance(solution, tuple) else [solution]
        total = sum((x * x).sum() for x in found)
        grads = torch.autograd.grad(total, [*parts, times, *func.parameters()], allow_unused=True)
        return [x.detach() for x in found] + [grad for grad in grads if grad is not None]

    return compute


def sde(method: str, **options: Any) -> Case:
    func, y0 = Field(), draw(2, 3).requires_grad_()
    ts = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)

    def compute() -> list[Tensor]:
        bm = torchsde.BrownianInterval(0.0, 1.0, size=(2, 3), dtype=torch.float64, entropy=1, device="cpu")
        solution, state = torchsde.sdeint(func, y0, ts[:2], bm=bm, dt=0.06, method=method, options=options, extra=True)
        if not options and torchdiffeq_lmm.method_info(method).kind != "implicit":
            end = torchsde.sdeint(
                func, solution[-1], ts[1:], bm=bm, dt=0.07, method=method, extra=True, extra_solver_state=state
            )
            solution = torch.cat([solution, end[0]])
        grads = torch.autograd.grad((solution * solution).sum(), [y0, *func.parameters()])
        return [solution.detach(), *grads]

    return compute


def grid_parameter(kind: str) -> Case:
    nodes = torch.linspace(0, 1, 7, dtype=torch.float64)
    values, times = draw(7 - (kind == "step"), 2), torch.rand(4, dtype=torch.float64)
    single = torch.tensor(0.3, dtype=torch.float64)
    finer = torch.linspace(0, 1, 11, dtype=torch.float64)

    def compute() -> list[Tensor]:
        theta = GridParameter(values, nodes, kind)
        same = GridParameter(values, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0], kind)
        same.load_state_dict(theta.state_dict())
        others = [theta, same, copy.deepcopy(theta), theta.refine(), theta.refine(3).coarsen(2), theta.regrid(finer)]
        if kind == "step":
            others.append(theta.refine(2, "constant"))
        found = [x for other in others for x in (other(0.3), other(single), other(times), other.widths, other.nodes)]
        (grad,) = torch.autograd.grad(theta(times).sum() + theta(single).sum(), theta.values)
        return [*found, grad]

    return compute


def finished_gradients() -> Case:
    stack, steps = draw(6, 2, 2), torch.rand(6, dtype=torch.float64) + 0.1
    module = nn.Module()
    module.theta = GridParameter(draw(5, 2), torch.linspace(0, 1, 6, dtype=torch.float64))
    module.theta.values.grad = draw(5, 2, seed=3)
    leaf = draw(6, 2).requires_grad_()

    def compute() -> list[Tensor]:
        reports = [
            torchdiffeq_lmm.oscillation(stack),
            torchdiffeq_lmm.oscillation(stack, steps),
            torchdiffeq_lmm.oscillation(stack, [1.0, 2.0, 1.0, 1.0, 3.0, 1.0]),
            torchdiffeq_lmm.oscillation(list(stack)),
            torchdiffeq_lmm.oscillation(stack[:, :0]),
            torchdiffeq_lmm.oscillation(module),
        ]
        handle = torchdiffeq_lmm.register_grad_filter(leaf)
        (grad,) = torch.autograd.grad((leaf**3).sum(), leaf)
        handle.remove()
        found = [x for report in reports for of in report.values() for x in (of.density, of.smooth)]
        return [*found, grad, torchdiffeq_lmm.filter_gradient(stack, 0)]

    return compute


def constructor(func: object, y0: Tensor, t: Tensor) -> Tensor:
    return torch.cat([t[:1], t[0] + (t[-1] - t[0]) * t.new_tensor([0.15, 0.3, 0.5, 0.8]), t[-1:]])


CUBIC = {"step_size": 0.15, "interp": "cubic"}
CONSTRUCTED = {"grid_constructor": constructor, "interp": "cubic", "perturb": True}
EVENT: dict[str, Any] = {"event_fn": lambda t, y: t - 0.53, "t": (0.0, 1.0)}
LOOSE = {"rtol": 1e-4, "atol": 1e-6}
ADAPTIVE = ["bdf", "adams"]
BETWEEN = {"ab2", "ab4", "abm3", "abm4", "am4", "bdf3", "bdf4", "bdf5"}
"""Made as those of lower and of higher order in their families are."""
FIXED = [name for name in ODE_SOLVERS if name not in {*ADAPTIVE, *BETWEEN}]
SOME = ["leapfrog", "ab3", "abm3", "am3", "bdf2"]
CASES: dict[str, Callable[[], Case]] = {
    **{f"{name}, filtered": lambda name=name: case(method=name, options=dict(CUBIC), grad_filter="auto")
        for name in FIXED},
    **{f"{name}, filtered": lambda name=name: case(method=name, options={"step_t": [0.4]}, grad_filter="auto", **LOOSE)
        for name in ADAPTIVE},
    **{f"{name}, event": lambda name=name: case(**EVENT, method=name, options={"jump_t": [0.2]}, **LOOSE)
        for name in ADAPTIVE},
    **{name: lambda name=name: case(method=name, options=dict(CUBIC)) for name in (*SOME, "filtered_midpoint")},
    **{f"{name}, again": lambda name=name: case(method=name, options=dict(CUBIC), backward="checkpoint")
        for name in (*SOME, "filtered_heun2")},
    "reversible": lambda: case(method="leapfrog", options=dict(CUBIC), backward=Reversible(tolerance=0.1)),
    "drifted": lambda: case(
        method="leapfrog", options=dict(CUBIC), backward=Reversible(tolerance=0.0, on_drift="checkpoint")
    ),
    "smooth": lambda: case(t=(0.0, 0.5, 1.0), method="leapfrog", options={"step_size": 0.25}, grad_filter="smooth"),
    "leapfrog filter": lambda: case(method="leapfrog", options=dict(CONSTRUCTED), grad_filter="leapfrog"),
    "constructed": lambda: case(method="abm3", options=dict(CONSTRUCTED), backward=Checkpoint(2)),
    "t as grid": lambda: case(method="ab3", t=(0.0, 0.2, 0.3, 0.6, 0.8, 1.0)),
    "backwards": lambda: case(t=(1.0, 0.45, 0.0), method="bdf2", options=dict(CONSTRUCTED)),
    "tuple": lambda: case(y0=(draw(3), draw(2, 3)), method="am3", options=dict(CUBIC), grad_filter="auto"),
    "event": lambda: case(**EVENT, method="ab3", options=dict(CUBIC)),
    "event, filtered": lambda: case(**EVENT, method="abm2", options=dict(CUBIC), grad_filter="auto"),
    "event, two stages": lambda: case(**EVENT, method="midpoint", options=dict(CUBIC), grad_filter="auto"),
    "event, again": lambda: case(**EVENT, method="leapfrog", options={"step_size": 0.1}, backward="reversible"),
    "jumps": lambda: case(method="am3", options={**CUBIC, "jump_t": [0.3, 0.7]}, grad_filter="auto"),
    "jumps among times": lambda: case(method="ab3", t=(0.0, 0.2, 0.5, 1.0), options={"jump_t": [0.3]}),
    "jumps, event": lambda: case(**EVENT, method="ab3", options={**CUBIC, "jump_t": [0.05]}, backward="checkpoint"),
    "SDE, jumps": lambda: sde("ab3", jump_t=[0.2]),
    "adjoint": lambda: case(run=torchdiffeq.odeint_adjoint, method="ab2", options={"step_size": 0.2}),
    "stiff": lambda: case(method="bdf3", rate=1e4, options=dict(CUBIC)),
    "stiff and large": lambda: case(y0=draw(300), method="bdf2", rate=1e4, t=(0.0, 0.5), options={"step_size": 0.25}),
    **{f"SDE, {name}": lambda name=name: sde(name) for name in SOME},
    **{f"SDE, {name}, filtered": lambda name=name: sde(name, grad_filter="auto") for name in SOME},
    "GridParameter of steps": lambda: grid_parameter("step"),
    "GridParameter of nodes": lambda: grid_parameter("linear"),
    "finished gradients": finished_gradients,
}  # fmt: skip
MANY = set(FIXED) - {"leapfrog", "abm2", "bdf2", "filtered_midpoint"}
LONG = {"bdf, filtered", "adams, filtered", "bdf, event", "adams, event", "am3, again", "bdf2, again", "stiff", "jumps"}
FAST = [
    name
    for name in CASES
    if name.removesuffix(", filtered") not in MANY and name not in LONG and not name.startswith("SDE, a")
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", slow_but(FAST, CASES))
@pytest.mark.one_in(3)
def test_the_default_device_changes_nothing(name: str, device: str) -> None:
    compute = CASES[name]()
    wanted = compute()
    with default_device(device):
        got = compute()
    assert len(wanted) == len(got) > 1
    for one, other in zip(got, wanted, strict=True):
        # Of the same device, too. The order in which autograd adds gradients up is not always the same.
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_method_tables")
def test_a_method_of_the_users_own() -> None:
    with default_device("meta"):
        torchdiffeq_lmm.register_method("of_my_own", [0, -1, 1], [-0.5, 1.5, 0])
        y = torchdiffeq_lmm.odeint(
            lambda t, y: -y,
            torch.ones(1, dtype=torch.float64, device="cpu"),
            torch.linspace(0, 1, 101, dtype=torch.float64, device="cpu"),
            method="of_my_own",
        )
    assert y[-1].item() == pytest.approx(0.367879, abs=1e-4)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_every_new_tensor_names_its_device(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not FACTORIES & {alias.name for alias in node.names}
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in FACTORIES:
            assert any(keyword.arg == "device" for keyword in node.keywords), f"line {node.lineno}"
