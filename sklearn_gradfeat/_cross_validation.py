"""What the estimators share that choose their penalties by cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.metrics import get_scorer_names
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metadata_routing import _raise_for_params
from sklearn.utils.validation import _check_method_params, _check_sample_weight
from tqdm.auto import tqdm

from sklearn_gradfeat._arrays import Rows
from sklearn_gradfeat._base import BaseGradientFeature
from sklearn_gradfeat._callbacks import FitCallbacks
from sklearn_gradfeat._input import restored_on_error, validate_samples
from sklearn_gradfeat._scoring import ScoringMixin
from sklearn_gradfeat._search import (
    Candidate,
    Grid,
    known_logits,
    left_out_path,
    penalty_path,
    place,
)
from sklearn_gradfeat._stages import Stages
from sklearn_gradfeat._targets import Problem
from sklearn_gradfeat._training import Prepared, warn_of_search
from sklearn_gradfeat.tangent import MAX_ROWS

Folds: TypeAlias = Sequence[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]


class LeftOut(BaseGradientFeature):
    """A model of a fold, to be scored: its logits for the samples left out are known.

    ``one_by_one`` says that they are those of as many models, of which this is none.
    """

    left_out: tuple[Any, npt.NDArray[Any]]
    one_by_one = False

    def _logits(self, X: Any) -> npt.NDArray[Any]:
        """Return the logits; those of other samples go through the network."""
        rows, logits = self.left_out
        if X is rows:
            return logits
        if self.one_by_one:
            raise ValueError(
                "scoring: with cv='loo' a scorer must predict the X that it is given, since every "
                "sample has a model of its own. Set cv to a number of folds."
            )
        return super()._logits(X)


class _Data(NamedTuple):
    """The samples of a search, as they came and as the linear model takes them."""

    X: Any
    y: npt.NDArray[Any]
    weights: npt.NDArray[np.float64] | None
    prepared: Prepared

    def part(self, rows: npt.NDArray[np.intp]) -> tuple[Any, Any]:
        """Return targets and weights of some samples."""
        return self.y[rows], None if self.weights is None else self.weights[rows]


class _Part(NamedTuple):
    """A fold: its problem, rows and samples to score on, and the models to be scored."""

    problem: Problem
    test: npt.NDArray[np.intp]
    samples: Any
    stages: Stages
    candidates: Iterator[Candidate]


def searched(constraints: dict[str, Any]) -> dict[str, Any]:
    """Return the constraints of an estimator with a search for its penalties."""
    kept = {n: c for n, c in constraints.items() if n not in ("alpha", "gradient_alpha")}
    del kept["warm_start"]
    return {
        **kept,
        "alphas": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "gradient_alphas": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "refit": ["boolean"],
    }


class CrossValidated(ScoringMixin, BaseGradientFeature):
    """A mixin with the search; ``_fold_class`` says what models a fold."""

    _fold_class: Callable[[], Any]

    def _fit_search(self, X: Any, y: Any, sample_weight: Any, params: dict[str, Any]) -> Any:
        """Search, fit the best model, and set the fitted attributes all at once."""
        # Groups need no routing. scikit-learn 1.6 has no argument `allow` for them.
        routed = {name: value for name, value in params.items() if name != "groups"}
        _raise_for_params(routed, self, "fit")
        self._check_search()
        with restored_on_error(self, "n_features_in_", "feature_names_in_"):
            X, y = validate_samples(self, X, y)
            problem = self._problem(y, sample_weight)
            to_split, to_score = self._routed(sample_weight, params)
            folds = self._folds(X, y, to_split)
            metadata = (
                params if sample_weight is None else {**params, "sample_weight": sample_weight}
            )
            callbacks = FitCallbacks(self, self.max_iter, X=X, y=y, metadata=metadata)
            if sample_weight is not None:
                sample_weight = _check_sample_weight(sample_weight, y, dtype=np.float64)
            prepared = self._prepare(X)
            data = _Data(X, y, sample_weight, prepared)
            fitted = prepared.attempt(
                lambda part: self._search(data._replace(prepared=part), problem, folds, to_score)
            )
            if self.refit:
                alpha, gradient_alpha = fitted["alpha_"], fitted["gradient_alpha_"] or 0.0
                fitted |= prepared.attempt(
                    lambda part: self._train(part, problem, alpha, gradient_alpha, callbacks)
                )
        self.__dict__.pop("coef_", None)  # without a refit there is no model any more
        self.__dict__.update(fitted)
        callbacks.end()
        return self

    def _folds(self, X: Any, y: npt.NDArray[Any], to_split: dict[str, Any]) -> Folds | None:
        """Return training and test rows of every fold; None to leave every sample out once."""
        if isinstance(self.cv, str):
            if to_split.get("groups") is not None:
                raise ValueError(
                    "groups: cv='loo' leaves samples out one by one, whatever their group. Set cv "
                    "to a splitter that knows groups, such as GroupKFold."
                )
            if y.size > MAX_ROWS:
                raise ValueError(
                    f"cv='loo' takes {MAX_ROWS} samples times outputs at most, but y has shape "
                    f"{y.shape}. Set cv to a number of folds."
                )
            return None
        cv, rows = check_cv(self.cv, y, classifier=is_classifier(self)), np.arange(len(y))
        return [(rows[train], rows[test]) for train, test in cv.split(X, y, **to_split)]

    def _check_search(self) -> None:
        """Refuse lists of anything but penalties."""
        for name in ("alphas", "gradient_alphas"):
            values = np.asarray(getattr(self, name))
            numbers = values.dtype.kind in "iuf" and np.isfinite(values).all()
            if values.ndim > 1 or not values.size or not numbers or values.min() < 0:
                raise ValueError(
                    f"{name} must be a number of penalties, or a list of penalties that are "
                    f"finite and not negative; got {getattr(self, name)!r}."
                )

    @torch.inference_mode(False)
    def _search(
        self, data: _Data, problem: Problem, folds: Folds | None, to_score: dict[str, Any]
    ) -> dict[str, Any]:
        """Score all penalties on all folds; return the fitted attributes that say which is best."""
        grid = place(self.alphas, self.gradient_alphas, data.prepared.stages(problem))
        scores = np.empty((1 if folds is None else len(folds), *grid.shape))
        unfinished = 0
        with tqdm(total=scores.size, unit="model", disable=not self.verbose) as bar:
            for number, part in enumerate(self._parts(data, problem, folds, grid)):
                score = self._score_of(data, part, to_score)
                for candidate in part.candidates:
                    scores[number][candidate.pair] = score(candidate, grid)
                    unfinished += not candidate.converged
                    bar.update()
        warn_of_search(unfinished, scores.size, data.prepared.settings)
        if not np.isfinite(scores).all():
            warnings.warn(
                "One or more of the test scores are non-finite.", UserWarning, stacklevel=2
            )
        # Averaged as in GridSearchCV, so that ties are the same.
        means = np.average(scores.reshape(len(scores), -1).T.copy(), axis=1)
        best = int(np.argmax(np.where(np.isnan(means), -np.inf, means)))
        chosen = grid.parameters(divmod(best, grid.shape[1]))
        return {
            "alphas_": grid.alphas,
            "gradient_alphas_": grid.gradient_alphas,
            "scores_": scores,
            "best_score_": float(means[best]),
            **{f"{name}_": value for name, value in chosen.items()},
        }

    def _parts(
        self, data: _Data, problem: Problem, folds: Folds | None, grid: Grid
    ) -> Iterator[_Part]:
        """Iterate over the folds, with the models to score on each."""
        if folds is None:
            everything = np.arange(len(data.y))
            stages = data.prepared.stages(problem)
            yield _Part(problem, everything, data.X, stages, left_out_path(stages, grid))
            return
        for number, (train, test) in enumerate(folds):
            try:
                fold = self._problem(*data.part(train))
            except ValueError as error:
                raise ValueError(f"Training samples of fold {number}: {error}") from error
            stages = data.prepared.subset(train).stages(fold)
            samples = data.X[test] if isinstance(data.X, np.ndarray) else Rows(data.X, test)
            yield _Part(fold, test, samples, stages, penalty_path(stages, grid))

    def _score_of(
        self, data: _Data, part: _Part, to_score: dict[str, Any]
    ) -> Callable[[Candidate, Grid], float]:
        """Return the function that scores the models of a fold."""
        test, rows = part.test, part.samples
        offset = part.problem.offset(part.stages.loss.n_outputs)
        features = data.prepared.features.subset(test)
        given = _check_method_params(data.X, to_score, indices=test)
        scorer, scored = self._get_scorer(), self._fold_model(data.prepared, part.problem)

        def score(candidate: Candidate, grid: Grid) -> float:
            model = candidate.model.shifted(offset)
            if candidate.logits is None:
                logits = known_logits(features, part.stages.linearized, model).cpu().numpy()
            else:
                logits = candidate.logits.cpu().numpy() + offset
            scored.set_params(**grid.parameters(candidate.pair))
            known = {"left_out": (rows, logits), "one_by_one": candidate.logits is not None}
            vars(scored).update(model.attributes(), **known)
            return float(scorer(scored, rows, data.y[test], **given))

        return score

    def _fold_model(self, prepared: Prepared, problem: Problem) -> Any:
        """Return an estimator of a fold, that a scorer takes for a fitted one."""
        model = self._fold_class()
        known = model.get_params(deep=False)
        parameters = self.get_params(deep=False)
        model.set_params(**{n: v for n, v in parameters.items() if n in known})
        vars(model).update(prepared.attributes | problem.attributes)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                setattr(model, name, getattr(self, name))
        return model

    def _warm_model(self, prepared: Prepared, problem: Problem, n_outputs: int) -> None:
        """Start from nothing: the model is that of the plain estimator with these penalties."""

    def __sklearn_is_fitted__(self) -> bool:
        """Whether there is a model, not just a choice."""
        if hasattr(self, "alpha_") and not hasattr(self, "coef_"):
            raise NotFittedError(
                f"This {type(self).__name__} was fitted with refit=False, so it has penalties but "
                "no model. Set refit=True, or fit the plain estimator with alpha_ and "
                "gradient_alpha_."
            )
        return hasattr(self, "coef_")
