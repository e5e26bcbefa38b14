"""Several processes: data-parallel training by `DistributedDataParallel` and `fully_shard`, beside one process.

Two processes meet over gloo, which needs no GPU. Each has half of the batch, and all have the same parameters, or a
part of them. So the losses must be those of one process with the whole batch, to rounding. They are: for plain
backpropagation, with a filter, with checkpoints, and compiled, where the model around the solve is what is
distributed. A second table distributes func alone; what is refused there is said in the words of the errors.

    torchrun --nproc-per-node 2 examples/processes.py
    python examples/processes.py
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from harness import arguments, table, write
from torch import Tensor, distributed, nn
from torch.distributed.run import main as torchrun
from torch.nn.parallel import DistributedDataParallel

from torchdiffeq_lmm import Compile, GridParameter, odeint

PROCESSES = 2
STEPS = 20
SIZE = 4
BATCH = 64

AGREES = 1e-9
"""So large a relative difference is still rounding, which each iteration of the training amplifies."""

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    'grad_filter="auto"': {"grad_filter": "auto"},
    'backward="checkpoint"': {"backward": "checkpoint"},
    "compile=True": {"compile": True},
    'compile=True, grad_filter="auto"': {"compile": True, "grad_filter": "auto"},
}


class Field(nn.Module):
    """func: a layer with weights of its own for every step, and one that all steps share."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randn(SIZE, SIZE).expand(STEPS, SIZE, SIZE)
        self.weight = GridParameter(weights, torch.linspace(0, 1, STEPS + 1))
        self.out = nn.Linear(SIZE, SIZE)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt, of the shape of y."""
        slope: Tensor = self.out(torch.tanh(y @ self.weight(t)))
        return slope


class Model(nn.Module):
    """The model around the solve, from y(0) to y(1)."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.func = Field()
        self.keywords = keywords

    def forward(self, y0: Tensor) -> Tensor:
        """y(1)."""
        t, options = torch.tensor([0.0, 1.0]), {"step_size": 1 / STEPS}
        y: Tensor = odeint(self.func, y0, t, method="ab2", options=options, **self.keywords)
        # Not a view of all outputs, of which fully_shard warns.
        return y[-1].clone()


def alone(model: Model) -> nn.Module:
    """One process."""
    return model


def split(module: nn.Module) -> None:
    """Leave every process a part of the parameters."""
    # PyTorch 2.5 has it elsewhere.
    from torch.distributed.fsdp import fully_shard

    fully_shard(module)


def sharded(model: Model) -> nn.Module:
    """The whole model, its parameters split among the processes."""
    split(model)
    return model


def parallel_func(model: Model) -> nn.Module:
    """Only func is distributed: every process has all parameters."""
    model.func = DistributedDataParallel(model.func)
    return model


def sharded_func(model: Model) -> nn.Module:
    """Only func is distributed, its parameters split."""
    split(model.func)
    return model


AROUND: dict[str, Callable[[Model], nn.Module]] = {"DDP": DistributedDataParallel, "fully_shard": sharded}
QUICK_COLUMNS = {"compile=True": ("fully_shard",), 'compile=True, grad_filter="auto"': ("DDP",)}
INSIDE: dict[str, Callable[[Model], nn.Module]] = {"DDP(func)": parallel_func, "fully_shard(func)": sharded_func}


def losses(wrap: Callable[[Model], nn.Module], keywords: dict[str, Any], iterations: int) -> list[float]:
    """The losses of training, of the whole batch."""
    torch.manual_seed(0)
    model = wrap(Model(keywords))
    y0 = torch.randn(BATCH, SIZE)
    target = torch.sin(y0.flip(1))
    if wrap is not alone:
        rank = distributed.get_rank()
        y0, target = y0.chunk(PROCESSES)[rank], target.chunk(PROCESSES)[rank]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    found = []
    for _ in range(iterations):
        loss = (model(y0) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if wrap is not alone:
            distributed.all_reduce(total)
            total /= PROCESSES
        found.append(float(total))
    return found


def difference(wrap: Callable[[Model], nn.Module], keywords: dict[str, Any], reference: list[float]) -> float | str:
    """By how much the losses differ at most, relative to those of one process; or why they are refused."""
    try:
        got = losses(wrap, keywords, len(reference))
    except ValueError as error:
        # All processes refuse, before any waits for another.
        return str(error)
    return max(abs(a - b) / abs(b) for a, b in zip(got, reference, strict=True))


def cells(differences: dict[str, float | str]) -> list[str]:
    """What a table says of differences."""
    return [
        "refused" if isinstance(value, str) else f"{'agrees' if value < AGREES else 'DIFFERS'}, {value:.0e}"
        for value in differences.values()
    ]


def compare(args: Namespace) -> None:
    """Train in all ways, and write the tables, in one of the processes."""
    is_first = distributed.get_rank() == 0
    results, around, inside, words = {}, [], [], {}
    of_one_process: dict[tuple[str | None, ...], list[float]] = {}
    for name, way in WAYS.items():
        keywords = way | {"compile": Compile(block=5, backend="eager")} if args.quick and "compile" in way else way
        # Every model takes seconds to trace: quickly, what is compiled is compared with the same solve that is not, and
        # two ways share the two columns out.
        same = (way.get("grad_filter"), way.get("backward"))
        if not (args.quick and same in of_one_process):
            of_one_process[same] = losses(alone, keywords, 3 if args.quick else 10)
        reference = of_one_process[same]
        columns = QUICK_COLUMNS.get(name, tuple(AROUND)) if args.quick else tuple(AROUND)
        outside = {column: difference(AROUND[column], keywords, reference) for column in columns}
        only_func = {column: difference(wrap, keywords, reference) for column, wrap in INSIDE.items()}
        results[name] = {"losses": reference, "model": outside, "func": only_func}
        shown = dict(zip(columns, cells(outside), strict=True))
        row = (shown.get(column, "–") for column in AROUND)
        around.append([f"`{name}`", f"{reference[0]:.6f} … {reference[-1]:.6f}", *row])
        inside.append([f"`{name}`", *cells(only_func)])
        for column, said in only_func.items():
            if isinstance(said, str):
                words.setdefault(said, f"`{column}`, `{name}`")
        if is_first:
            print(f"{name}: done", file=sys.stderr)
    if not is_first:
        return
    print("\nThe model around the solve is distributed: the losses, and by how much they differ, relatively\n")
    print(table(["way", "one process", *AROUND], around))
    print("\nfunc alone is distributed, which is not how to do it\n")
    print(table(["way", *INSIDE], inside))
    print("\nWhat is refused, in the words of the errors:\n")
    for said, where in words.items():
        print(f"- {where}: {said}")
    write(args.output, "processes", results, {})


def main() -> None:
    """Compare; where nobody has started the processes, start them."""
    args = arguments(__doc__, quick="few iterations, and what is compiled is traced only, in one column of two")
    if "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torchrun(["--standalone", "--nproc-per-node", str(PROCESSES), __file__, *sys.argv[1:]])
        return
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo")
    try:
        if distributed.get_world_size() != PROCESSES:
            raise SystemExit(f"--nproc-per-node must be {PROCESSES}, got {distributed.get_world_size()}")
        compare(args)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
