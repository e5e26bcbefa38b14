"""What `fully_shard` has split among processes: as a whole it is trained as ever; parts of func are refused, or right.

Here there is one process. `examples/processes.py` has two, and `test_processes.py` runs it.
"""

from collections.abc import Iterator

import pytest
import torch
import torchsde
from compiled_solves import NEEDS_TORCH
from methods import slow_but
from torch import Tensor, nn

import torchdiffeq_lmm
from torchdiffeq_lmm import GridParameter

STEPS = 4
T = torch.tensor([0.0, 1.0])


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = GridParameter(torch.randn(STEPS, 3, 3), torch.linspace(0, 1, STEPS + 1))
        self.out = nn.Linear(3, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.tanh(y @ self.weight(t)))


class Model(nn.Module):
    def __init__(self, **keywords: object) -> None:
        super().__init__()
        self.func = Field()
        self.keywords = {"method": "ab2", "options": {"step_size": 1 / STEPS}, **keywords}

    def forward(self, x: Tensor) -> Tensor:
        # fully_shard warns of outputs that are views.
        return torchdiffeq_lmm.odeint(self.func, x, T, **self.keywords)[-1].clone()


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Here, for the import takes seconds. fully_shard has moved in torch 2.6.
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "FSDPModule"):
        pytest.skip("torch.distributed.fsdp has no fully_shard")
    path = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model(torch.linspace(-1, 1, 6).reshape(2, 3)).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


WAYS = {
    "plain": {},
    "filtered": {"grad_filter": "auto"},
    "checkpoint": {"backward": "checkpoint"},
    "compile": {"compile": torchdiffeq_lmm.Compile(backend="eager")},
    "implicit": {"method": "bdf2"},
    "adaptive": {"method": "adams", "options": None},
}


@pytest.mark.parametrize("way", slow_but(["filtered"], ["plain", "filtered", "checkpoint", "implicit", "adaptive"]))
def test_a_model_that_is_sharded_as_a_whole_has_the_gradient_of_one_that_is_not(way: str) -> None:
    expected = gradients(Model(**WAYS[way]))
    model = Model(**WAYS[way])
    torch.distributed.fsdp.fully_shard(model)
    torch.testing.assert_close(gradients(model), expected)


def test_a_part_of_func_that_is_sharded_has_its_gradient_where_autograd_alone_differentiates() -> None:
    expected = gradients(Model())
    model = Model()
    torch.distributed.fsdp.fully_shard(model.func.out)
    torch.distributed.fsdp.fully_shard(model)
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("filtered", "where grad_filter is given"),
        ("checkpoint", "evaluated again"),
        pytest.param("compile", "where compile is given", marks=NEEDS_TORCH),
        ("implicit", "with method 'bdf2'"),
        ("adaptive", "with method 'adams'"),
    ],
)
@pytest.mark.parametrize("part", slow_but([""], ["", "out"]))
def test_func_and_its_parts_must_not_be_sharded_by_themselves(way: str, reason: str, part: str) -> None:
    model = Model(**WAYS[way])
    torch.distributed.fsdp.fully_shard(model.func.get_submodule(part))
    given = "part 'out' of func must" if part else "^func must"
    with pytest.raises(ValueError, match=f"{given} not be sharded by itself, by fully_shard, .*{reason}.*whole model"):
        model(torch.ones(2, 3))


def test_a_grid_parameter_must_not_be_sharded_by_itself() -> None:
    model = Model()
    torch.distributed.fsdp.fully_shard(model.func.weight)
    with pytest.raises(ValueError, match=r"part 'weight' of func must not be sharded by itself.*GridParameter"):
        model(torch.ones(2, 3))


class Noisy(nn.Module):
    sde_type, noise_type = "ito", "diagonal"

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 3)

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.out(y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, 0.1)


@pytest.mark.parametrize(
    ("method", "options", "reason"), [("ab2", {"grad_filter": "auto"}, "grad_filter"), ("bdf2", {}, "'bdf2'")]
)
def test_parts_of_an_sde_must_not_be_sharded_by_themselves(
    method: str, options: dict[str, object], reason: str
) -> None:
    sde = Noisy()
    torch.distributed.fsdp.fully_shard(sde.out)
    with pytest.raises(ValueError, match=rf"part '.*out' of sde must not be sharded by itself.*{reason}"):
        torchsde.sdeint(sde, torch.ones(2, 3), T, method=method, dt=0.25, options=options)
