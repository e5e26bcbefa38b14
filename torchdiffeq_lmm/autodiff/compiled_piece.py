"""A piece of a solve by compiled blocks, in place of `PieceSolver`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from torchdiffeq_lmm.filters.filter_plan import FilterPlan, plan_filter
from torchdiffeq_lmm.filters.grad_filter import CostateFilter
from torchdiffeq_lmm.forward.step_source import FixedSteps
from torchdiffeq_lmm.forward.vector_field import HostedFunction, VectorField
from torchdiffeq_lmm.schemes.block_rows import ExplicitMethod, all_weights
from torchdiffeq_lmm.schemes.methods import MultistepMethod

from .block_schedule import Schedule, schedule
from .compile_settings import Compile
from .compiled_autograd import solve_compiled
from .compiled_blocks import CompiledBlocks
from .compiled_solve import CompiledSolve
from .func_capture import Dependencies
from .goals import Outputs
from .kept_captures import dependencies_of
from .piece import Piece, PieceSolver
from .reversal import Reversible

CompiledBackward = Reversible | Literal["autograd", "checkpoint"]
"""Backwards block by block; or by the past before each, with what is dear to make again for "autograd"."""


@dataclass(frozen=True)
class CompiledPieceSolver:
    """Solves the pieces of one solve by compiled blocks.

    Attributes:
        settings: how to compile.
        hosted: the user's function.
        vector_field: the same with its checks.
        method: the method.
        costate_filter: the filter.
        adjoint_params: the tensors whose gradients are wanted; None for all that func depends on.
        backward: how to run it backwards: see `CompiledBackward`.
        eager: solves pieces that are too short for a block.
        time, y0: a time and a state as func is given them; the values do not matter.
    """

    settings: Compile
    hosted: HostedFunction
    vector_field: VectorField
    method: ExplicitMethod
    costate_filter: CostateFilter | None
    adjoint_params: Sequence[Tensor] | None
    backward: CompiledBackward
    eager: PieceSolver
    time: Tensor
    y0: Tensor

    def solve(
        self,
        source: FixedSteps,
        y0: Tensor,
        goal: Outputs,
        before: FixedSteps | None,
        after: FixedSteps | None,
    ) -> Piece:
        """See `PieceSolver`.

        Raises:
            RuntimeError: func cannot be compiled.
            ValueError: a tensor of `adjoint_params` is not one that func takes.
        """
        planned = self.planned(source, goal)
        if planned is None:
            return self.eager.solve(source, y0, goal, before, after)
        weights = times = None
        if source.requires_grad:
            weights, times = all_weights(source.recurrence), source.every_user_time()
        states, again = self._states(planned, y0, weights, times, self._takes_slopes(goal))
        slopes = _SlopesAtNodes(self.vector_field, source, goal.slopes or {}, again)
        for node in goal.states:
            state = source.recurrence.nodes[node]
            goal.pass_by(node, state, states[node], slopes)
            slopes.pass_by(node, state)
        trajectory = goal.trajectory(slopes)
        return Piece(trajectory, source.until(source.recurrence.nodes[-1], source.count), None)

    def planned(self, source: FixedSteps, goal: Outputs) -> Schedule | None:
        """What is known of the piece before any values; None where it is too short for a block."""
        # As far as states are concerned the first one is y0.
        first = 0 if self._takes_slopes(goal) and 0 in goal.slope_nodes else 1
        observed = [node for node in goal.states if node >= first]
        return schedule(self.method, source, observed, self._plan(source), self.block)

    @property
    def block(self) -> int:
        """Of how many steps a block is."""
        return self._blocks.block

    @cached_property
    def _blocks(self) -> CompiledBlocks:
        dependencies = dependencies_of(self.hosted, self.vector_field, self.time, self.y0, self.settings.dynamic)
        return CompiledBlocks(dependencies, self.settings, self.y0, self.time, keeps=self.backward == "autograd")

    def states(self, planned: Schedule, y0: Tensor, weights: Tensor | None, times: Tensor | None) -> dict[int, Tensor]:
        """The states at the observed nodes, and the first one, with their graph.

        Args:
            planned: the piece.
            y0: the state at its beginning.
            weights, times: of all rows, where they have a gradient.
        """
        return self._states(planned, y0, weights, times, takes_slopes=False)[0]

    def _states(
        self, planned: Schedule, y0: Tensor, weights: Tensor | None, times: Tensor | None, takes_slopes: bool
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The same, and once more for slopes, what E sees of which a filter must be told from the rest."""
        blocks = self._blocks
        dependencies = blocks.dependencies
        records = torch.is_grad_enabled()
        wanted = self._wanted(dependencies) if records else set()
        stacks = [stack if id(stack) in wanted else stack.detach() for stack in dependencies.stacks]
        solve = CompiledSolve(
            planned,
            blocks,
            tuple(i for i, tensor in enumerate(dependencies.tensors) if id(tensor) in wanted),
            records and weights is not None,
            records and takes_slopes,
            tuple(i for i, stack in enumerate(stacks) if stack.requires_grad),
            self.backward if isinstance(self.backward, Reversible) else None,
        )
        looked_up = dependencies.looked_up(stacks, planned.times, planned.row_times) if stacks else []
        found = solve_compiled(solve, y0, weights, times, dependencies.tensors, looked_up)
        states, again = ({0: y0, **dict(zip(planned.observed, part.unbind(), strict=True))} for part in found)
        return {**states, 0: y0}, again

    def _takes_slopes(self, goal: Outputs) -> bool:
        """Whether the filter must be told what E sees of slopes."""
        return self.costate_filter is not None and bool(goal.slope_nodes)

    def _plan(self, source: FixedSteps) -> FilterPlan | None:
        if self.costate_filter is None or not torch.is_grad_enabled():
            return None
        method = self.method if isinstance(self.method, MultistepMethod) else None
        return plan_filter(
            self.costate_filter.weights,
            source.recurrence,
            source.lengths,
            method,
            order=self.costate_filter.highest_order,
        )

    def _wanted(self, dependencies: Dependencies) -> set[int]:
        """The tensors and stacks whose gradients are wanted, by id."""
        taken = (*dependencies.tensors, *dependencies.stacks)
        known = {id(tensor) for tensor in taken}
        for parameter in self.adjoint_params or ():
            if not parameter.is_leaf and id(parameter) not in known:
                raise ValueError(
                    f"adjoint_params must be tensors that func itself takes where compile is given, such as `values` "
                    f"of a GridParameter instead of its rows; got another, of shape {tuple(parameter.shape)}"
                )
        listed = known if self.adjoint_params is None else {id(parameter) for parameter in self.adjoint_params}
        return {id(tensor) for tensor in taken if tensor.requires_grad and id(tensor) in listed}


class _SlopesAtNodes:
    """f at nodes with outputs, for what outputs need of it; see `piece.Slopes`.

    Args:
        vector_field: f.
        source: the steps.
        wanted: see `Goal`.
        states: by node.
    """

    def __init__(
        self, vector_field: VectorField, source: FixedSteps, wanted: Mapping[int, int], states: Mapping[int, Tensor]
    ) -> None:
        self.kept: dict[int, Tensor] = {}
        self._vector_field = vector_field
        self._source = source
        self._wanted = wanted
        self._states = states

    def pass_by(self, node: int, state: int) -> None:
        """Evaluate f at a node, if that is wanted."""
        if state in self._wanted:
            time = self._source.user_time(state)
            self.kept[self._wanted[state]] = self._vector_field(time, self._states[node]).clone()

    def at_end(self, node: int, state: int, x: Tensor) -> Tensor:  # noqa: ARG002
        """See `piece.Slopes`."""
        return self._vector_field(self._source.user_time_at_end(node, state), self._states[node]).clone()
