"""The search of the estimators that choose their penalties by cross-validation."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from numbers import Integral
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt
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
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import _check_method_params
from tqdm.auto import tqdm

from sklearn_gradfeat.backbones import neutral_state
from sklearn_gradfeat.curvature import MAX_ROWS, Inverses
from sklearn_gradfeat.data import (
    Ranks,
    Rows,
    alone,
    n_ranks,
    plain_weights,
    restored_on_error,
    validate_samples,
)
from sklearn_gradfeat.estimators._base import BaseGradientFeature
from sklearn_gradfeat.estimators._checkpointing import open_checkpoint_of_search
from sklearn_gradfeat.estimators._same_on_ranks import check_same_on_ranks, check_same_samples
from sklearn_gradfeat.linearized import to_numpy
from sklearn_gradfeat.training import (
    Candidate,
    CoarseFits,
    FitSettings,
    Journal,
    Pair,
    Prepared,
    Problem,
    Progress,
    Tried,
    TwoStageFit,
    cached_logits,
    fit_in_turn,
    leave_one_out_path,
    penalty_path,
    search_grid,
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


class _FoldScores(NamedTuple):
    """The scores of a fold, and its fits without an optimum.

    ``unfinished`` counts those that did not converge. ``separated`` has the penalties to increase
    for each of those that separate the classes.
    """

    scores: dict[Pair, float]
    unfinished: int
    separated: list[tuple[str, ...]]


class _Data(NamedTuple):
    """The samples of a search, as passed and after the frozen layers; metadata for the scorer."""

    X: Any
    y: npt.NDArray[Any]
    weights: npt.NDArray[np.float64] | None
    prepared: Prepared
    problem: Problem
    to_score: dict[str, Any]
    journals: list[Journal]  # one for each fold, or for leave-one-out


def searched(constraints: dict[str, Any]) -> dict[str, Any]:
    """Return the parameter constraints of an estimator that chooses its penalties."""
    dropped = ("alpha", "gradient_alpha", "warm_start")
    return {
        **{name: value for name, value in constraints.items() if name not in dropped},
        "n_linearizations": [Interval(Integral, 1, None, closed="left")],
        "alphas": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "gradient_alphas": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "cv": ["cv_object"],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "refit": ["boolean"],
        "n_jobs": [None, Integral],
    }


class CrossValidated(BaseGradientFeature):
    """A mixin that adds the search for the best penalties.

    A subclass sets the class of fold models, and the scorer of ``score`` for ``scoring=None``; the
    search takes the negative loss then.
    """

    _fold_class: Callable[[], Any]
    _default_scoring: str

    @neutral_state()
    def _fit_search(self, X: Any, y: Any, sample_weight: Any, params: dict[str, Any]) -> Self:
        """Search, fit the best model, and set the fitted attributes."""
        # Groups need no routing. scikit-learn 1.6 has no argument `allow` for them.
        routed = {name: value for name, value in params.items() if name != "groups"}
        _raise_for_params(routed, self, "fit")
        self._check_search()
        with restored_on_error(self, "n_features_in_", "feature_names_in_"):
            X, y = validate_samples(self, X, y)
            check_same_on_ranks(self, X, sample_weight, fitted=False)
            check_same_samples(self, y=y, sample_weight=sample_weight)
            with alone():
                problem = self._problem(y, sample_weight)
            to_split, to_score = self._routed(sample_weight, params)
            folds = self._folds(X, y, to_split)
            check_same_samples(self, cv=folds)
            weights = {} if sample_weight is None else {"sample_weight": sample_weight}
            if sample_weight is not None:
                sample_weight = plain_weights(sample_weight, y)
            with alone() as ranks:
                checkpoint = open_checkpoint_of_search(
                    self, X, y, problem.weights, ranks, folds, to_score
                )
            with Progress(self, X=X, y=y, metadata={**params, **weights}) as progress:
                # Scales of activation layers, which use no labels, come from all samples. Their
                # weights add up to one over all ranks, each of which passes all samples.
                prepared = self._prepare(X, problem.weights / n_ranks(), checkpoint)
                check_same_samples(self, X=prepared.samples.names)
                with alone() as ranks:
                    journals = [Journal() for _ in range(1 + len(folds or [None]))]
                    if checkpoint is not None:
                        journals = checkpoint.journals(prepared.samples.activation, len(journals))
                    prepared, journals = prepared._replace(journal=journals[0]), journals[1:]
                    data = _Data(X, y, sample_weight, prepared, problem, to_score, journals)
                    fitted = self._search(data, folds, ranks)
                    if self.refit:
                        fitted |= prepared.attributes | problem.attributes
                        fitted |= self._refitted(data, fitted, progress, ranks)
        self.__dict__.pop("coef_", None)  # without a refit there is no model any more
        self.__dict__.update(fitted)
        progress.end()
        if checkpoint is not None:
            checkpoint.remove()
        return self

    def _refitted(
        self, data: _Data, chosen: dict[str, Any], progress: Progress, ranks: Ranks
    ) -> dict[str, Any]:
        """Return the attributes of the model with the chosen penalties."""
        # Without what the search learned: the plain estimator has the same bits.
        stages, n = TwoStageFit(data.prepared, data.problem), self.n_linearizations
        fit = stages.fit if n == 1 else partial(fit_in_turn, stages, n_models=2 * n)
        result = fit(chosen["alpha_"], chosen["gradient_alpha_"], progress=progress)
        warn_unless_converged(result, data.prepared.settings)
        # Other processors have other last bits.
        of_first: dict[str, Any]
        of_first, *_ = ranks.gather(None if ranks.rank else result.attributes())
        return of_first

    def _check_search(self) -> None:
        """Raise an error unless the search is possible and the penalties are allowed."""
        if self.n_linearizations > 1 and isinstance(self.cv, str):
            raise ValueError(
                f"cv='loo' has a closed form for one linearisation alone, and n_linearizations="
                f"{self.n_linearizations}. Set cv to a number of folds."
            )
        for name in ("alphas", "gradient_alphas"):
            values = np.asarray(getattr(self, name))
            numbers = values.dtype.kind in "iuf" and not np.isnan(values).any()
            infinite_is_allowed = name == "gradient_alphas" and self.features != "gradient"
            if numbers and not infinite_is_allowed:
                numbers = bool(np.isfinite(values).all())
            if values.ndim > 1 or not values.size or not numbers or values.min() < 0:
                raise ValueError(
                    f"{name} must be a number of penalties, or a list of penalties that are not "
                    "negative; all are finite, except that infinity in gradient_alphas stands for "
                    f"no gradient term unless features='gradient'. Got {getattr(self, name)!r}."
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
        # Passes read the samples of a fold in the order of their file.
        return [(np.sort(rows[train]), rows[test]) for train, test in cv.split(X, y, **to_split)]

    def _search(self, data: _Data, folds: Folds | None, ranks: Ranks) -> dict[str, Any]:
        """Score pairs of penalties on all folds; return the attributes with scores and choice.

        Each rank scores some of the folds. Rank 0 chooses the pairs that all of them try.
        """
        numbered: list[Any] = [None] if folds is None else list(enumerate(folds))
        scores: dict[Pair, list[float]] = {}
        unfinished = 0
        separated: list[tuple[str, ...]] = []
        stages = TwoStageFit(data.prepared, data.problem)
        stop, running = threading.Event(), [threading.RLock() for _ in numbered]

        def score_fold(i: int, pairs: Sequence[Pair], inverses: Inverses | None) -> _FoldScores:
            with running[i]:
                return self._score_fold(numbered[i], pairs, data, bar, stop, inverses)

        own = range(ranks.rank, len(numbered), ranks.size)

        @cache
        def inverses_at(alpha: float) -> Inverses | None:
            """Return the inverses of the coarse space, None if fits take its place."""
            if folds is None or self.n_linearizations > 1:
                return None
            shared = stages.shared(stages.fit_activation(alpha))
            return shared[0] if shared is not None and shared[1] else None

        def try_pairs(space: float | None, pairs: Sequence[Pair]) -> None:
            nonlocal unfinished
            inverses = None if space is None else inverses_at(space)
            new = [pair for pair in dict.fromkeys(pairs) if pair not in scores]
            if new:
                if bar is not None:
                    bar.total = (bar.total or 0) + len(new) * len(own)
                    bar.refresh()
                work = (delayed(score_fold)(i, new, inverses) for i in own)
                try:
                    part = Parallel(n_jobs=self.n_jobs, require="sharedmem")(work)
                except BaseException:  # joblib does not wait for threads that still run
                    stop.set()
                    for lock in running:
                        with lock:
                            pass
                    raise
                parts = ranks.gather(part)
                found = [parts[i % ranks.size][i // ranks.size] for i in range(len(numbered))]
                scores.update((pair, [fold.scores[pair] for fold in found]) for pair in new)
                unfinished += sum(fold.unfinished for fold in found)
                separated.extend(names for fold in found for names in fold.separated)

        def evaluate(space: float | None, pairs: Sequence[Pair]) -> dict[Pair, float]:
            ranks.gather((space, pairs))
            try_pairs(space, pairs)
            # Averaged as in GridSearchCV, so that ties are the same.
            means = np.average(np.array(list(scores.values())), axis=1)
            return dict(zip(scores, means.tolist(), strict=True))

        # A disabled bar would take a lock that forks share.
        with tqdm(desc="search", unit="fit") if self.verbose else nullcontext() as bar:
            if ranks.rank == 0:
                tried = search_grid(self.alphas, self.gradient_alphas, stages, evaluate)
                ranks.gather(tried)
            else:
                while not isinstance(tried := ranks.gather(None)[0], Tried):
                    try_pairs(*tried)
        table = np.full((len(numbered), len(tried.alphas), len(tried.gradient_alphas)), np.nan)
        for i, alpha in enumerate(tried.alphas):
            for j, gradient_alpha in enumerate(tried.gradient_alphas):
                table[:, i, j] = scores.get((alpha, gradient_alpha), np.nan)
        _warn_of_search(unfinished, separated, list(scores.values()), data.prepared.settings)
        for name, best in zip(("alphas", "gradient_alphas"), tried.best, strict=True):
            _warn_at_edge(name, getattr(self, name), best)
        return {
            "alphas_": np.array(tried.alphas),
            "gradient_alphas_": np.array(tried.gradient_alphas),
            "scores_": table,
            "best_score_": float(np.average(np.array(scores[tried.best]))),
            "alpha_": tried.best[0],
            "gradient_alpha_": tried.best[1],
        }

    @neutral_state()
    def _score_fold(
        self,
        fold: Any,
        pairs: Sequence[Pair],
        data: _Data,
        bar: Any,
        stop: threading.Event,
        inverses: Inverses | None,
    ) -> _FoldScores:
        """Return the scores of one fold, and the fits without an optimum.

        With ``inverses``, models with a gradient term are minima over their coarse space.
        """
        journal = data.journals[0 if fold is None else fold[0]]
        data = data._replace(prepared=data.prepared._replace(journal=journal))
        if fold is None:
            stages, rows, samples = (
                TwoStageFit(data.prepared, data.problem), np.arange(len(data.y)), data.X
            )  # fmt: skip
            candidates = leave_one_out_path(stages, pairs)
        else:
            number, (train, rows) = fold
            problem = self._fold_problem(data, train, number)
            scored = (
                data.problem.weights if self.scoring is None else data.to_score.get("sample_weight")
            )
            if scored is not None:
                _check_weights(f"Held-out samples of fold {number}", np.asarray(scored)[rows])
            stages = TwoStageFit(data.prepared.subset(train), problem, stop.is_set)
            samples = data.X[rows] if isinstance(data.X, np.ndarray) else Rows(data.X, rows)
            coarse = None
            if inverses is not None:
                coarse = _coarse_fits(data, problem, train, rows, stop, inverses)
            candidates = penalty_path(stages, pairs, coarse)
        score = self._scorer_of_fold(stages.problem, rows, samples, data)
        scores: dict[Pair, float] = {}
        unfinished, separated = 0, []
        for candidate in candidates:
            if stop.is_set():
                break
            scores[candidate.pair] = journal.number("score", partial(score, candidate))
            if candidate.separated:
                separated.append(candidate.separated)
            else:
                unfinished += not candidate.converged
            if bar is not None:
                bar.update()
        return _FoldScores(scores, unfinished, separated)

    def _fold_problem(self, data: _Data, train: npt.NDArray[np.intp], number: int) -> Problem:
        """Return the problem of the training samples of a fold."""
        weights = None if data.weights is None else data.weights[train]
        try:
            found = self._problem(data.y[train], weights)
        except ValueError as error:
            raise ValueError(f"Training samples of fold {number}: {error}") from error
        if self.scoring is not None:
            return found
        _check_weights(f"Training samples of fold {number}", data.problem.weights[train])
        return data.problem.subset(train)  # with all classes, those too that the fold lacks

    def _scorer_of_fold(
        self, problem: Problem, rows: npt.NDArray[np.intp], samples: Any, data: _Data
    ) -> Callable[[Candidate], float]:
        """Return the function from a model to its score on the held-out samples of a fold."""
        held = data.prepared.subset(rows)
        if self.scoring is None:
            of_rows = TwoStageFit(held, data.problem.subset(rows))
            return partial(_negative_loss, of_rows, held)
        model = self._fold_model(data.prepared, problem)
        given = _check_method_params(data.X, data.to_score, indices=rows)
        scorer = self._get_scorer()

        def score(candidate: Candidate) -> float:
            model.set_params(**dict(zip(("alpha", "gradient_alpha"), candidate.pair, strict=True)))
            logits = candidate.logits
            if logits is None:
                logits = cached_logits(candidate.model, held)
            model.known = samples, to_numpy(logits)
            model.leave_one_out = isinstance(self.cv, str)
            vars(model).update(candidate.model.attributes())
            try:
                return float(scorer(model, samples, data.y[rows], **given))
            except AttributeError as error:
                if "proba" not in str(error):
                    raise
                raise ValueError(
                    f"scoring={self.scoring!r} needs probabilities, which are not available with "
                    f"loss={self.loss!r}. Set loss='log_loss', or a scoring without probabilities."
                ) from error

        return score

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
        """Return the scorer; the one of ``scoring=None`` takes the weights of the samples."""
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


def _coarse_fits(
    data: _Data,
    problem: Problem,
    train: npt.NDArray[np.intp],
    test: npt.NDArray[np.intp],
    stop: threading.Event,
    inverses: Inverses,
) -> CoarseFits | None:
    """Return the minima in place of fits to a fold; None if the fold lacks classes."""
    both = np.union1d(train, test)
    weights = np.bincount(train, problem.weights, minlength=len(data.y))[both]
    of_both = data.problem.subset(both, weights)
    if len(of_both.offset) != len(problem.offset):
        return None
    stages = TwoStageFit(data.prepared.subset(both), of_both, stop.is_set)
    return CoarseFits(stages, np.searchsorted(both, test), inverses)


def _check_weights(samples: str, weights: npt.NDArray[np.float64]) -> None:
    """Raise an error if the weights of some samples add up to zero."""
    if not weights.sum() > 0:
        raise ValueError(
            f"{samples}: sample_weight adds up to zero, or to nothing beside the largest weight. "
            "Leave out samples without a weight, or set cv to folds that all have some."
        )


def _negative_loss(stages: TwoStageFit, held: Prepared, candidate: Candidate) -> float:
    """Return the negative mean loss of held-out samples."""
    logits = candidate.logits
    if logits is None:
        model = stages.problem.reduced(candidate.model)
        logits = cached_logits(model, held)
    else:
        logits = logits - logits.new_tensor(stages.problem.offset)
    return -stages.loss.value(logits.to(stages.loss.weights))


def _warn_at_edge(name: str, given: Any, best: float) -> None:
    """Warn if the best of three or more given penalties is the smallest or the largest one."""
    if isinstance(given, Integral) or len(given) < 3 or best not in (min(given), max(given)):
        return
    if np.isfinite(best):
        warnings.warn(
            f"The best of {name} is {best:.3g}, at an end of the list. A better one may lie "
            f"beyond: pass more {name} there, or a number of penalties, which extends itself.",
            UserWarning,
            stacklevel=2,
        )


def _warn_of_search(
    unfinished: int,
    separated: list[tuple[str, ...]],
    scores: list[list[float]],
    settings: FitSettings,
) -> None:
    """Warn once of all fits without an optimum, and of scores that are not finite."""
    if separated:
        names = " and ".join(f"{name}s" for name in sorted(set(itertools.chain(*separated))))
        warnings.warn(
            f"In {len(separated)} of {np.size(scores)} fits of the search, the classes are "
            "separable, so without a penalty the loss has no minimum, and the score depends on "
            f"where the fit stopped. Leave 0 out of {names}.",
            ConvergenceWarning,
            stacklevel=2,
        )
    if unfinished:
        warnings.warn(
            f"{unfinished} of {np.size(scores)} fits of the search stopped before they met "
            f"tol={settings.tol:g}, so their scores are not those of the optimum. Increase "
            f"max_iter={settings.max_iter} or tol, or drop the smallest penalties.",
            ConvergenceWarning,
            stacklevel=2,
        )
    if not np.isfinite(scores).all():
        warnings.warn("One or more of the test scores are non-finite.", UserWarning, stacklevel=2)
