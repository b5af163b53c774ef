"""The two stages of the method: the output weights Ω, then the linear model.

1. Fit ``b + W f(x)``, a regression on the activations. Its weights are ``Ω``.
2. Fit ``b + W f(x) + Ω J(x) w₂`` with ``Ω`` fixed, from ``W = Ω`` and ``w₂ = 0``.

Around displaced parameters, the term is ``Ω J (w₂ - point)``: the penalty is on the displacement
from the pretrained parameters. Constants ``-Ω J point`` then belong to the loss.

Both problems are convex. A stage stops when the Newton decrement ``½ gᵀ P g`` (gradient ``g``,
preconditioner ``P``), which predicts how far the objective can still fall, is below ``tol`` times
its fall so far. It counts from the zero model in stage 1 and in a stage 2 without activations, and
from the result of stage 1 in any other stage 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from sklearn_gradfeat.backbones import Network
from sklearn_gradfeat.cache import CachedSamples
from sklearn_gradfeat.curvature import CoarsePath, FactoredTerm, Inverses, with_rows_if_cheap
from sklearn_gradfeat.data import (
    Result,
    accumulation_device,
    gather_over_ranks,
    n_ranks,
    number_of_first_rank,
    of_first_rank,
    sum_over_ranks,
)
from sklearn_gradfeat.linearized import (
    Bernoulli,
    LinearizedHead,
    LinearModel,
    Loss,
    Multinomial,
    Shifted,
    TangentObjective,
    TangentTerm,
)
from sklearn_gradfeat.solvers import Solution, minimize, penalised, preconditioned_norm
from sklearn_gradfeat.training._journal import Journal
from sklearn_gradfeat.training._problem import Problem
from sklearn_gradfeat.training._progress import Progress, Watch

# The first stage is solved to this share of tol. Its iterations are cheap; the second stage would
# need passes over the head to remove the error that it leaves.
_FIRST_STAGE = 0.01
# Least share of the parameters in a coarse space that takes the place of all of them.
_SHARE = 0.5
# Tolerance over the coarse space, where iterations are cheap. With a larger one, the fit with a
# weak penalty would end at the former minimum, which looks better than that of the final fit.
COARSE_TOL = 1e-4
# So many iterations are allowed there, even if `max_iter` is smaller: a model that stops early has
# a score as with more penalty.
_COARSE_ITER = 1000
# A known model whose objective is lower by this share shows that the zero model is not the optimum.
_LOWER = 1e-3
# Tolerance where Newton steps are exact: one or two more steps reach it.
_EXACT = 1e-16


@dataclass(frozen=True)
class FitSettings:
    """The parameters of an estimator on which training depends, except the penalties.

    ``n_linearizations`` is None if held-out samples choose it.
    """

    features: str
    parametrization: str
    fit_intercept: bool
    tol: float
    max_iter: int
    n_linearizations: int | None = 1


class Prepared(NamedTuple):
    """The training samples after the frozen layers, for any targets and penalties.

    Attributes
    ----------
    network : Network
        The network, cut below θ₂.
    samples : CachedSamples
        Activations and inputs of the head.
    settings : FitSettings
        The kind of model and the tolerance.
    attributes : dict
        Attributes of the fitted estimator that do not depend on the targets.
    point : mapping of str to tensor, default={}
        Where the network is linearised, as displacements from the pretrained parameters; the
        activations belong to it. It is empty for the pretrained parameters.
    journal : Journal
        The finished results of the fit, for a checkpoint.
    """

    network: Network
    samples: CachedSamples
    settings: FitSettings
    attributes: dict[str, Any]
    point: Mapping[str, Tensor] = MappingProxyType({})
    journal: Journal = Journal()

    def subset(self, rows: npt.NDArray[np.intp]) -> Prepared:
        """Return some of the samples."""
        return self._replace(samples=self.samples.subset(rows))


@dataclass
class FirstStage:
    """The result of the first stage, from which second stages start.

    Attributes
    ----------
    alpha : float
        Its penalty.
    model : LinearModel
        The model without displacements.
    solution : Solution
        The result of the solver.
    is_zero : bool
        Whether the zero model is the optimum.
    inverses : Inverses
        The approximate inverse Hessians of second stages.
    term : TangentTerm or None
        The gradient term of second stages, for any penalty. None before the first of them.
    """

    alpha: float
    model: LinearModel
    solution: Solution
    is_zero: bool
    inverses: Inverses = field(default_factory=Inverses)
    term: TangentTerm | None = None


class FitResult(NamedTuple):
    """A fitted model, and the result of the solver in each stage.

    ``solutions`` has the key ``"activation"`` and, unless that is the whole model, the value of
    the parameter ``features``. ``separated`` names the penalties that are zero while the terms
    without a penalty separate the classes, so that the loss has no minimum. ``unmoved`` says that
    the gradient term is zero although its penalty is finite and other terms are not zero. With
    several linearisations, ``linearizations`` has the result of each, and ``network_path`` the
    objective of the network before the first one and after each move.
    """

    model: LinearModel
    solutions: dict[str, Solution]
    alpha: float
    gradient_alpha: float
    separated: tuple[str, ...] = ()
    unmoved: bool = False
    linearizations: tuple[Solution, ...] = ()
    network_path: tuple[float, ...] = ()

    @property
    def is_interrupted(self) -> bool:
        """Whether a callback ended the fit."""
        return any(solution.status == "interrupted" for solution in self.solutions.values())

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of a fitted estimator."""
        last = list(self.solutions.values())[-1]
        counted = self.linearizations or (last,)
        return {
            **self.model.attributes(),
            "alpha_": self.alpha,
            "gradient_alpha_": self.gradient_alpha,
            "n_linearizations_": len(counted) if math.isfinite(self.gradient_alpha) else 0,
            "n_iter_": sum(solution.n_iter for solution in counted),
            "n_passes_": sum(solution.n_passes for solution in counted),
            "objective_path_": np.array(self.network_path or last.objective_path),
        }


class TwoStageFit:
    """Both stages on the same samples, for any penalties.

    Results that do not depend on the penalties are computed once. All methods except
    :meth:`fit` take and return models of the targets minus the offset of the problem.

    Parameters
    ----------
    prepared : Prepared
        The samples.
    problem : Problem
        Their targets and weights.
    stopped : callable, default=None
        Called after every iteration without a ``progress``; returning True ends the fit.
    """

    def __init__(
        self,
        prepared: Prepared,
        problem: Problem,
        stopped: Callable[[], bool] | None = None,
    ) -> None:
        self._prepared, self._stopped = prepared, stopped
        self.samples, self.settings = prepared.samples, prepared.settings
        self.journal = prepared.journal
        self.problem, self.attributes = problem, prepared.attributes | problem.attributes
        self.loss = problem.loss(accumulation_device(self.samples.activation.device))
        self.point = dict(prepared.point)
        network = prepared.network.moved(self.point)
        self.parameters = network.parameters
        self.head = LinearizedHead(
            network.head,
            network.parameters,
            self.settings.parametrization,
            network.out_channels,
        )
        self.like = self.samples.activation.new_empty(0)
        self.inverses = Inverses()
        self._first: FirstStage | None = None

    def moved(self, point: Mapping[str, Tensor]) -> TwoStageFit:
        """Return the stages at another point, after a pass that computes the activations there."""
        head = LinearizedHead.from_network(self._prepared.network.moved(point))

        def forward_pass() -> Tensor:
            activation = self.samples.empty(*self.samples.activation.shape)
            for rows, boundary in self.samples.batches():
                activation[rows] = head.activation(boundary)
            return activation

        samples = self.samples.with_activation(self.samples.batch_size.retry(forward_pass))
        prepared = self._prepared._replace(samples=samples, point=point)
        return TwoStageFit(prepared, self.problem, self._stopped)

    def fit(
        self,
        alpha: float,
        gradient_alpha: float,
        warm: LinearModel | None = None,
        progress: Progress | None = None,
    ) -> FitResult:
        """Fit the output weights, then the linear model from there.

        Parameters
        ----------
        alpha, gradient_alpha : float
            The penalties. An infinite ``gradient_alpha`` leaves the gradient term out.
        warm : LinearModel or None
            The model to start from. None starts the first stage at zero, and the second from
            the result of the first.
        progress : Progress or None
            Follows the iterations.

        Returns
        -------
        FitResult
        """
        features = self.settings.features
        if features == "activation":
            gradient_alpha = math.inf
        warm = None if warm is None else self.problem.reduced(warm)
        last = math.isinf(gradient_alpha)
        # A second stage goes on where it ended only with the same Ω: a first stage starts at zero.
        first = self.fit_activation(alpha, warm if last else None, progress, last)
        model, solutions = first.model, {"activation": first.solution}
        separated, unmoved = self.separated(first), False
        if not last:
            # Where the zero model is the optimum, a warm start must not take its place.
            start = model if warm is None or first.is_zero else warm
            model, solutions[features] = self.fit_gradient(first, gradient_alpha, start, progress)
            separated += self.separated(first, gradient_alpha, solutions[features])
            unmoved = not model.moves and not first.is_zero
        restored = self.problem.restored(model)
        return FitResult(restored, solutions, alpha, gradient_alpha, separated, unmoved)

    def separated(
        self,
        first: FirstStage,
        gradient_alpha: float = math.inf,
        second: Solution | None = None,
    ) -> tuple[str, ...]:
        """Return the penalty of a stage that is zero, if its terms separate the classes.

        The stage is the first one, or the ``second``. If the terms without a penalty give every
        sample its class, the loss of no sample exceeds ``log 2``. It falls for ever along them.
        """
        if second is None:
            name, penalty, solution = "alpha", first.alpha, first.solution
        else:
            name, penalty, solution = "gradient_alpha", gradient_alpha, second
        if penalty != 0 or not isinstance(self.loss, (Bernoulli, Multinomial)):
            return ()

        def is_separated() -> bool:
            if second is None:
                objective = self.objective(0.0, self.samples.activation, None)
            else:
                objective = self.second_objective(first, 0.0)
            free = torch.where(objective.penalty == 0, solution.x, 0.0)
            weights = self.loss.weights[self.loss.weights > 0]
            smallest = min(gather_over_ranks(float(weights.min()) if len(weights) else math.inf))
            return objective.loss.value(objective.forward(free)) < math.log(2) * smallest

        return (name,) if self.journal.number("the classes are separated", is_separated) else ()

    def fit_activation(
        self,
        alpha: float,
        warm: LinearModel | None = None,
        progress: Progress | None = None,
        last: bool = False,
    ) -> FirstStage:
        """Fit ``b + W f``, starting from the ``Ω`` of ``warm``; ``last`` stages call callbacks.

        If the search for penalties has fitted the first stage of this ``alpha`` already, that fit
        is returned, except as the last stage.
        """
        if self._first is not None and self._first.alpha == alpha and warm is None and not last:
            return self._first
        objective = self.objective(alpha, self.samples.activation, None)
        zero = self.like.new_zeros(sum(objective.sizes))

        def value(x: Tensor) -> float:
            return self.loss.value(objective.forward(x)) + penalised(objective, x, x) / 2

        @cache
        def zero_is_optimum() -> bool:
            if warm is not None:
                known = self._unknowns(warm.omega, warm.intercept, zero[:0])
                if value(known) < (1 - _LOWER) * value(zero):
                    return False
            self.inverses.x = zero
            return _is_optimum(objective, zero, self._inverse(objective, self.inverses))

        def start() -> Tensor:
            if warm is None or zero_is_optimum():
                return zero
            return self._unknowns(warm.omega, warm.intercept, zero[:0])

        def baseline() -> float:
            return math.inf if zero_is_optimum() else value(zero)

        is_zero = bool(self.journal.number("zero is optimum", zero_is_optimum))
        to_model = partial(self._first_model, objective)
        solution = self._minimize(
            "activation",
            objective,
            start,
            self.inverses,
            baseline,
            self.settings.tol * _FIRST_STAGE,
            self._watch("activation", to_model, last, progress),
        )
        if not self.point:  # coarse spaces and Gram matrices of a search depend on them
            self.journal.used_to_the_end()
        self._first = FirstStage(alpha, to_model(solution.x), solution, is_zero)
        return self._first

    def fit_gradient(
        self,
        first: FirstStage,
        gradient_alpha: float,
        start: LinearModel,
        progress: Progress | None = None,
        tol: float | None = None,
        proximal: float = 0.0,
    ) -> tuple[LinearModel, Solution]:
        """Fit the linear model whose ``Ω`` comes from the first stage, from ``start``.

        ``tol`` replaces the tolerance of the settings, and ``proximal`` is the penalty on the
        displacement from the point.
        """
        self._choose_term(first)
        origin = self._origin(gradient_alpha, proximal)
        objective = self.second_objective(first, gradient_alpha + proximal, origin)
        to_model = partial(self._second_model, objective, first.model, origin)

        def baseline() -> float:
            unmoved = self._second_unknowns(first.model, origin)
            value = objective.loss.value(objective.forward(unmoved))
            return value + penalised(objective, unmoved, unmoved) / 2

        solution = self._minimize(
            self.settings.features,
            objective,
            lambda: self._second_unknowns(start, origin),
            first.inverses,
            baseline,
            self.settings.tol if tol is None else tol,
            self._watch(self.settings.features, to_model, True, progress),
        )
        model = to_model(solution.x)
        self.journal.used_by(model)
        return model, solution

    def fit_in_coarse_space(
        self,
        first: FirstStage,
        gradient_alpha: float,
        tol: float,
        progress: Progress | None = None,
        proximal: float = 0.0,
    ) -> tuple[LinearModel, Solution]:
        """Fit the linear model over the coarse space, see :meth:`shared`, from the first stage."""
        stage, start = self.settings.features, first.model
        origin = self._origin(gradient_alpha, proximal)
        nothing = Inverses()  # a minimum over the space learns nothing for later ones
        activation = self.samples.activation
        term = self._term(first, gradient_alpha + proximal)
        objective = self.objective(first.alpha, activation, term)
        to_model = partial(self._second_model, objective, start, origin)
        solution = self.journal.finished(stage, objective, nothing)
        if solution is None:
            # At the point, the logits of the linear model are those of the first stage.
            x = self._second_unknowns(start, origin)
            unmoved = self.objective(first.alpha, activation, None)
            logits = unmoved.forward(x[: sum(unmoved.sizes)])
            path = self._retry(partial(first.inverses.coarse_path, objective, x, logits))
            watch = self._watch(stage, lambda x: to_model(path.whole(x)), True, progress)
            solution = path.minimum(objective, tol, self.settings.max_iter, watch)
            self.journal.finish(stage, solution, nothing)
        model = to_model(solution.x)
        self.journal.used_by(model)
        return model, solution

    def curvature_of_step(self, first: FirstStage) -> float:
        """Return the curvature of the loss along the first step of the second stage.

        The step is that of steepest descent in ``w₂``, ``d = -Jᵀ Ωᵀ loss'``, and the curvature is
        ``dᵀ H d / dᵀ d`` with the Hessian ``H`` of the loss. With this ``gradient_alpha`` the
        optimal length of the step is half of that without a penalty. It takes two passes. It is
        zero if the gradient in ``w₂`` vanishes.
        """
        return self.journal.number("curvature of step", lambda: self._curvature_of_step(first))

    def _curvature_of_step(self, first: FirstStage) -> float:
        self._choose_term(first)
        objective = self.objective(0.0, None, self._term(first, 0.0))
        start = self._second_unknowns(first.model)
        logits = self.second_objective(first, 0.0).forward(start)
        gradient = objective.adjoint(self.loss.gradient(logits))
        gradient[: objective.sizes[1]] = 0  # the intercept
        size = number_of_first_rank(float(gradient.norm()))
        if size == 0:
            return 0.0
        seen = objective.forward(gradient / size)
        return float(sum_over_ranks((self.loss.curvatures(logits) * seen.square()).sum()))

    def shared(self, first: FirstStage) -> tuple[Inverses, bool] | None:
        """Return inverses for fits to parts of the samples, and if their coarse space will do.

        The result is None where the rows of the samples give the inverses. A coarse space with less
        than half of the parameters, as with many outputs, will not do.
        """
        inverses = first.inverses

        @cache
        def has_layers() -> bool:
            self._choose_term(first)
            objective, start = self.second_objective(first, 1.0), self._second_unknowns(first.model)
            return self._retry(partial(inverses.learn_layers, objective, start))

        def share_of_subspace() -> float:
            return self._retry(inverses.share_of_subspace) if has_layers() else -1.0

        share = self.journal.number("share of the coarse space", share_of_subspace)
        if share < 0:
            return None
        has_layers()
        return inverses, share >= _SHARE

    def has_coarse_space(self, first: FirstStage) -> bool:
        """Return whether linear models around this and later points are fitted in a coarse space.

        They are not where passes need no network.
        """

        def is_factored() -> bool:
            self._choose_term(first)
            return isinstance(first.term, FactoredTerm)

        if self.journal.number("the rows are factored", is_factored):
            return False
        shared = self.shared(first)
        return shared is not None and shared[1]

    def coarse_path(self, first: FirstStage) -> CoarsePath:
        """Return the minima of second stages in the coarse space."""
        objective, start = self.second_objective(first, 1.0), self._second_unknowns(first.model)
        return self._retry(partial(first.inverses.coarse_path, objective, start))

    def minimum_of(
        self, path: CoarsePath, first: FirstStage, gradient_alpha: float, tol: float
    ) -> tuple[LinearModel, Solution]:
        """Return the next linear model of :meth:`coarse_path`."""
        objective = self.second_objective(first, gradient_alpha)
        to_model = partial(self._second_model, objective, first.model, None)
        watch = self._watch(self.settings.features, lambda x: to_model(path.whole(x)), True, None)
        max_iter = max(_COARSE_ITER, self.settings.max_iter)
        solution = path.minimum(objective, tol, max_iter, watch)
        return to_model(solution.x), solution

    def objective(
        self,
        alpha: float,
        activation: Tensor | None,
        tangent: TangentTerm | None,
        loss: Loss | None = None,
    ) -> TangentObjective:
        """Return the objective of a model with these terms."""
        return TangentObjective(
            loss or self.loss,
            activation,
            tangent,
            alpha,
            self.settings.fit_intercept,
            len(self.samples.activation),
            self.like,
            self.loss.weights.device,
        )

    def tangent(self, omega: Tensor, gradient_alpha: float) -> TangentTerm:
        """Return the gradient term with the output weights of the first stage."""
        samples = self.samples
        return TangentTerm(
            self.head, samples.batches, omega, gradient_alpha, samples.batch_size, samples.empty
        )

    def second_objective(
        self, first: FirstStage, gradient_alpha: float, origin: Mapping[str, Tensor] | None = None
    ) -> TangentObjective:
        """Return the objective of the second stage.

        ``origin`` is the point, as a displacement from where the penalty is zero; None stands for
        the displacement from the pretrained parameters.
        """
        activation = self.samples.activation if self.settings.features == "full" else None
        tangent, loss = self._term(first, gradient_alpha), self.loss
        origin = self.point if origin is None else origin
        if origin:
            zero = loss.weights.new_zeros(len(self.samples.activation), loss.n_outputs)
            point = self.head.flatten(tuple(origin.values()))
            loss = Shifted(loss, -tangent.add_forward(point, zero))
        return self.objective(first.alpha, activation, tangent, loss)

    def _choose_term(self, first: FirstStage) -> None:
        """Choose between explicit rows and Jacobian products for the second stages of a first."""
        if first.term is None:
            term, samples = self.tangent(first.model.omega, 0.0), self.samples
            n_samples = len(samples.activation)
            first.term = with_rows_if_cheap(term, n_samples, samples.room, samples.room_for_rows)

    def _term(self, first: FirstStage, gradient_alpha: float) -> TangentTerm:
        """Return the gradient term of a second stage."""
        term = first.term or self.tangent(first.model.omega, 0.0)
        return replace(term, alpha=gradient_alpha)

    def _origin(self, gradient_alpha: float, proximal: float) -> Mapping[str, Tensor] | None:
        """Return the point, as a displacement from where the sum of both penalties is smallest.

        The penalties are on the displacement from the pretrained parameters and from the point.
        """
        if not (self.point and proximal):
            return None
        share = gradient_alpha / (gradient_alpha + proximal)
        return {name: share * value for name, value in self.point.items()}

    def _second_unknowns(
        self, model: LinearModel, origin: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the flat vector of the unknowns of the second stage."""
        every = model.total
        if origin is not None:
            every = {name: u + (origin[name] - self.point[name]) for name, u in every.items()}
        moves = self.head.flatten(tuple(every[name] for name in self.parameters))
        if self.settings.features == "full":
            return self._unknowns(model.weights, model.intercept, moves)
        # The intercept of the first stage goes with weights that the model does not have.
        intercept = model.intercept if model.moves else torch.zeros_like(model.intercept)
        return self._unknowns(model.weights[:, :0], intercept, moves)

    def _first_model(self, objective: TangentObjective, x: Tensor) -> LinearModel:
        parts = objective.split(x)
        zero = self.like.new_zeros(())
        unmoved = {name: zero.expand_as(value) for name, value in self.parameters.items()}
        intercept = self._intercept(parts.intercept)
        return LinearModel(parts.weights, intercept, parts.weights, unmoved, self.point)

    def _second_model(
        self,
        objective: TangentObjective,
        first: LinearModel,
        origin: Mapping[str, Tensor] | None,
        x: Tensor,
    ) -> LinearModel:
        parts = objective.split(x)
        full = self.settings.features == "full"
        weights = parts.weights if full else torch.zeros_like(first.weights)
        moves = dict(zip(self.parameters, self.head.displacements(parts.u), strict=True))
        origin = self.point if origin is None else origin
        if origin:
            moves = {name: move - origin[name] for name, move in moves.items()}
        intercept = self._intercept(parts.intercept)
        return LinearModel(weights, intercept, first.omega, moves, self.point)

    def _intercept(self, free: Tensor) -> Tensor:
        """Return the intercept, zeros where the model has none.

        A softmax does not depend on the mean over the classes, so it is subtracted.
        """
        if not self.settings.fit_intercept:
            return self.like.new_zeros(self.loss.n_outputs)
        return free - free.mean() if isinstance(self.loss, Multinomial) else free

    def _unknowns(self, weights: Tensor, intercept: Tensor, u: Tensor) -> Tensor:
        """Return the flat vector of the unknowns, in the layout of the objective."""
        free = intercept if self.settings.fit_intercept else intercept[:0]
        return torch.cat([weights.reshape(-1), free, u])

    def _watch(
        self,
        stage: str,
        to_model: Callable[[Tensor], LinearModel],
        last: bool,
        progress: Progress | None,
    ) -> Watch | None:
        """Return the callback for the solver; only the last stage is reported to callbacks."""
        if progress is None:
            stopped = self._stopped
            return None if stopped is None else lambda *_state: stopped()
        return progress.watch(stage, to_model, self._fitted_attributes if last else None)

    def _fitted_attributes(self, model: LinearModel) -> dict[str, Any]:
        return self.attributes | self.problem.restored(model).attributes()

    def _minimize(
        self,
        stage: str,
        objective: TangentObjective,
        start: Callable[[], Tensor],
        inverses: Inverses,
        baseline: Callable[[], float],
        tol: float,
        watch: Watch | None,
    ) -> Solution:
        """Minimise until the Newton decrement is ``tol`` times the fall below ``baseline()``.

        A run that the journal has is not repeated; neither function is called then.
        Rounding errors of the gradient or the objective also end it. Where Newton steps are
        exact, continue to rounding; this takes one or two more steps.
        """
        found = self.journal.finished(stage, objective, inverses)
        if found is not None:
            return found
        begin, value_at_baseline = [of_first_rank(start())], baseline()
        state = self.journal.state(objective, inverses)
        inverse, coarse = self._inverse(objective, inverses), inverses.coarse(objective)
        eps = torch.finfo(self.like.dtype).eps
        rounding = max(100 * eps**2, torch.finfo(torch.float64).eps)

        def tolerance(share: float, value: float) -> float:
            return max(share * (value_at_baseline - value), rounding * abs(value))

        def callback(iteration: int, value: float, x: Tensor, *decrement: float) -> bool:
            inverses.x = x if keeps else None
            return watch is not None and watch(iteration, value, x, *decrement)

        # Without a checkpoint, which rank 0 writes, nothing else keeps former unknowns in memory.
        keeps = self.journal.keeps or n_ranks() > 1
        inverses.x = None if not keeps else begin[0] if state is None else state.built_at
        wanted = min(tol, _EXACT) if inverses.exact_for(objective) else tol
        solution = minimize(
            objective,
            begin.pop(),
            inverse,
            tolerance=partial(tolerance, wanted),
            max_iter=self.settings.max_iter,
            callback=callback,
            curvature_pairs=inverses.curvature_pairs,
            coarse=lambda inverse: self._retry(partial(coarse, inverse)),
            state=state,
            keep=partial(self.journal.keep, stage, inverses) if keeps else None,
        )
        inverses.learn(solution)
        # `tol` itself is enough, even if the solver missed a stricter tolerance; and no digit of
        # the objective is left to gain where the solver stalled.
        decrement, value = solution.norm**2 / 2, solution.objective_path[-1]
        exhausted = solution.status == "stalled" and decrement <= eps * abs(value)
        reached = exhausted or decrement <= tolerance(max(tol, self.settings.tol), value)
        if reached and solution.status != "interrupted":  # that ends further linearisations
            solution = replace(solution, status="converged")
        self.journal.finish(stage, solution, inverses)
        return solution

    def _inverse(
        self, objective: TangentObjective, inverses: Inverses
    ) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        """Return the function from logits to the approximate inverse Hessian."""
        inverse = self._retry(partial(inverses.at, objective))
        return lambda logits: self._retry(partial(inverse, logits))

    def _retry(self, compute: Callable[[], Result]) -> Result:
        """Return ``compute()``, repeated in smaller batches where memory runs out.

        Ranks that fit together repeat passes alone: ``compute`` adds up sums of all ranks.
        """
        return compute() if n_ranks() > 1 else self.samples.batch_size.retry(compute)


def _is_optimum(
    objective: TangentObjective,
    zero: Tensor,
    inverse: Callable[[Tensor], Callable[[Tensor], Tensor]],
) -> bool:
    """Return whether the gradient at the zero model is rounding noise."""
    logits = objective.forward(zero)
    gradient = objective.adjoint(objective.loss.gradient(logits))
    norm = preconditioned_norm(gradient, inverse(logits))
    eps = torch.finfo(zero.dtype).eps
    noise = 100 * eps * math.sqrt(objective.loss.value(logits) / max(objective.alpha, eps))
    return norm <= noise


def warn_unless_converged(result: FitResult, settings: FitSettings) -> None:
    """Warn of every stage that did not converge, and say what to try."""
    if result.separated:
        warnings.warn(
            "The classes are separable, so without a penalty the loss has no minimum: the weights "
            f"grow until the fit stops. Increase {'=0 and '.join(result.separated)}=0.",
            ConvergenceWarning,
            stacklevel=2,
        )
    if result.unmoved:
        warnings.warn(
            f"The gradient term is zero, although gradient_alpha={result.gradient_alpha:g} is "
            "finite: the loss does not change with the parameters of the gradient layers, or by "
            "less than rounding errors. Choose other gradient_layers, decrease gradient_alpha, or "
            "set gradient_alpha=float('inf') for a model without the term.",
            ConvergenceWarning,
            stacklevel=2,
        )
    for stage, solution in result.solutions.items():
        penalties = "alpha" if stage == "activation" else "alpha, gradient_alpha"
        reached = (
            f"The fit of features={stage!r} stopped after {solution.n_iter} iterations at a "
            f"Newton decrement of {solution.norm**2 / 2:.1e}, before it met "
            f"tol={settings.tol:g}."
        )
        if solution.status == "max_iter":
            advice = f"Increase max_iter={settings.max_iter}, {penalties} or tol."
        elif solution.status == "stalled":
            advice = (
                "Rounding errors allow no further progress. Increase tol or alpha, or set "
                "precision='float64'."
            )
        else:
            continue
        warnings.warn(f"{reached} {advice}", ConvergenceWarning, stacklevel=2)
