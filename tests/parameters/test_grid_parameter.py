"""θ(t) on a grid: found however a time is rounded, differentiated row by row, moved to other grids."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_lmm import CostateFilter, GridParameter, odeint
from torchdiffeq_lmm.parameters.grid_parameter import parameters_of

NODES = [0.0, 0.5, 0.75, 1.75, 2.0]


def values(rows: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def steps_of(sign: float = 1.0) -> GridParameter:
    return GridParameter(values(4, 3), [sign * node for node in NODES])


def lines_of(sign: float = 1.0) -> GridParameter:
    return GridParameter(values(5, 3), [sign * node for node in NODES], "linear")


class TestLookup:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_a_step_is_constant(self, sign: float) -> None:
        theta = steps_of(sign)
        for time, row in [
            (-3, 0),
            (0, 0),
            (0.49, 0),
            (0.5, 1),
            (0.6, 1),
            (0.75, 2),
            (1.7, 2),
            (1.75, 3),
            (2, 3),
            (9, 3),
        ]:
            for t in (sign * time, torch.tensor(sign * time), torch.tensor(sign * time, dtype=torch.float64)):
                assert torch.equal(theta(t), theta.values[row]), time

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_lines_are_straight(self, sign: float) -> None:
        theta = lines_of(sign)
        times = [-1.0, 0.0, 0.2, 0.5, 0.7, 1.0, 1.8, 2.0, 3.0]
        stack = theta.values.detach().numpy()
        wanted = np.stack([np.interp(times, NODES, stack[:, i]) for i in range(3)], axis=1)
        single = torch.stack([theta(sign * time) for time in times])
        torch.testing.assert_close(single, torch.tensor(wanted))
        torch.testing.assert_close(theta(sign * torch.tensor(times, dtype=torch.float64)), torch.tensor(wanted))

    @pytest.mark.parametrize("steps", [7, 100, 3000])
    @pytest.mark.parametrize("horizon", [1.0, 0.3, 77.7])
    def test_every_step_is_found_by_times_in_single_precision(self, steps: int, horizon: float) -> None:
        nodes = torch.linspace(0, horizon, steps + 1, dtype=torch.float64)
        theta = GridParameter(torch.arange(steps, dtype=torch.float32), nodes)
        single = nodes[:-1].float()
        for times in (single, torch.nextafter(single, single - 1), torch.nextafter(single, single + 1)):
            assert torch.equal(theta(times), theta.values)
            assert [float(theta(t).detach()) for t in times[:100]] == list(range(min(steps, 100)))
            end = torch.nextafter(single[1:], single[1:] - 1) - 0.02 * horizon / steps
            assert torch.equal(theta(end), theta.values[:-1])

    @pytest.mark.parametrize(
        ("begin", "end", "steps"),
        [(1990, 2000, 3650), (2000, 1990, 3650), pytest.param(-1e4, 0, 400_000, marks=pytest.mark.slow)],
    )
    def test_every_step_is_found_far_from_zero(self, begin: float, end: float, steps: int) -> None:
        nodes = torch.linspace(begin, end, steps + 1, dtype=torch.float64)
        theta = GridParameter(torch.arange(steps, dtype=torch.float32), nodes)
        single = nodes[:-1].float()
        # As solvers find them: the first time and so many steps.
        added = single[0] + torch.arange(steps) * (nodes[1] - nodes[0]).float()
        for times in (single, torch.nextafter(single, single - 1), torch.nextafter(single, single + 1), added):
            assert torch.equal(theta(times), theta.values)
            assert [float(theta(t).detach()) for t in times[:100]] == list(range(min(steps, 100)))
        middle = ((nodes[:-1] + nodes[1:]) / 2).float()
        assert torch.equal(theta(middle), theta.values)

    def test_an_exact_time_is_not_taken_for_a_rounded_one(self) -> None:
        nodes = torch.linspace(1990, 2000, 3651, dtype=torch.float64)
        theta = GridParameter(torch.arange(3650, dtype=torch.float32), nodes)
        assert torch.equal(theta(nodes[1:] - 0.02 * nodes.diff()), theta.values)

    def test_a_dtype_that_does_not_tell_the_steps_apart_is_refused(self) -> None:
        nodes = torch.linspace(1990, 2000, 10 * 365 * 24 + 1, dtype=torch.float64)
        theta = GridParameter(torch.arange(len(nodes) - 1.0), nodes)
        assert torch.equal(theta(nodes[:-1]), theta.values)
        for t in (nodes[0].float(), nodes[:3].float()):
            with pytest.raises(ValueError, match=r"t must be of a dtype that .* 5.7e-08 \|t\|, got torch.float32"):
                theta(t)
        short = GridParameter(torch.arange(15.0), torch.linspace(0, 1, 16))
        assert torch.equal(short(short.nodes[:-1].bfloat16()), short.values)
        with pytest.raises(ValueError, match="t must be of a dtype"):
            GridParameter(torch.zeros(100), torch.linspace(0, 1, 101))(torch.tensor(0.5, dtype=torch.bfloat16))

    @pytest.mark.parametrize("kind", ["step", "linear"])
    def test_times_that_are_none(self, kind: str) -> None:
        theta = steps_of() if kind == "step" else lines_of()
        for t in (float("nan"), torch.tensor(torch.nan), torch.tensor([0.1, torch.nan])):
            with pytest.raises(ValueError, match="t must be a number, got NaN"):
                theta(t)
        for t in ([0.1], np.array([0.1]), np.float32(0.1), 1j, torch.tensor(1j), "0.1", None):
            with pytest.raises(TypeError, match="t must be a number or a real tensor, got"):
                theta(t)
        assert torch.equal(theta(torch.tensor(2)), theta(2))

    def test_many_times_within_vmap(self) -> None:
        times = torch.tensor([[0.1, 0.6], [1.0, 1.9]], dtype=torch.float64)
        torch.testing.assert_close(torch.func.vmap(steps_of())(times), steps_of()(times))

    @pytest.mark.parametrize("kind", ["step", "linear"])
    def test_times_of_any_shape(self, kind: str) -> None:
        theta = steps_of() if kind == "step" else lines_of()
        times = torch.tensor([[0.1, 0.6], [1.0, 1.9], [5.0, -5.0]])
        found = theta(times)
        assert found.shape == (3, 2, 3)
        for i in range(3):
            for j in range(2):
                torch.testing.assert_close(found[i, j], theta(times[i, j]))
        assert theta(torch.tensor(0.1)).shape == (3,)

    def test_scalars_and_complex_values(self) -> None:
        assert GridParameter(values(4), NODES)(0.6).shape == ()
        theta = GridParameter(values(5, 2, dtype=torch.complex64), NODES, "linear")
        torch.testing.assert_close(theta(0.25), (theta.values[0] + theta.values[1]) / 2)
        torch.testing.assert_close(theta(torch.tensor([0.25]))[0], theta(0.25))

    @pytest.mark.slow
    def test_a_compiled_function_finds_it_too(self) -> None:
        theta = lines_of()
        compiled = torch.compile(lambda t: 2 * theta(t), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(torch.tensor(0.6, dtype=torch.float64)), 2 * theta(0.6))


class TestGradient:
    @pytest.mark.parametrize("kind", ["step", "linear"])
    def test_of_values(self, kind: str) -> None:
        theta = steps_of() if kind == "step" else lines_of()
        times = torch.tensor([0.1, 0.6, 1.0, 1.9], dtype=torch.float64)
        (at_once,) = torch.autograd.grad(theta(times).sin().sum(), theta.values)
        (one_by_one,) = torch.autograd.grad(sum(theta(t).sin().sum() for t in times), theta.values)
        torch.testing.assert_close(one_by_one, at_once)

    def test_of_the_time(self) -> None:
        theta = lines_of()
        for at, cell in ((0.6, 1), (1.0, 2)):
            for shape in ((), (1,)):
                t = torch.full(shape, at, dtype=torch.float64, requires_grad=True)
                (grad,) = torch.autograd.grad(theta(t).sum(), t)
                slope = (theta.values[cell + 1] - theta.values[cell]).sum() / (NODES[cell + 1] - NODES[cell])
                torch.testing.assert_close(grad, slope.detach().expand(shape))
        t = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(steps_of()(t).sum(), t, allow_unused=True) == (None,)
        assert torch.autograd.gradcheck(theta, torch.tensor([0.6, 1.0], dtype=torch.float64, requires_grad=True))

    def test_rows_are_cut_once_until_the_values_change(self) -> None:
        theta = steps_of()
        rows = theta.rows
        assert theta.rows is rows
        assert theta(0.6) is rows[1]
        for _ in range(2):
            theta(0.6).square().sum().backward()
        torch.testing.assert_close(theta.values.grad[1], 4 * theta.values[1].detach())
        torch.optim.SGD(theta.parameters(), lr=0.1).step()
        assert theta.rows is not rows
        torch.testing.assert_close(theta(0.6), theta.values[1])
        theta.zero_grad()
        theta(0.6).sum().backward()
        assert theta.values.grad[1].tolist() == [1.0] * 3

    def test_a_swapped_parameter_is_noticed(self) -> None:
        theta = steps_of()
        theta(0.6)
        other = torch.zeros(4, 3, dtype=torch.float64)
        assert torch.func.functional_call(theta, {"values": other}, (0.6,)).tolist() == [0.0] * 3
        assert torch.equal(theta(0.6), theta.values[1])
        theta.float()
        assert theta(0.6).dtype == torch.float32
        theta.values = nn.Parameter(other)
        assert theta(0.6).tolist() == [0.0] * 3

    def test_without_a_graph(self) -> None:
        theta = steps_of()
        with torch.no_grad():
            assert not theta(0.6).requires_grad
            assert not theta.rows[0].requires_grad
        assert theta(0.6).requires_grad
        theta.requires_grad_(False)
        assert not theta(0.6).requires_grad


class Field(nn.Module):
    """A pendulum with θ(t), and a parameter that all steps share."""

    def __init__(self, theta: GridParameter) -> None:
        super().__init__()
        self.theta = theta
        self.damping = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        a, b = self.theta(t)
        return torch.stack([a * x[1], -b * torch.sin(x[0]) - self.damping * x[1]])


class TestInASolve:
    @pytest.mark.parametrize("grad_filter", [None, "auto", CostateFilter("trapezoid")])
    @pytest.mark.parametrize("backward", ["checkpoint", "reversible"])
    def test_every_backward_gives_the_same(self, backward: str, grad_filter: object) -> None:
        nodes = torch.linspace(0, 1, 13, dtype=torch.float64)
        field = Field(GridParameter(1 + values(12, 2) / 5, nodes))
        y0, t = torch.tensor([0.4, 0.1], dtype=torch.float64), torch.tensor([0, 0.5, 1], dtype=torch.float64)

        def gradients(way: str) -> list[Tensor]:
            options = {"step_size": 1 / 12}
            y = odeint(field, y0, t, method="leapfrog", options=options, grad_filter=grad_filter, backward=way)
            return torch.autograd.grad(y[1:].square().sum(), list(field.parameters()))

        for found, wanted in zip(gradients(backward), gradients("autograd"), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
        for _ in range(2):
            rows = odeint(
                field, y0, t, method="leapfrog", options={"step_size": 1 / 12}, backward=backward,
                adjoint_params=[*field.theta.rows, field.damping],
            )  # fmt: skip
            torch.autograd.grad(rows.sum(), list(field.parameters()))

    @pytest.mark.slow
    def test_gradient_is_second_order_at_every_step(self) -> None:
        errors = []
        fine = 1280
        reference = self.density(fine, "midpoint_fine")
        for steps in (20, 40, 80):
            found = self.density(steps, "leapfrog")
            stride = fine // steps
            # The fine one is for the middles of its steps.
            first = 1.5 * reference[:1] - 0.5 * reference[1:2]
            wanted = torch.cat([first, (reference[stride::stride] + reference[stride - 1 : -1 : stride]) / 2])
            errors.append(float((found - wanted).abs().max()))
        orders = np.log2(np.array(errors[:-1]) / errors[1:])
        assert (orders > 1.8).all(), (errors, orders)

    def density(self, steps: int, how: str) -> Tensor:
        nodes = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        middle = nodes[:-1] if how == "leapfrog" else (nodes[:-1] + nodes[1:]) / 2
        theta = GridParameter(torch.stack([1 + torch.sin(3 * middle), 1.5 + middle], dim=1), nodes)
        field = Field(theta)
        y0, options = torch.tensor([1.0, 0.5], dtype=torch.float64), {"step_size": 1 / steps}
        if how == "leapfrog":
            y = odeint(field, y0, nodes[[0, -1]], method="leapfrog", options=options, grad_filter="leapfrog")
        else:
            y = torchdiffeq.odeint(field, y0, nodes[[0, -1]], method="midpoint", options=options)
        y[-1].square().sum().backward()
        return theta.values.grad / theta.widths[:, None]

    def test_lookups_cost_the_same_however_many_steps(self) -> None:
        nodes = torch.linspace(0, 1, 1001, dtype=torch.float64)
        theta = GridParameter(torch.ones(1000, 64), nodes)
        with torch.no_grad():
            theta(nodes[0])
        seen = []
        theta.values.register_hook(lambda grad: seen.append(grad.shape))
        sizes = []

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                found = func(*args, **(kwargs or {}))
                sizes.extend(part.numel() for part in (found if isinstance(found, tuple) else [found])
                             if isinstance(part, Tensor))  # fmt: skip
                return found

        with Count():
            sum(theta(t).sum() for t in nodes[:50]).backward()
        assert len(seen) == 1
        assert sum(size > 64 for size in sizes) <= 3


def test_parameters_of_a_module_are_rows_where_they_are_on_a_grid() -> None:
    field = Field(GridParameter(values(4, 2), NODES))
    found = parameters_of(field)
    assert len(found) == 5
    assert {id(row) for row in field.theta.rows} < {id(part) for part in found}
    field.theta.requires_grad_(False)
    assert [id(part) for part in parameters_of(field)] == [id(field.damping)]


class TestOtherGrids:
    def test_a_refined_function_is_the_same(self) -> None:
        theta, times = steps_of(), torch.linspace(0, 2, 301, dtype=torch.float64)
        torch.testing.assert_close(theta.refine(3, "constant")(times + 0.003), theta(times + 0.003))
        torch.testing.assert_close(lines_of().refine(3)(times), lines_of()(times))

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("interpolation", ["linear", "constant"])
    def test_coarsened_again_it_is_what_it_was(self, interpolation: str, sign: float) -> None:
        for theta in (steps_of(sign), lines_of(sign)) if interpolation == "linear" else (steps_of(sign),):
            again = theta.refine(4, interpolation).coarsen(4, interpolation)
            torch.testing.assert_close(again.values, theta.values)
            torch.testing.assert_close(again.nodes, theta.nodes)
            assert again.kind == theta.kind
            assert again.values is not theta.values

    def test_constant_means(self) -> None:
        coarse = steps_of().regrid([0.0, 1.25, 2.0], "constant")
        old = steps_of().values.detach()
        wanted = torch.stack(
            [(0.5 * old[0] + 0.25 * old[1] + 0.5 * old[2]) / 1.25, (0.5 * old[2] + 0.25 * old[3]) / 0.75]
        )
        torch.testing.assert_close(coarse.values.detach(), wanted)

    @pytest.mark.parametrize("kind", ["step", "linear"])
    def test_linear_is_second_order_for_smooth_functions(self, kind: str) -> None:
        errors = []
        for steps in (20, 40, 80):
            nodes = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.3
            at = nodes if kind == "linear" else nodes[:-1]
            theta = GridParameter(torch.sin(5 * at), nodes, kind)
            fine = theta.regrid(torch.linspace(0, 1, 1001, dtype=torch.float64))
            inside = fine.nodes[:-1] <= nodes[-2]
            error = fine.values[: len(inside)].detach() - torch.sin(5 * fine.nodes[:-1])
            errors.append(float(error[inside].abs().max()))
        assert min(np.log2(np.array(errors[:-1]) / errors[1:])) > 1.7

    def test_frozen_it_stays_frozen(self) -> None:
        theta = steps_of().requires_grad_(False)
        for other in (theta.refine(), theta.coarsen(), theta.regrid([0.0, 2.0], "constant")):
            assert not other.values.requires_grad
        assert steps_of().refine().values.requires_grad

    def test_integer_like_and_single_rows(self) -> None:
        one = GridParameter(torch.ones(1, 2), [0.0, 1.0])
        assert one.refine(np.int64(6)).coarsen(np.int32(2)).values.shape == (3, 2)
        assert one.refine(5).values.tolist() == [[1.0, 1.0]] * 5
        assert one.widths.tolist() == [1.0]

    def test_widths(self) -> None:
        assert steps_of().widths.tolist() == [0.5, 0.25, 1.0, 0.25]
        assert lines_of(-1.0).widths.tolist() == [0.25, 0.375, 0.625, 0.625, 0.125]


class TestState:
    def test_nodes_travel_with_the_state(self) -> None:
        theta, other = steps_of(), GridParameter(torch.zeros(4, 3, dtype=torch.float64), [0, 1, 2, 3, 4])
        buffer = io.BytesIO()
        torch.save(theta.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(other.nodes, theta.nodes)
        assert torch.equal(other(0.6), theta(0.6))

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (lambda: GridParameter(values(2, 3), range(3)).state_dict(), r"size mismatch for theta.values.*\(2, 3\)"),
            (lambda: GridParameter(values(4, 2), range(5)).state_dict(), r"size mismatch for theta.values.*\(4, 2\)"),
            (lambda: GridParameter(values(4, 3), range(4), "linear").state_dict(), "theta.kind must be 'step'.*'line"),
            (lambda: lines_of().state_dict(), "theta.kind must be 'step' .*'linear'"),
            (
                lambda: {"values": values(4, 3), "_extra_state": torch.arange(9.0)},
                r"theta.values must have a row for each of 9 nodes or steps, got shape \(4, 3\)",
            ),
            (lambda: {"_extra_state": torch.arange(9.0)}, "theta.values must have a row for each of 9 nodes"),
            (lambda: {"values": values(4, 3), "_extra_state": torch.zeros(5)}, "theta.nodes must be .*increasing"),
        ],
    )
    def test_a_refused_state_changes_nothing(self, state, message: str) -> None:
        model = nn.ModuleDict({"theta": steps_of()})
        before = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({f"theta.{name}": of for name, of in state().items()}, strict=False)
        assert torch.equal(model["theta"].values, before["theta"].values)
        assert torch.equal(model["theta"].nodes, before["theta"].nodes)
        assert torch.equal(model["theta"](0.6), before["theta"](0.6))

    def test_a_state_without_nodes_or_values(self) -> None:
        theta, state = lines_of(), lines_of(-1.0).state_dict()
        with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
            theta.load_state_dict({"values": state["values"]})
        assert theta.load_state_dict({"_extra_state": state["_extra_state"]}, strict=False).missing_keys == ["values"]
        assert torch.equal(theta.nodes, lines_of(-1.0).nodes)

    def test_copies_after_use(self) -> None:
        theta = steps_of()
        theta(0.6)
        for other in (copy.deepcopy(theta), pickle.loads(pickle.dumps(theta))):
            assert torch.equal(other(0.6), theta(0.6))
            other(0.6).sum().backward()
            assert theta.values.grad is None

    @pytest.mark.parametrize("swap", [False, True])
    @pytest.mark.parametrize("kind", ["step", "linear"])
    @pytest.mark.parametrize(
        ("change", "dtype"),
        [
            (lambda model: model.float(), torch.float32),
            (lambda model: model.to("cpu", torch.float32), torch.float32),
            (lambda model: model.to_empty(device="cpu"), torch.float64),
            (lambda model: model.load_state_dict(copy.deepcopy(model).state_dict()), torch.float64),
            (
                lambda model: model.load_state_dict(copy.deepcopy(model).float().state_dict(), assign=True),
                torch.float32,
            ),
            (lambda model: model.requires_grad_(False).requires_grad_(), torch.float64),
        ],
    )
    @pytest.mark.one_in(5)
    def test_it_may_be_converted_after_a_solve(self, change, dtype: torch.dtype, kind: str, swap: bool) -> None:
        """The gradient of the solve that follows is that of a module made anew."""
        nodes = torch.linspace(0, 1, 9, dtype=torch.float64)

        def gradient(field: Field) -> Tensor:
            field.zero_grad()
            y0 = torch.tensor([1.0, 0.5], dtype=field.damping.dtype)
            method = {"method": "leapfrog" if kind == "step" else "abm2", "options": {"step_size": 1 / 8}}
            odeint(field, y0, nodes[[0, -1]], **method, grad_filter="auto")[-1].sum().backward()
            return field.theta.values.grad

        def made(dtype: torch.dtype) -> Field:
            stack = 1 + values(8 if kind == "step" else 9, 2) / 5
            return Field(GridParameter(stack, nodes, kind)).to(dtype)

        field = made(torch.float64)
        gradient(field)
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            change(field)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        with torch.no_grad():
            field.load_state_dict(made(dtype).state_dict())
        assert field.theta.values.dtype == dtype
        torch.testing.assert_close(gradient(field), gradient(made(dtype)))

    def test_nodes_stay_in_double_precision(self) -> None:
        theta = steps_of().half()
        assert theta.nodes.dtype == torch.float64
        assert theta(0.6).dtype == torch.float16
        theta.nodes[0] = 7.0
        assert theta.nodes[0] == 0

    def test_it_tells_what_it_is(self) -> None:
        assert repr(steps_of()) == "GridParameter((4, 3), 4 steps from 0 to 2, kind='step')"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GridParameter(torch.zeros(3), NODES), ValueError, r"values must have 4 rows for 5 nodes.*\(3,\)"),
        (lambda: GridParameter(torch.zeros(4), NODES, "linear"), ValueError, "values must have 5 rows"),
        (lambda: GridParameter(torch.tensor(1.0), NODES), ValueError, "values must have 4 rows"),
        (lambda: GridParameter(torch.zeros(4, dtype=torch.int64), NODES), TypeError, "floating or complex.*int64"),
        (lambda: GridParameter([0.0] * 4, NODES), TypeError, "floating or complex tensor, got list"),
        (lambda: GridParameter(torch.zeros(4), NODES, "cubic"), ValueError, "kind must be one of.*'cubic'"),
        (lambda: GridParameter(torch.zeros(4), "grid"), TypeError, "nodes must be a sequence of numbers, got 'grid'"),
        (lambda: GridParameter(torch.zeros(0), [0.0]), ValueError, "nodes must be one-dimensional with at least 2"),
        (lambda: GridParameter(torch.zeros(2), [0.0, 1.0, 1.0]), ValueError, "strictly increasing or decreasing"),
        (lambda: GridParameter(torch.zeros(2), [0.0, 1.0, torch.inf]), ValueError, "nodes must be finite"),
        (lambda: steps_of().regrid([0.0, 1.0]), ValueError, r"nodes must lead from 0.0 to 2.0.*from 0.0 to 1.0"),
        (lambda: steps_of().regrid([0.0, 2.0], "cubic"), ValueError, "interpolation must be one of.*'cubic'"),
        (lambda: lines_of().regrid([0.0, 2.0], "constant"), ValueError, "interpolation must be 'linear' for kind"),
        (lambda: steps_of().coarsen(3), ValueError, "factor must divide the number of steps, 4, got 3"),
        (lambda: steps_of().refine(0), ValueError, "factor must be at least 1, got 0"),
        (lambda: steps_of().refine(1.5), TypeError, "factor must be an int, got 1.5"),
        (lambda: steps_of().coarsen(True), TypeError, "factor must be an int, got True"),
    ],
)
def test_what_cannot_be_meant_is_an_error(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_a_gpu_no_time_is_read_by_the_host() -> None:
    theta = lines_of().cuda()
    t = torch.tensor(0.6, device="cuda")
    theta(t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = theta(t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), lines_of()(0.6))
