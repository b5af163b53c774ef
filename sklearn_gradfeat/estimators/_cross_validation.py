"""The search of the estimators that choose their penalties by cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import check_scoring, get_scorer, get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    _raise_for_params,
    _routing_enabled,
    process_routing,
)
from sklearn.utils.validation import _check_method_params, _check_sample_weight
from tqdm.auto import tqdm

from sklearn_gradfeat.curvature import MAX_ROWS
from sklearn_gradfeat.data import Rows, restored_on_error, validate_samples
from sklearn_gradfeat.estimators._base import BaseGradientFeature
from sklearn_gradfeat.linearized import LinearizedHead, LinearModel, to_numpy
from sklearn_gradfeat.training import (
    Candidate,
    FitSettings,
    Grid,
    Prepared,
    Problem,
    Progress,
    TwoStageFit,
    leave_one_out_path,
    penalty_path,
    place_grid,
    warn_unless_converged,
)

Folds: TypeAlias = Sequence[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]


class FoldModel(BaseGradientFeature):
    """A mixin for the model of a fold, whose logits for the samples to score are known.

    Attributes
    ----------
    known : (array-like, ndarray)
        The samples to score, and their logits.
    leave_one_out : bool
        Whether every logit comes from the model of all other samples.
    """

    known: tuple[Any, npt.NDArray[Any]]
    leave_one_out = False

    def _logits(self, X: Any) -> npt.NDArray[Any]:
        """Return the logits; samples other than the known ones pass through the network."""
        samples, logits = self.known
        if X is samples:
            return logits
        if self.leave_one_out:
            raise ValueError(
                "scoring: with cv='loo' a scorer must predict the X that it receives, since every "
                "sample has a model of its own. Set cv to a number of folds."
            )
        return super()._logits(X)


class _Data(NamedTuple):
    """The samples of a search, as passed and after the frozen layers."""

    X: Any
    y: npt.NDArray[Any]
    weights: npt.NDArray[np.float64] | None
    prepared: Prepared


class _Fold(NamedTuple):
    """The samples to score in a fold, with their row numbers, and the models to score."""

    rows: npt.NDArray[np.intp]
    samples: Any
    stages: TwoStageFit
    candidates: Iterator[Candidate]


def searched(constraints: dict[str, Any]) -> dict[str, Any]:
    """Return the parameter constraints of an estimator that chooses its penalties."""
    dropped = ("alpha", "gradient_alpha", "warm_start")
    return {
        **{name: value for name, value in constraints.items() if name not in dropped},
        "alphas": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "gradient_alphas": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "refit": ["boolean"],
    }


class CrossValidated(BaseGradientFeature):
    """A mixin that adds the search for the best penalties.

    A subclass sets the class of fold models, and the scorer for ``scoring=None``.
    """

    _fold_class: Callable[[], Any]
    _default_scoring: str

    @torch.inference_mode(False)
    def _fit_search(self, X: Any, y: Any, sample_weight: Any, params: dict[str, Any]) -> Self:
        """Search, fit the best model, and set the fitted attributes."""
        # Groups need no routing. scikit-learn 1.6 has no argument `allow` for them.
        routed = {name: value for name, value in params.items() if name != "groups"}
        _raise_for_params(routed, self, "fit")
        self._check_search()
        with restored_on_error(self, "n_features_in_", "feature_names_in_"):
            X, y = validate_samples(self, X, y)
            problem = self._problem(y, sample_weight)
            to_split, to_score = self._routed(sample_weight, params)
            folds = self._folds(X, y, to_split)
            weights = {} if sample_weight is None else {"sample_weight": sample_weight}
            if sample_weight is not None:
                sample_weight = _check_sample_weight(sample_weight, y, dtype=np.float64)
            with Progress(self, X=X, y=y, metadata={**params, **weights}) as progress:
                prepared = self._prepare(X)
                stages = TwoStageFit(prepared, problem)
                grid = place_grid(self.alphas, self.gradient_alphas, stages)
                data = _Data(X, y, sample_weight, prepared)
                models = self._fold_models(grid, data, stages, folds)
                n_folds = 1 if folds is None else len(folds)
                fitted = self._search(grid, data, models, n_folds, to_score)
                if self.refit:
                    # Without what the search learned: the plain estimator has the same bits.
                    stages = TwoStageFit(prepared, problem)
                    alpha, gradient_alpha = fitted["alpha_"], fitted["gradient_alpha_"] or 0.0
                    result = stages.fit(alpha, gradient_alpha, progress=progress)
                    warn_unless_converged(result, prepared.settings)
                    fitted |= prepared.attributes | problem.attributes | result.attributes()
        self.__dict__.pop("coef_", None)  # without a refit there is no model any more
        self.__dict__.update(fitted)
        progress.end()
        return self

    def _check_search(self) -> None:
        """Raise an error unless the penalties are numbers that are finite and not negative."""
        for name in ("alphas", "gradient_alphas"):
            values = np.asarray(getattr(self, name))
            numbers = values.dtype.kind in "iuf" and np.isfinite(values).all()
            if values.ndim > 1 or not values.size or not numbers or values.min() < 0:
                raise ValueError(
                    f"{name} must be a number of penalties, or a list of penalties that are "
                    f"finite and not negative; got {getattr(self, name)!r}."
                )

    def _folds(self, X: Any, y: npt.NDArray[Any], to_split: dict[str, Any]) -> Folds | None:
        """Return training and test rows of every fold; None for leave-one-out."""
        if isinstance(self.cv, str):
            if to_split.get("groups") is not None:
                raise ValueError(
                    "groups: cv='loo' leaves out single samples and ignores groups. Set cv to a "
                    "splitter that uses groups, such as GroupKFold."
                )
            if y.size > MAX_ROWS:
                raise ValueError(
                    f"cv='loo' takes at most {MAX_ROWS} samples times outputs, but y has shape "
                    f"{y.shape}. Set cv to a number of folds."
                )
            return None
        cv, rows = check_cv(self.cv, y, classifier=is_classifier(self)), np.arange(len(y))
        return [(rows[train], rows[test]) for train, test in cv.split(X, y, **to_split)]

    def _fold_models(
        self, grid: Grid, data: _Data, stages: TwoStageFit, folds: Folds | None
    ) -> Iterator[_Fold]:
        """Iterate over the folds, each with the models to score."""
        if folds is None:
            path = leave_one_out_path(stages, grid)
            yield _Fold(np.arange(len(data.y)), data.X, stages, path)
            return
        for number, (train, test) in enumerate(folds):
            weights = None if data.weights is None else data.weights[train]
            try:
                problem = self._problem(data.y[train], weights)
            except ValueError as error:
                raise ValueError(f"Training samples of fold {number}: {error}") from error
            of_fold = TwoStageFit(data.prepared.subset(train), problem)
            samples = data.X[test] if isinstance(data.X, np.ndarray) else Rows(data.X, test)
            yield _Fold(test, samples, of_fold, penalty_path(of_fold, grid))

    def _search(
        self,
        grid: Grid,
        data: _Data,
        folds: Iterator[_Fold],
        n_folds: int,
        to_score: dict[str, Any],
    ) -> dict[str, Any]:
        """Score all penalties on all folds; return the attributes with scores and choice."""
        scores, unfinished = np.empty((n_folds, *grid.shape)), 0
        with tqdm(total=scores.size, unit="model", disable=not self.verbose) as bar:
            for number, fold in enumerate(folds):
                model = self._fold_model(data.prepared, fold.stages.problem)
                for candidate in fold.candidates:
                    model.set_params(**grid.parameters(candidate.pair))
                    score = self._score(model, candidate, fold, data, to_score)
                    scores[number][candidate.pair] = score
                    unfinished += not candidate.converged
                    bar.update()
        _warn_of_search(unfinished, scores, data.prepared.settings)
        # Averaged as in GridSearchCV, so that ties are the same.
        means = np.average(scores.reshape(n_folds, -1).T.copy(), axis=1)
        best = int(np.argmax(np.where(np.isnan(means), -np.inf, means)))
        chosen = grid.parameters(divmod(best, grid.shape[1]))
        return {
            "alphas_": grid.alphas,
            "gradient_alphas_": grid.gradient_alphas,
            "scores_": scores,
            "best_score_": float(means[best]),
            **{f"{name}_": value for name, value in chosen.items()},
        }

    def _score(
        self, model: Any, candidate: Candidate, fold: _Fold, data: _Data, to_score: dict[str, Any]
    ) -> float:
        """Return the score of one model on the samples of its fold."""
        logits = candidate.logits
        if logits is None:
            samples = data.prepared.subset(fold.rows)
            logits = _cached_logits(candidate.model, samples)
        model.known = fold.samples, to_numpy(logits)
        model.leave_one_out = candidate.logits is not None
        vars(model).update(candidate.model.attributes())
        given = _check_method_params(data.X, to_score, indices=fold.rows)
        try:
            return float(self._get_scorer()(model, fold.samples, data.y[fold.rows], **given))
        except AttributeError as error:
            if "proba" not in str(error):
                raise
            raise ValueError(
                f"scoring={self.scoring!r} needs probabilities, which are not available with "
                f"loss={self.loss!r}. Set loss='log_loss', or a scoring without probabilities."
            ) from error

    def _fold_model(self, prepared: Prepared, problem: Problem) -> Any:
        """Return an estimator that scorers accept as fitted."""
        model = self._fold_class()
        known = model.get_params(deep=False)
        parameters = self.get_params(deep=False)
        model.set_params(**{n: v for n, v in parameters.items() if n in known})
        vars(model).update(prepared.attributes | problem.attributes)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                setattr(model, name, getattr(self, name))
        return model

    def _get_scorer(self) -> Any:
        """Return the scorer; the default scorer takes the weights of the samples."""
        if self.scoring is not None:
            return check_scoring(self, scoring=self.scoring)
        scorer = get_scorer(self._default_scoring)
        return scorer.set_score_request(sample_weight=True) if _routing_enabled() else scorer

    def _routed(
        self, sample_weight: Any, params: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the metadata for the splitter and for the scorer."""
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        if not _routing_enabled():
            return params, weights
        routed = process_routing(self, "fit", **weights, **params)
        return routed["splitter"]["split"], routed["scorer"]["score"]

    def score(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> float:
        """Return the score of the predictions, by ``scoring``.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.
        y : array-like
            Their targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples.
        **params : dict
            Metadata for the scorer, where metadata routing is enabled.

        Returns
        -------
        float
        """
        _raise_for_params(params, self, "score")
        given = params if sample_weight is None else {**params, "sample_weight": sample_weight}
        if _routing_enabled():
            given = process_routing(self, "score", **given)["scorer"]["score"]
        return float(self._get_scorer()(self, X, y, **given))

    def get_metadata_routing(self) -> Any:
        """Return the routing of metadata: groups to the splitter, weights to fits and scores.

        Returns
        -------
        MetadataRouter
        """
        to_split = MethodMapping().add(caller="fit", callee="split")
        to_score = MethodMapping().add(caller="fit", callee="score")
        to_score.add(caller="score", callee="score")
        router = MetadataRouter(owner=self).add_self_request(self)
        router.add(splitter=self.cv, method_mapping=to_split)
        return router.add(scorer=self._get_scorer(), method_mapping=to_score)

    def __sklearn_is_fitted__(self) -> bool:
        """Return whether there is a model, not only a choice of penalties."""
        if hasattr(self, "alpha_") and not hasattr(self, "coef_"):
            raise NotFittedError(
                f"This {type(self).__name__} was fitted with refit=False, so it has penalties but "
                "no model. Set refit=True, or fit the plain estimator with alpha_ and "
                "gradient_alpha_."
            )
        return hasattr(self, "coef_")


def _cached_logits(model: LinearModel, prepared: Prepared) -> torch.Tensor:
    """Return the logits of samples that have passed the frozen layers."""
    samples, network = prepared.samples, prepared.network
    head = LinearizedHead.from_network(network)

    def compute() -> torch.Tensor:
        logits = samples.activation.new_empty(len(samples.activation), len(model.intercept))
        for rows, boundary in samples.batches() if model.displacements else [(slice(None), ())]:
            logits[rows] = model.logits(head, boundary, samples.activation[rows])
        return logits

    return samples.batch_size.retry(compute)


def _warn_of_search(
    unfinished: int, scores: npt.NDArray[np.float64], settings: FitSettings
) -> None:
    """Warn once of all fits that did not converge, and of scores that are not finite."""
    if unfinished:
        warnings.warn(
            f"{unfinished} of {scores.size} fits of the search stopped before they met "
            f"tol={settings.tol:g}, so their scores are not those of the optimum. Increase "
            f"max_iter={settings.max_iter} or tol, or drop the smallest penalties.",
            ConvergenceWarning,
            stacklevel=2,
        )
    if not np.isfinite(scores).all():
        warnings.warn("One or more of the test scores are non-finite.", UserWarning, stacklevel=2)
