"""As under python -O, where there are no asserts: the same gradients, and no assert that does anything but narrow."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchdiffeq
import torchsde
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import GridParameter, Reversible

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("torchdiffeq_lmm", "examples", "tests/benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
WAYS = {
    "filter": ("leapfrog", {"grad_filter": "auto"}),
    "filter, between nodes": ("abm3", {"grad_filter": "auto"}),
    "smooth": ("leapfrog", {"grad_filter": "smooth"}),
    "checkpoint": ("ab3", {"backward": "checkpoint"}),
    "checkpoint, filter": ("abm2", {"backward": "checkpoint", "grad_filter": "auto"}),
    "reversible": ("leapfrog", {"backward": "reversible"}),
    "drifted": ("leapfrog", {"backward": Reversible(tolerance=0.0, on_drift="checkpoint")}),
    "two stages": ("midpoint", {"grad_filter": "auto"}),
    "implicit": ("bdf2", {}),
    "implicit, filter": ("am3", {"grad_filter": "auto"}),
    "implicit, checkpoint": ("bdf3", {"backward": "checkpoint"}),
}


class Field(nn.Module):
    """A network, and the drift and the diffusion of an SDE."""

    sde_type, noise_type = "ito", "diagonal"

    def __init__(self) -> None:
        super().__init__()
        nodes = torch.linspace(0, 1, 9, dtype=torch.float64)
        self.theta = GridParameter(torch.cos(torch.arange(18.0)).double().reshape(9, 2), nodes, "linear")

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y + self.theta(t)) - y

    forward = f

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * y * self.theta(t)


def gradients() -> dict[str, list[float]]:
    """What every way makes of a gradient with respect to the initial state, the times and the parameters."""
    found = {}
    for name, (method, arguments) in WAYS.items():
        func = Field()
        y0 = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
        t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
        options = {"step_size": 0.125, "interp": "cubic"}
        y = torchdiffeq_lmm.odeint(func, y0, t, method=method, options=options, **arguments)
        found[name] = _flat(torch.autograd.grad((y**3).sum(), [y0, t, *func.parameters()]))
    for method, options in (("leapfrog", {"grad_filter": "auto"}), ("bdf2", {})):
        func, y0 = Field(), torch.tensor([[1.0, -0.5]], dtype=torch.float64, requires_grad=True)
        bm = torchsde.BrownianInterval(0.0, 1.0, size=(1, 2), dtype=torch.float64, entropy=1)
        y = torchsde.sdeint(
            func, y0, torch.tensor([0.0, 1.0], dtype=torch.float64), bm=bm, dt=0.125, method=method, options=options
        )
        found[f"SDE, {method}"] = _flat(torch.autograd.grad((y**3).sum(), [y0, *func.parameters()]))
    func, y0 = Field(), torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    _, y = torchdiffeq.odeint(
        func,
        y0,
        t,
        method="leapfrog",
        options={"step_size": 0.125, "grad_filter": "auto"},
        event_fn=lambda t, y: t - 0.6,
    )
    found["event"] = _flat(torch.autograd.grad((y**3).sum(), [y0, *func.parameters()]))
    return found


def _flat(grads: tuple[Tensor, ...]) -> list[float]:
    return torch.cat([grad.reshape(-1) for grad in grads]).tolist()


PROGRAM = """
import json, sys
from importlib.machinery import PathFinder, SourceFileLoader

without = set()

class Optimised(SourceFileLoader):
    def get_code(self, fullname):
        without.add(fullname.partition(".")[0])
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in ("torchdiffeq_lmm", "torchdiffeq", "torchsde"):
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Optimised(fullname, spec.loader.path)
        return spec

sys.meta_path.insert(0, Finder)
import test_optimised
found = test_optimised.gradients()
if without != {"torchdiffeq_lmm", "torchdiffeq", "torchsde"}:
    raise SystemExit(f"compiled without asserts: {without}")
print(json.dumps(found))
"""
"""Compiles this package and what it is a part of as `python -O` does, which would compile all of PyTorch anew."""


@pytest.fixture(scope="module")
def optimised() -> dict[str, list[float]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.fail(done.stderr)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a GridParameter of kind")
def test_python_without_asserts_gives_the_same_gradients(optimised: dict[str, list[float]]) -> None:
    wanted = gradients()
    assert optimised.keys() == wanted.keys()
    for name, of_way in wanted.items():
        assert len(of_way) > 18
        assert optimised[name] == pytest.approx(of_way, rel=1e-12, abs=1e-12), name


def _is_plain(node: ast.expr) -> bool:
    """Whether a name, a constant or an attribute; those of autograd's ctx are worked out when they are asked for."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id != "ctx")


def _only_narrows(test: ast.expr) -> bool:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _only_narrows(test.operand)
    if isinstance(test, ast.Call):
        return isinstance(test.func, ast.Name) and test.func.id == "isinstance" and _is_plain(test.args[0])
    return isinstance(test, ast.Compare) and all(map(_is_plain, (test.left, *test.comparators)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_asserts_do_nothing_but_narrow(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assert):
            assert _only_narrows(node.test), f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("x is not None", True),
        ("not isinstance(self.x, int)", True),
        ("n == self.n", True),
        ("len(ctx.saved_tensors) == 1", False),
        ("ctx.saved_tensors != ()", False),
        ("solved.success", False),
        ("isinstance(queue.pop(), int)", False),
        ("(x := 1) is not None", False),
    ],
)
def test_what_only_narrows(statement: str, expected: bool) -> None:
    assert _only_narrows(ast.parse(statement, mode="eval").body) == expected
