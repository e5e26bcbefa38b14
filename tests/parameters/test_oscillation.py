"""The share of a gradient that alternates from step to step, on stacks of known content and in a solve."""

import math
import sys

import pytest
import torch
from methods import NAMES, slow_but
from torch import Tensor, nn

from torchdiffeq_lmm import CostateFilter, GridParameter, method_info, odeint, oscillation

N = 41
TIMES = torch.linspace(0, 1, N, dtype=torch.float64)
SLOW = torch.sin(3 * TIMES) + 1.5
ZIGZAG = (-1.0) ** torch.arange(N, dtype=torch.float64)


@pytest.mark.parametrize("amplitude", [0.0, 0.1, 1.0, 10.0])
def test_the_index_is_the_share_of_what_alternates(amplitude: float) -> None:
    found = oscillation(SLOW + amplitude * ZIGZAG)["parameters"]
    wanted = amplitude**2 / (amplitude**2 + float(SLOW[1:-1].square().mean()))
    assert found.index == pytest.approx(wanted, abs=1e-3)
    assert found.oscillates == (wanted > 0.1)
    assert found.smooth.shape == (N - 2,)
    torch.testing.assert_close(found.smooth, SLOW[1:-1], rtol=0, atol=0.01)


def test_extremes() -> None:
    assert oscillation(ZIGZAG).index == 1.0
    assert oscillation(torch.ones(5)).index == 0.0
    assert oscillation(torch.zeros(5, 3)).index == 0.0
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert oscillation(noise).index == pytest.approx(0.5, abs=0.03)
    lost = torch.ones(5)
    lost[2] = math.nan
    report = oscillation({"a": torch.ones(5), "b": lost, "c": ZIGZAG})
    assert math.isnan(report.index)
    assert report["b"].oscillates
    assert report.oscillates


def test_the_entry_that_alternates_most_is_shown() -> None:
    stack = SLOW[:, None, None].repeat(1, 2, 3).to(torch.complex128)
    stack[:, 1, 2] += 2j * ZIGZAG
    found = oscillation(stack)["parameters"]
    assert found.entry == (1, 2)
    torch.testing.assert_close(found.density, stack[:, 1, 2])


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 300.0),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e30),
        (torch.float32, 1e-25),
        (torch.float32, 1e-44),
        (torch.float32, 1e37),
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
        (torch.complex64, 1e-25),
    ],
)
def test_gradients_of_any_size_count(dtype: torch.dtype, size: float) -> None:
    stack = torch.stack([SLOW, ZIGZAG], dim=1)
    small = (size * stack).to(dtype)
    for widths in (None, torch.full((N,), 1e-3)):
        found = oscillation(small, widths)["parameters"]
        # At the lower end these are a few units of the last place.
        assert found.index == pytest.approx(oscillation(stack).index, abs=0.05)
        assert found.entry == (1,)
    assert oscillation(small[:, 0]).index < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_rows_of_many_entries_are_measured_as_those_of_few(dtype: torch.dtype) -> None:
    stack = torch.randn(9, 7, 2999, dtype=dtype, generator=torch.Generator().manual_seed(0))
    stack[:, 6, 2990] += 9 * (-1.0) ** torch.arange(9)
    widths = torch.linspace(1, 3, 9, dtype=torch.float64)
    densities = stack.to(torch.complex128) / widths[:, None, None]
    second = densities.diff(n=2, dim=0) / 4
    alternating, slow = (float(part.abs().square().sum()) for part in (second, densities[1:-1] + second))
    for given in (stack, list(stack), stack.mT.contiguous().mT):
        found = oscillation(given, widths)["parameters"]
        assert found.index == pytest.approx(alternating / (alternating + slow), rel=1e-5)
        assert found.entry == (6, 2990)
        torch.testing.assert_close(found.density.to(torch.complex128), densities[:, 6, 2990])


def test_no_copy_of_a_stack_is_made() -> None:
    sizes = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != stack.untyped_storage().data_ptr():
                sizes.append(made.numel())
            return made

    stack = torch.ones(20, 100_000)
    with Count():
        oscillation(stack)
    assert max(sizes) < 200_000


def test_widths_make_densities_of_gradients() -> None:
    widths = 0.1 * (1 + 0.9 * (torch.arange(N) % 2))
    gradient = SLOW * widths
    assert oscillation(gradient).index > 0.05
    assert oscillation(gradient, widths).index < 1e-3


class Layers(nn.Module):
    """Layers per step with a shared network between, of which every second layer has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)) for _ in range(12))
        self.shared = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(3)) for _ in range(5))


def test_parameters_per_step_are_found_in_a_module() -> None:
    model = Layers()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for n, layer in enumerate(model.layers):
        layer[2].weight.grad[0, 1] = 3.0 * (-1) ** n
    model.scales[2].grad = None
    report = oscillation(model)
    names = {f"layers.*.{i}.{what}" for i in (0, 2) for what in ("weight", "bias")}
    assert set(report) == names | {"scales.*"}
    assert report["layers.*.2.weight"].oscillates
    assert report["layers.*.2.weight"].entry == (0, 1)
    assert report["layers.*.0.weight"].index == 0.0
    assert report["scales.*"].density.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
    lines = str(report).splitlines()
    assert len(lines) == 6
    assert sum("oscillates" in line for line in lines) == 2


def test_what_has_no_gradient_in_a_module_is_left_out() -> None:
    model = Layers()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.unused, model.short, model.frozen, model.used = (
        GridParameter(torch.ones(rows, 2), range(rows + 1)) for rows in (5, 2, 5, 4)
    )
    model.short.values.grad = torch.ones(2, 2)
    model.frozen.values.grad = torch.ones(5, 2)
    model.frozen.requires_grad_(False)
    model.used.values.grad = torch.ones(4, 2)
    model.tables = nn.ModuleList(nn.Embedding(3, 2, sparse=True) for _ in range(3))
    sum(table(torch.tensor([1])).sum() for table in model.tables).backward()
    model.scales.requires_grad_(False)
    model.layers[:2].requires_grad_(False)
    model.layers[5][0].weight.requires_grad_(False)
    for layer in model.layers:
        layer[0].bias.grad = None
    report = oscillation(model)
    # A frozen layer among others leaves no row of steps that follow one another.
    assert list(report) == ["used", "layers.*.2.weight", "layers.*.2.bias"]
    assert len(report["layers.*.2.weight"].density) == 10


def test_no_weight_is_taken_for_a_gradient() -> None:
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    for n, layer in enumerate(model):
        nn.init.constant_(layer.weight, 1e3 * (-1) ** n)
    model[:2].requires_grad_(False)
    sum(layer.weight.sum() for layer in model).backward()
    assert oscillation(model)["*.weight"].index == 0.0
    with pytest.raises(ValueError, match=r"parameters\['a'\] must require a gradient, got a frozen parameter"):
        oscillation({"a": [layer.weight for layer in model]})


@pytest.mark.parametrize(("grad_filter", "oscillates"), [(None, True), ("leapfrog", False)])
def test_it_tells_leapfrogs_gradient_from_the_filtered_one(grad_filter: str | None, oscillates: bool) -> None:
    nodes = torch.linspace(0, 2, 41, dtype=torch.float64) ** 1.1
    theta = GridParameter(torch.stack([1 + 0.5 * torch.sin(3 * nodes[:-1]), 1.5 + nodes[:-1]], dim=1), nodes)

    def func(t: Tensor, x: Tensor) -> Tensor:
        a, b = theta(t)
        return torch.stack([a * x[1], -b * torch.sin(x[0]) - 0.3 * x[1]])

    y0 = torch.tensor([1.0, 0.5], dtype=torch.float64)
    options = {"grid_constructor": lambda func, y0, t: nodes}
    x = odeint(func, y0, nodes[[0, -1]], method="leapfrog", options=options, grad_filter=grad_filter)
    x[-1].square().sum().backward()
    report = oscillation(theta)
    assert list(report) == ["values"]
    assert report.oscillates == oscillates
    assert report.index > 0.3 if oscillates else report.index < 0.01
    torch.testing.assert_close(
        report["values"].density, (theta.values.grad / theta.widths[:, None])[:, report["values"].entry[0]]
    )


LAYER = [0.9, 1.4, -0.2, 2.3]
"""What ab4 makes of a gradient of 1 before an observation."""


@pytest.mark.parametrize("rows", [16, 100])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float64, 1.0),
        (torch.complex64, 1e-25),
        (torch.float16, 300.0),
        (torch.float32, 1e37),
        (torch.float64, 1e-200),
    ],
)
def test_a_layer_at_an_end_is_seen(dtype: torch.dtype, size: float, rows: int) -> None:
    plateau = torch.ones(rows, dtype=torch.float64)
    plateau[-4:] = torch.tensor(LAYER, dtype=torch.float64)
    stack = (size * torch.stack([plateau, SLOW.new_full((rows,), 0.1)], dim=1)).to(dtype)
    for turned, row in ((stack, rows - 2), (stack.flip(0), 1)):
        report = oscillation(turned)
        assert report.index < 0.1
        assert report["parameters"].verdict == f"oscillates near row {row}"
        assert report.oscillates
        assert str(report).endswith(f"oscillates near row {row}")


def test_a_layer_before_an_inner_observation_is_seen() -> None:
    stack = torch.ones(100, 3, dtype=torch.float64)
    stack[46:50] = torch.tensor(LAYER, dtype=torch.float64)[:, None]
    stack[50:] = 0.4
    found = oscillation(stack)["parameters"]
    assert found.index < 0.1
    assert found.oscillates
    assert 46 <= found.row <= 50


@pytest.mark.parametrize("entries", [2, 20, 3000])
def test_noise_is_rough_and_no_zigzag(entries: int) -> None:
    for seed in range(3):
        noise = torch.randn(60, entries, generator=torch.Generator().manual_seed(seed))
        found = oscillation(noise)["parameters"]
        assert found.verdict == "rough: random rather than alternating"
        assert not found.oscillates
        # A zigzag as large as the noise is one nevertheless, where there are entries enough to tell.
        zigzag = oscillation(noise + 2 * (-1.0) ** torch.arange(60)[:, None])["parameters"]
        assert zigzag.oscillates
        # As much of it as the index tolerates is smooth; most of all it is no layer.
        assert oscillation(1 + 0.3 * noise)["parameters"].verdict == "smooth"


def test_noise_of_a_single_entry_is_mostly_told_from_a_zigzag() -> None:
    noise = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert sum(oscillation(one)["parameters"].oscillates for one in noise.unbind(1)) <= 5
    assert all(oscillation(one + 3 * (-1.0) ** torch.arange(100)).oscillates for one in noise.unbind(1))


@pytest.mark.parametrize(("rows", "entries"), [(10, 1), (50, 1), (200, 1), (200, 2), (200, 3)])
def test_a_random_walk_may_look_like_a_layer_and_that_is_said(rows: int, entries: int) -> None:
    """A layer of the same size on what is smooth is told from it."""
    steps = torch.randn(60, rows, entries, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    near = mistaken = 0
    for walk in steps.cumsum(1):
        found = oscillation(walk)["parameters"]
        near += found.verdict == f"oscillates near row {found.row}, or is rough there"
        mistaken += found.oscillates and found.certain
    assert near > 0
    assert mistaken <= 1
    layer = torch.ones(rows, entries, dtype=torch.float64)
    layer[-4:] = torch.tensor(LAYER, dtype=torch.float64)[:, None]
    assert oscillation(layer)["parameters"].certain


@pytest.mark.parametrize(("rows", "entries"), [(6, 1), (12, 1), (20, 1), (6, 3)])
def test_white_noise_of_a_few_numbers_may_look_like_a_zigzag_and_that_is_said(rows: int, entries: int) -> None:
    noise = torch.randn(60, rows, entries, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    verdicts = {oscillation(one)["parameters"].verdict for one in noise}
    assert "oscillates, or is rough" in verdicts
    assert "oscillates" not in verdicts


CURVE = torch.sin(2 * math.pi * torch.arange(40, dtype=torch.float64) / 10)


@pytest.mark.parametrize(
    "stack",
    [
        CURVE,
        # A jump, and one with the mean of both sides at its node.
        torch.tensor([1.0] * 20 + [-1.0] * 20),
        torch.tensor([1.0] * 20 + [0.0] + [-1.0] * 20),
        torch.tensor([1.0] * 20 + [0.0] * 20),
        # Ends that own half a step, two, or none.
        torch.tensor([0.5] + [1.0] * 20 + [0.5]),
        torch.tensor([2.0] + [1.0] * 20 + [2.0]),
        torch.tensor([0.0] + [1.0] * 20 + [2.0]),
        torch.tensor([4.0, 2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7]),
        torch.tensor([0.0, 2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7]),
        torch.zeros(10),
        torch.tensor([1.0, 1.1, 1.3, 1.4]),
    ],
)
def test_what_is_no_oscillation(stack: Tensor) -> None:
    found = oscillation(stack)["parameters"]
    assert found.verdict == "smooth"
    assert not found.oscillates


def test_what_is_not_finite_is_said() -> None:
    lost = torch.ones(5)
    lost[2] = math.inf
    assert str(oscillation(lost)).endswith("not finite")


def test_local_index_and_coherence_are_what_they_are_said_to_be() -> None:
    """Row by row, for ends that are best left as they are."""
    stack = torch.randn(9, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    stack[[0, -1]] = 1e-3
    before, inner, after = stack[:-2], stack[1:-1], stack[2:]
    d, s = (2 * inner - before - after) / 4, (2 * inner + before + after) / 4
    sizes = [float(a @ a + b @ b) for a, b in zip(d, s, strict=True)]
    sizes = [size + 0.05 * sum(sizes) / len(sizes) for size in sizes]
    turns = [max(0.0, -float(d[n] @ d[n + 1])) for n in range(6)]
    wanted = [3 * min(turns[n], turns[n + 1]) / sum(sizes[n : n + 3]) for n in range(5)]
    wanted += [2 * turns[n] / (sizes[n] + sizes[n + 1]) for n in (0, 5)]
    found = oscillation(stack)["parameters"]
    assert found.local == pytest.approx(max(wanted), rel=1e-2)
    sizes_of_d = d.norm(dim=1)
    correlation = -float((d[:-1] * d[1:]).sum() / (sizes_of_d[:-1] * sizes_of_d[1:]).sum())
    assert found.coherence == pytest.approx((correlation - 2 / 3) / (1 / 3), rel=1e-6)


EXPLICIT = {"leapfrog", "nystrom3", "ab1", "ab2", "ab3", "ab4", "ab5"}
ZIGZAG_EVERYWHERE = {"leapfrog", "nystrom3", "milne_simpson"}
LAYERS = {"ab3", "ab4", "ab5", "abm5", "bdf3", "bdf4", "bdf5", "bdf6"}


@pytest.mark.parametrize("name", slow_but(["leapfrog", "ab3", "heun2", "midpoint"], [*NAMES, "heun2", "midpoint"]))
def test_every_method_with_and_without_a_filter(name: str) -> None:
    """Observed in the middle and at the end; the filtered gradient is the truth, to second order.

    Of the others a single row at an end is off, and those next to it by less than a third; am5 is at the border.
    """
    is_implicit = name in NAMES and method_info(name).kind == "implicit"
    steps = 24 if is_implicit else 40
    kind = "step" if name in EXPLICIT | {"midpoint"} else "linear"
    nodes = torch.linspace(0, 2, steps + 1, dtype=torch.float64)
    start = nodes[:steps] if kind == "step" else nodes
    found = {}
    filters = () if name == "midpoint" else (CostateFilter(), CostateFilter("trapezoid"))
    if is_implicit:
        # Their steps take many times as long: they have the filters in turn.
        filters = (filters[NAMES.index(name) % 2],)
    for grad_filter in (None, *filters):
        theta = GridParameter(torch.stack([1 + 0.5 * torch.sin(3 * start), 1.5 + start], dim=1), nodes, kind)

        def func(t: Tensor, x: Tensor, theta: GridParameter = theta) -> Tensor:
            a, b = theta(t)
            return torch.stack([a * x[1], -b * torch.sin(x[0]) - 0.3 * x[1]])

        x = odeint(
            func,
            torch.tensor([1.0, 0.5], dtype=torch.float64),
            nodes[[0, steps // 2, steps]],
            method=name,
            options={"step_size": 2 / steps},
            grad_filter=grad_filter,
        )
        (x[1:] - torch.tensor([0.3, -0.2])).square().sum().backward()
        found[grad_filter] = oscillation(theta)["values"]
        if grad_filter is not None:
            assert found[grad_filter].verdict == "smooth"
    unfiltered = found[None]
    assert name == "am5" or unfiltered.oscillates == (name in ZIGZAG_EVERYWHERE | LAYERS)
    if name in LAYERS:
        assert min(unfiltered.row, steps - unfiltered.row, abs(steps // 2 - unfiltered.row)) <= 4
    elif name in ZIGZAG_EVERYWHERE:
        assert unfiltered.row is None


def test_plot(tmp_path, monkeypatch) -> None:
    report = oscillation({"a": SLOW, "b": SLOW + ZIGZAG})
    figure = report.plot(tmp_path / "made.png")
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
    first, second = figure.axes
    assert "index 0.000" in first.get_title()
    assert list(second.lines[0].get_ydata()) == (SLOW + ZIGZAG).tolist()
    assert len(report.plot().axes) == 2
    (axes,) = oscillation((SLOW + 2j * ZIGZAG).to(torch.complex64)).plot(tmp_path / "complex.png").axes
    assert [line.get_label() for line in axes.lines] == [
        f"{what}, {part}" for part in ("real", "imaginary") for what in ("gradient / width", "its smooth part")
    ]
    assert list(axes.lines[2].get_ydata()) == (2 * ZIGZAG).tolist()
    (axes,) = oscillation(ZIGZAG.bfloat16()).plot().axes
    assert list(axes.lines[0].get_ydata()) == ZIGZAG.tolist()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot needs matplotlib"):
        report.plot()


def with_gradient(*shape: int) -> Tensor:
    parameter = torch.zeros(shape, requires_grad=True)
    parameter.grad = torch.ones(shape)
    return parameter


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: oscillation(3.0), TypeError, "parameters must be a module, a tensor, .* got 3.0"),
        (lambda: oscillation({}), TypeError, "parameters must be a module"),
        (lambda: oscillation(nn.Linear(2, 2)), ValueError, "neither a GridParameter nor at least 3"),
        (lambda: oscillation(torch.ones(4, requires_grad=True)), ValueError, "must have a gradient, got none"),
        (lambda: oscillation(GridParameter(torch.ones(4), range(5))), ValueError, "must have a gradient, got none"),
        (lambda: oscillation(nn.ModuleList(nn.Linear(2, 2) for _ in range(3))), ValueError, r"a gradient.*\*.weight"),
        (lambda: oscillation(nn.Parameter(torch.ones(4), False)), ValueError, "must require a gradient, got a frozen"),
        (lambda: oscillation(torch.ones(2, 3)), ValueError, r"at least 3 rows, got shape \(2, 3\)"),
        (lambda: oscillation([torch.ones(3)] * 2), ValueError, r"at least 3 rows, got shape \(2, 3\)"),
        (lambda: oscillation(torch.tensor(1.0)), ValueError, r"at least 3 rows, got shape \(\)"),
        (lambda: oscillation(torch.ones(4) > 0), TypeError, "must hold real or complex numbers, got dtype torch.bool"),
        (lambda: oscillation(torch.eye(4).to_sparse()), ValueError, "must have a dense gradient, got a sparse one"),
        (lambda: oscillation({"a": nn.Linear(2, 2)}), TypeError, r"parameters\['a'\] must be a tensor or.*Linear"),
        (lambda: oscillation({"a": GridParameter(torch.ones(4), range(5))}), TypeError, "a tensor or.*GridParameter"),
        (lambda: oscillation({"a": None}), TypeError, r"parameters\['a'\] must be a tensor or.* got None"),
        (lambda: oscillation({"a": []}), TypeError, r"parameters\['a'\] must be a tensor or.* got \[\]"),
        (lambda: oscillation([with_gradient(2)] * 2 + [with_gradient(3)]), ValueError, "tensors of one shape"),
        (lambda: oscillation(torch.ones(4), [1.0] * 3), ValueError, r"widths must have shape \(4,\).*got \(3,\)"),
        (lambda: oscillation(torch.ones(4), "abc"), TypeError, "widths must be a sequence of numbers, got 'abc'"),
        (lambda: oscillation(torch.ones(4), [1.0, 1.0, 0.0, 1.0]), ValueError, "widths must be positive and finite"),
    ],
)
def test_what_cannot_be_meant_is_an_error(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
