"""A solve as one node of autograd, so that its backward can tell the parameter path from the state path.

While the solver steps, every evaluation of f is recorded on detached copies of its arguments: a small graph of its own
that leads to the parameters, whatever they are and wherever f finds them. Or it is not, and will be made again in the
backward pass. Afterwards one node attaches the trajectory to autograd; its inputs are y0, the times and the parameters.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from torchdiffeq_lmm.filters.filter_plan import FilterPlan
from torchdiffeq_lmm.forward.autograd_state import refuse_tangents
from torchdiffeq_lmm.forward.outputs import Trajectory
from torchdiffeq_lmm.forward.samples import Systems
from torchdiffeq_lmm.forward.sde_stepping import DriftAndNoise
from torchdiffeq_lmm.forward.step_evaluator import EvaluateAt, StepEvaluator
from torchdiffeq_lmm.forward.stepping import History
from torchdiffeq_lmm.schemes.recurrence import Recurrence

from .autograd_function import Keeper, attach
from .evaluation import Evaluation, Recorder
from .noise_adjoint import NoiseRecord
from .rerun import Rerun
from .rng_state import ForwardContext, RngState
from .solve_adjoint import SolveAdjoint
from .stored_evaluations import BackwardMode, Record


class Parameters(NamedTuple):
    """The tensors whose gradients are wanted, for a backward pass that evaluates f again.

    Attributes:
        tensors: leaves or not, all of which require a gradient.
        are_all: whether func must not depend on others.
    """

    tensors: tuple[Tensor, ...]
    are_all: bool


class SolveRecorder:
    """Records the evaluations of f in one solve, or what it takes to make them again.

    Args:
        f: from what func is given for a time, and a state, to the slope.
        precision: the unit in the last place of func's values.
        systems: into which implicit equations fall.
        y0: the initial state.
        differentiate_times: whether gradients with respect to the times of the nodes are needed.
        mode: how the backward pass finds the evaluations.
        parameters: what f depends on; None if the evaluations are kept.
        steps: how many steps there will be, or at most.
        tolerance: see `Rerun`.

    Raises:
        RuntimeError: y0 has a tangent of forward mode, or the solve is inside a transform of torch.func.
    """

    def __init__(
        self,
        f: Callable[[Tensor, Tensor], Tensor],
        precision: float,
        systems: Systems,
        y0: Tensor,
        differentiate_times: bool,
        mode: BackwardMode,
        parameters: Parameters | None,
        steps: int,
        tolerance: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        refuse_tangents(y0)
        self._differentiate_times = differentiate_times
        self._mode = mode
        self._parameters = parameters
        self._tolerance = tolerance
        self._recorder = Recorder(f, y0, differentiate_times, *(parameters or ()))
        self._precision = precision
        self._systems = systems
        self._context = ForwardContext(y0.device)
        self._evaluations: dict[int, Evaluation | None] = {}
        self._end_evaluations: dict[int, Evaluation | None] = {}
        self._noise: dict[int, Evaluation | None] = {}
        self._states: dict[int, Tensor] = {}
        self._slopes: dict[int, Tensor] = {}
        self._snapshots = mode.snapshots(steps, y0.device)

    @property
    def keeps(self) -> bool:
        """Whether all evaluations are kept."""
        return self._snapshots is None

    def evaluate(self, state: int, user_time: Tensor, x: Tensor, keep: bool = False) -> Tensor:
        """Evaluate f and return its value without a graph.

        Args:
            state: the number of the state in the recurrence; evaluated again, it is recorded anew.
            user_time: what func is given for its time.
            x: the state, without a graph.
            keep: whether the evaluation is kept in any case, for an output depends on it.
        """
        # The first one is for finding out what func depends on.
        if not (self.keeps or keep or state == 0):
            return self._recorder.evaluate(user_time, x)
        slope, evaluation = self._recorder.record(user_time, x)
        if self.keeps or keep:
            self._evaluations[state] = evaluation
        if self.keeps and self._differentiate_times:
            # func may return the same memory again and again.
            self._states[state], self._slopes[state] = x.detach(), slope.detach().clone()
        return slope.detach()

    def evaluate_end(self, node: int, user_time: Tensor, x: Tensor) -> Tensor:
        """Evaluate f at a node where the recurrence does not, and keep it; as `evaluate`."""
        # Once more, the recurrence is to draw the same random numbers without it.
        rng = None if self.keeps else RngState.now(x.device)
        with self._context.restored(rng):
            slope, self._end_evaluations[node] = self._recorder.record(user_time, x)
        return slope.detach()

    def evaluate_noise(
        self, state: int, evaluate: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
    ) -> tuple[Tensor, ...]:
        """Evaluate a noise increment, or f and it at once; as `evaluate`, of which all is kept."""
        values = self._recorder.record_parts(evaluate, x)
        for kept, (_, evaluation) in zip((self._noise, self._evaluations), reversed(values), strict=False):
            kept[state] = evaluation
        return tuple(value.detach() for value, _ in values)

    def pass_by(self, state: int, history: History, steps: StepEvaluator) -> None:
        """Note that a node is reached, from which `steps` will go on."""
        if self._snapshots is not None and self._snapshots.pass_by(state, history):
            # So that what comes next does not depend on what came before.
            steps.restart()

    def attach(
        self,
        trajectory: Trajectory,
        user_times: Tensor | None,
        recurrence: Recurrence,
        plan: FilterPlan | None,
        history: History,
        steps: Callable[[EvaluateAt], StepEvaluator],
        first: int = 0,
        noise_of_rows: Sequence[tuple[int, ...]] | None = None,
    ) -> tuple[Trajectory, Keeper | None]:
        """Attach a recorded trajectory to autograd.

        Args:
            trajectory: what the recorded values and the recurrence have led to; its first state with the graph of y0.
            user_times: what func is given for the times of the states, with its graph; None where it has none.
            recurrence: the rows, with the graph of their weights.
            plan: the filter; None for the gradient of auto-differentiation.
            history: the past, at the end.
            steps: see `Rerun`.
            first: the node at which the solve begins.
            noise_of_rows: see there; None for an ordinary differential equation.

        Returns:
            The trajectory, with the graph that plain stepping would have given it but for the filter, and what keeps
            the solve: see `autograd_function.stack`; None where there is no graph.

        Raises:
            RuntimeError: func draws random numbers, and the solve is to be run backwards.
        """
        y0 = trajectory.states[first]
        recorded = (*self._evaluations.values(), *self._noise.values(), *self._end_evaluations.values())
        evaluations = [e for e in recorded if e is not None]
        if self._parameters is None:
            sources = tuple({id(s): s for e in evaluations if e.handle is None for s in e.sources}.values())
        else:
            sources = self._parameters.tensors
        handles = tuple(e.handle for e in evaluations if e.handle is not None)
        # As with plain stepping, what depends on nothing that requires a gradient requires none.
        times_need_grad = user_times is not None and user_times.requires_grad
        if not (y0.requires_grad or times_need_grad or recurrence.weights is not None or sources or handles):
            return trajectory, None
        at_node = recurrence.nodes
        outputs = [node for node in trajectory.states if node > first]
        rerun = Rerun(recurrence, steps, self._recorder, self._context, self._differentiate_times, self._tolerance)
        states = {0: y0.detach(), **self._states}
        solve = SolveAdjoint(
            recurrence=recurrence,
            plan=plan,
            with_evaluations=self._mode.evaluations(
                Record(self._evaluations, states, self._slopes, rerun, self._snapshots, history)
            ),
            state_outputs=outputs,
            slope_outputs=[
                *((node, self._evaluations[at_node[node]]) for node in trajectory.slopes),
                *((node, self._end_evaluations[node]) for node in trajectory.end_slopes),
            ],
            sources=sources,
            handles=handles,
            precision=self._precision,
            systems=self._systems,
            noise=None if noise_of_rows is None else NoiseRecord(noise_of_rows, self._noise),
            versions=[(tensor, tensor._version) for tensor in (() if self.keeps else (y0, *sources))],
        )
        values = [
            *(trajectory.states[node] for node in outputs),
            *trajectory.slopes.values(),
            *trajectory.end_slopes.values(),
        ]
        # What the solve keeps of them must not get a graph that keeps the solve.
        values = [value.detach() for value in values]
        found = attach(solve, values, y0, user_times, recurrence.weights, *sources, *handles)
        attached = iter(found.values)
        with_graph = Trajectory(
            states={first: y0, **{node: next(attached) for node in outputs}},
            slopes={node: next(attached) for node in trajectory.slopes},
            end_slopes={node: next(attached) for node in trajectory.end_slopes},
        )
        return with_graph, found.keeper


class RecordedField:
    """f and the noise increments of one solve, recorded, with values that have no graph.

    Args:
        field: f and K.
        time: from the number of a state to what is given for its time.
        recorder: what records them.
    """

    def __init__(self, field: DriftAndNoise, time: Callable[[int], Tensor], recorder: SolveRecorder) -> None:
        self._field = field
        self._time = time
        self._recorder = recorder

    def drift(self, state: int, x: Tensor) -> Tensor:
        """See `DriftAndNoise`."""
        return self._recorder.evaluate(state, self._time(state), x)

    def noise(self, state: int, x: Tensor) -> Tensor:
        """See `DriftAndNoise`."""
        (noise,) = self._recorder.evaluate_noise(state, lambda x: (self._field.noise(state, x),), x)
        return noise

    def drift_and_noise(self, state: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `DriftAndNoise`."""
        slope, noise = self._recorder.evaluate_noise(state, lambda x: self._field.drift_and_noise(state, x), x)
        return slope, noise
