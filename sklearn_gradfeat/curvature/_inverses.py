"""Inverse Hessians of objectives that differ in their penalties, and what they share.

========================  ====================================================================
inverse                   used
========================  ====================================================================
``SampleInverse``         in float64, with few samples (``n_samples * n_outputs <= 4096``) and
                          gradient layers that see each sample once: exact up to the curvature
                          between outputs. Its system has the samples of one process. With
                          explicit rows, for some of the samples of all processes.
``Preconditioner``        otherwise: K-FAC, with a coarse space where that is cheap
========================  ====================================================================

None of the expensive parts depends on the penalties, so all penalties share them:

* the Gram matrix ``Ω J Jᵀ Ωᵀ`` of the samples, all or some, for good;
* the Kronecker factors, until the summed curvature of the loss has changed by a factor of two;
* the coarse space, for good: later preconditioners rescale its curvature;
* the curvature pairs of the last solve, for the next one, which starts at its solution.

Fits to a part of the samples share the factors of the layers with the fit to all of them, up to the
scale. Where there is a coarse space, its minimum takes the place of such a fit.

A checkpoint holds the unknowns at which the factors and the coarse space were computed. A fit that
goes on computes both there again, once it needs them, see :meth:`Inverses.recall`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sklearn_gradfeat.curvature._coarse_path import CoarsePath
from sklearn_gradfeat.curvature._coarse_solve import CoarseSolve
from sklearn_gradfeat.curvature._coarse_space import Subspace, leading_subspace
from sklearn_gradfeat.curvature._explicit_rows import SampledRows
from sklearn_gradfeat.curvature._preconditioner import Curvature, Preconditioner
from sklearn_gradfeat.curvature._sample_space import SampleInverse, tangent_gram
from sklearn_gradfeat.curvature._spectrum import NOT_FINITE
from sklearn_gradfeat.data import n_ranks, number_of_first_rank, sum_over_ranks
from sklearn_gradfeat.linearized import ExplicitTerm, TangentObjective
from sklearn_gradfeat.solvers import CurvaturePairs, Solution, same_curvature

_POWER_ITERATIONS = 6


class Inverses:
    """Inverse Hessians of objectives that differ in their penalties alone.

    Attributes
    ----------
    curvature_pairs : CurvaturePairs or None
        The curvature pairs of the last solve.
    x : tensor or None
        The unknowns of the next logits for which an inverse is asked; the caller sets them, for
        a checkpoint.
    curvature_at, subspace_at : tensor or None
        The unknowns at which the Kronecker factors were computed, and those of the coarse space;
        None where they are not known.
    """

    curvature_pairs: CurvaturePairs | None = None
    x: Tensor | None = None
    curvature_at: Tensor | None = None
    subspace_at: Tensor | None = None

    def __init__(self) -> None:
        self._curvature: Curvature | None = None
        self._gram: Tensor | None = None
        self._gram_is_cheap = True  # until it turns out otherwise
        self._sampled: SampledRows | None = None
        self._subspaces: list[Subspace | None] = []  # empty until one was looked for
        self._alone = False  # whether the coarse space takes the place of all directions
        self._has_solved = False  # in the coarse space
        self._layers_of: Inverses | None = None
        self._missing: TangentObjective | None = None  # of what is computed once it is needed

    @property
    def gram(self) -> Tensor | None:
        """The Gram matrix of the samples, if :meth:`at` found it cheap."""
        return self._gram

    def with_layers(self) -> Inverses:
        """Return inverses with the same factors of the layers, up to the scale.

        They serve a linearisation around another point, or the loss of a part of the samples.
        """
        following = Inverses()
        following._layers_of = self._layers_of or self
        return following

    def learn_layers(self, objective: TangentObjective, x: Tensor) -> bool:
        """Compute the factors and the coarse space at some unknowns, once they are needed.

        Returns
        -------
        bool
            Whether they ever are: not where the rows of the samples give the inverses.
        """
        self.at(objective)
        if self._gram is not None or isinstance(objective.tangent, ExplicitTerm):
            return False
        self._alone = self._alone or not self._subspaces
        if self._layers_of is None and self.subspace_at is None:
            self.curvature_at = self.subspace_at = x
            self._missing = objective
        return True

    def share_of_subspace(self) -> float:
        """Return the share of the parameters whose layers are in the coarse space.

        Call :meth:`learn_layers` before.
        """
        subspace = self._shared_subspace()
        return 0.0 if subspace is None else subspace.share

    def _shared_subspace(self) -> Subspace | None:
        layers_of = self._layers_of or self
        layers_of._restore()
        return layers_of._subspaces[0] if layers_of._subspaces else None

    def coarse_path(
        self, objective: TangentObjective, x: Tensor, logits: Tensor | None = None
    ) -> CoarsePath:
        """Return the minima from ``x`` on in the coarse space of the shared layers.

        ``logits`` are those at ``x``; None computes them.
        """
        logits, self.x = objective.forward(x) if logits is None else logits, x
        curvature = self._preconditioner(objective, logits).curvature
        if not self._subspaces:
            subspace = self._shared_subspace()
            assert subspace is not None
            self._subspaces = [Subspace(objective, subspace.blocks, subspace.total)]
        (own,) = self._subspaces
        assert own is not None
        return CoarsePath(x, logits, own, curvature)

    def recall(
        self,
        objective: TangentObjective,
        curvature_pairs: CurvaturePairs | None,
        curvature_at: Tensor | None,
        subspace_at: Tensor | None,
    ) -> None:
        """Take the place of inverses with these attributes; None stands for no change."""
        self.curvature_pairs = curvature_pairs or self.curvature_pairs
        if curvature_at is not None or subspace_at is not None:
            self.curvature_at = self.curvature_at if curvature_at is None else curvature_at
            self.subspace_at = self.subspace_at if subspace_at is None else subspace_at
            self._has_solved = self.subspace_at is not None
            self._missing = objective

    def _restore(self) -> None:
        """Compute what :meth:`recall` or :meth:`learn_layers` left for later."""
        objective, at = self._missing, None
        if objective is None:
            return
        if self.subspace_at is not None:
            at, curvature = self.subspace_at, self._factors(objective, self.subspace_at)
            self._subspaces = [leading_subspace(objective, curvature, self._alone)]
            self._curvature = curvature
        if self.curvature_at is not None and (at is None or not at.equal(self.curvature_at)):
            self._curvature = self._factors(objective, self.curvature_at)
        self._missing = None

    def _factors(self, objective: TangentObjective, x: Tensor) -> Curvature:
        """Return the Kronecker factors at some unknowns."""
        return Curvature(objective, objective.forward(x), self._known_layers(objective))

    def _known_layers(self, objective: TangentObjective) -> Curvature | None:
        """Return the factors that :meth:`with_layers` gave, if any."""
        if self._layers_of is None or objective.tangent is None:
            return None
        self._layers_of._restore()
        return self._layers_of._curvature

    def at(self, objective: TangentObjective) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
        """Return the function from logits to the inverse Hessian there."""
        wide = objective.like.dtype == torch.float64
        untried = self._gram_is_cheap and self._gram is None and n_ranks() == 1
        if wide and untried and objective.tangent is not None:
            self._gram = tangent_gram(objective.tangent, objective.n_samples)
            self._gram_is_cheap = self._gram is not None
        gram, loss = self._gram, objective.loss
        if gram is not None:
            return lambda logits: SampleInverse(
                objective, gram, loss.curvatures(logits), loss.weights
            )
        if isinstance(objective.tangent, ExplicitTerm):
            self._sampled = self._sampled or SampledRows(objective)
            return functools.partial(self._sampled.inverse, objective)
        return functools.partial(self._preconditioner, objective)

    def exact_for(self, objective: TangentObjective) -> bool:
        """Return whether a Newton step reaches the optimum; call :meth:`at` before."""
        quadratic = (
            objective.loss.quadratic_minimizer is not None and objective.like.dtype == torch.float64
        )
        return quadratic and (objective.tangent is None or self._is_exact)

    @property
    def _is_exact(self) -> bool:
        """Whether the inverse is exact up to the curvature between outputs."""
        sampled = self._sampled
        return self._gram is not None or (sampled is not None and sampled.is_whole)

    def coarse(self, objective: TangentObjective) -> Callable[[Any], CoarseSolve | None]:
        """Return the function from an inverse to the coarse-space solve of an objective."""
        return functools.partial(self._coarse_solve, objective)

    def learn(self, solution: Solution) -> None:
        """Keep the curvature pairs of a solve, unless the inverse is exact."""
        self.curvature_pairs = None if self._is_exact else solution.curvature_pairs

    def _coarse_solve(self, objective: TangentObjective, inverse: Any) -> CoarseSolve | None:
        """Return the coarse-space solve, or None if the inverse is exact or no space is cheap."""
        if objective.tangent is None or not isinstance(inverse, Preconditioner):
            return None
        first, self._has_solved = not self._has_solved, True
        if not self._subspaces:
            self._subspaces = [leading_subspace(objective, inverse.curvature, self._alone)]
            self.subspace_at = self.curvature_at
        (subspace,) = self._subspaces
        return None if subspace is None else CoarseSolve(objective, subspace, inverse, first)

    def _preconditioner(self, objective: TangentObjective, logits: Tensor) -> Preconditioner:
        """Return the K-FAC inverse, with the former Kronecker factors while they hold."""
        self._restore()
        known = self._curvature
        if known is not None and not same_curvature(known.total, objective.loss, logits):
            known = self._curvature = None  # before the matrices of the next are in memory
        layers = self._known_layers(objective) if known is None else None
        if layers is not None:
            known = Curvature(objective, logits, layers)
        inverse = Preconditioner(objective, logits, known)
        if inverse.curvature is not self._curvature:
            self._curvature, self.curvature_at = inverse.curvature, self.x
        return inverse


def largest_curvature(objective: TangentObjective) -> float:
    """Estimate the largest eigenvalue of the Hessian of the loss at zero logits.

    Power iteration approaches it from below. The curvature between outputs is left out. A free
    intercept follows the other unknowns, so the weighted mean over the samples is subtracted,
    and constant columns do not count.

    Raises
    ------
    ValueError
        If it is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(objective.sizes), generator=generator, dtype=torch.float64)
    x = x.to(objective.like)
    logits = objective.forward(torch.zeros_like(x))
    weights = objective.loss.curvatures(logits)
    size = 1.0
    for _ in range(_POWER_ITERATIONS):
        norm = _norm(x)
        if norm == 0:
            return 0.0
        seen = objective.forward(x / norm)
        if objective.fit_intercept:
            mean = sum_over_ranks((weights * seen).sum(0)) / sum_over_ranks(weights.sum(0))
            seen -= mean
            seen[seen.abs() <= 4 * torch.finfo(x.dtype).eps * mean.abs()] = 0  # rounding errors
        x = objective.adjoint(weights * seen)
        size = _norm(x)
        if not math.isfinite(size):
            raise ValueError(NOT_FINITE)
    return number_of_first_rank(size)


def _norm(x: Tensor) -> float:
    """Return the norm of a vector whose squares may leave the range of float64."""
    largest = float(x.abs().max())
    return largest * float((x / largest).norm()) if 0 < largest < math.inf else largest
