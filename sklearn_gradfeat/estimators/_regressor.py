"""The regressor, and the one that chooses its penalties."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import RegressorMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from sklearn_gradfeat.backbones import BackboneLike
from sklearn_gradfeat.data import Preprocess, fit_together, normalized_weights, numeric_targets
from sklearn_gradfeat.estimators._base import BaseGradientFeature
from sklearn_gradfeat.estimators._cross_validation import (
    CrossValidated,
    FoldModel,
    searched,
)
from sklearn_gradfeat.estimators._docstrings import with_shared_text
from sklearn_gradfeat.training import Problem, regression_problem, with_callbacks


@with_shared_text
class GradientFeatureRegressor(RegressorMixin, BaseGradientFeature):
    """Ridge or Huber regression on the activations and gradients of a frozen network.

    The model [1]_ is the first-order approximation of fine-tuning the top layers of a
    pretrained network together with a linear output. With the activation ``f(x)`` and its
    Jacobian ``J(x)`` in the parameters θ₂ of the gradient layers, the predictions are ::

        b + W f(x) + Ω J(x) w₂

    where ``Ω`` is a regression on ``f`` that is fitted first, with the same loss. The predictions
    are linear in the unknowns ``W``, ``b`` and ``w₂``, so the training problem is convex. All
    outputs share ``w₂``. Gradient features are never formed.

    Parameters
    ----------
    %NETWORK%
    loss : {"squared_error", "huber"}, default="squared_error"
        The loss: half the squared error; or Huber's loss, which is half the squared error up to
        ``epsilon`` and linear beyond. It is summed over the outputs and averaged over the
        samples.
    epsilon : float, default=1.35
        The absolute error at which Huber's loss turns linear, in the units of ``y``.
        ``HuberRegressor`` takes it in multiples of its ``scale_`` instead.
    alpha : float or "auto", default="auto"
        L2 penalty: ``alpha / 2`` times the squared norm of ``W``, on a loss that is a
        weighted mean. The ``alpha`` of ``Ridge`` is ``alpha * sample_weight.sum()``.
        %ALPHA_AUTO%
    gradient_alpha : float or "auto", default="auto"
        L2 penalty on ``w₂``. ``w₂`` has no unit: targets ``c * y`` lead to predictions ``c``
        times as large if ``gradient_alpha`` is ``c ** 2`` times as large.
        %GRADIENT_ALPHA_AUTO%
    fit_intercept : bool, default=True
        Whether to fit the intercept, which is not penalised.
    %SOLVER%
    %WARM_START%
    %CHECKPOINT%
    %COMPUTATION%

    Attributes
    ----------
    %VALIDATION_SCORES%
    %MODEL_ATTRIBUTES%

    See Also
    --------
    GradientFeatureRegressorCV : Chooses the penalties by cross-validation.
    GradientFeatureClassifier : The classifier.

    References
    ----------
    %REFERENCES%

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_gradfeat import GradientFeatureRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = make_pipeline(StandardScaler(), GradientFeatureRegressor(random_state=0))
    >>> round(model.fit(X, y).score(X, y), 1)
    0.6
    """

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012
        **BaseGradientFeature._parameter_constraints,
        "loss": [StrOptions({"squared_error", "huber"})],
        "epsilon": [Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        backbone: BackboneLike = None,
        *,
        gradient_layers: str | int | Sequence[str] = "last",
        activation_layer: str | int | Sequence[str] | None = "auto",
        preprocess: Preprocess | str | None = "auto",
        negative_slope: float | None = None,
        features: str = "full",
        n_linearizations: int | str = 1,
        parametrization: str = "ntk",
        loss: str = "squared_error",
        epsilon: float = 1.35,
        alpha: float | str = "auto",
        gradient_alpha: float | str = "auto",
        fit_intercept: bool = True,
        max_iter: int = 100,
        tol: float = 1e-4,
        warm_start: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        feature_store: str | os.PathLike[str] | None = "auto",
        store_dtype: str = "auto",
        device: str | torch.device = "auto",
        precision: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.gradient_layers = gradient_layers
        self.activation_layer = activation_layer
        self.preprocess = preprocess
        self.negative_slope = negative_slope
        self.features = features
        self.n_linearizations = n_linearizations
        self.parametrization = parametrization
        self.loss = loss
        self.epsilon = epsilon
        self.alpha = alpha
        self.gradient_alpha = gradient_alpha
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.checkpoint = checkpoint
        self.batch_size = batch_size
        self.feature_store = feature_store
        self.store_dtype = store_dtype
        self.device = device
        self.precision = precision
        self.random_state = random_state
        self.verbose = verbose

    @fit_together()
    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the linear model.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Tabular data, images, or any other input of the backbone.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Real targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the samples.

        Returns
        -------
        self : GradientFeatureRegressor
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, ``X`` or ``y`` is invalid; the message names it.
        """
        return self._fit(X, y, sample_weight)

    def _problem(self, y: npt.NDArray[Any], sample_weight: Any) -> Problem:
        y = numeric_targets(y)
        epsilon = self.epsilon if self.loss == "huber" else None
        weights = normalized_weights(y, sample_weight)
        return regression_problem(y, weights, epsilon, self.fit_intercept)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return the predictions.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_outputs)
            As many axes as the ``y`` of the fit.
        """
        predictions = self._logits(X)
        return predictions[:, 0] if self._single_output else predictions

    def _output(self) -> nn.Module:
        return nn.Flatten(0) if self._single_output else nn.Identity()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class _FoldRegressor(FoldModel, GradientFeatureRegressor):
    """A regressor of a fold."""


@with_shared_text
class GradientFeatureRegressorCV(CrossValidated, GradientFeatureRegressor):
    """Gradient-feature regressor that chooses its penalties by cross-validation.

    The model [1]_ is that of :class:`GradientFeatureRegressor`, which also chooses its penalties
    by default, in less time. Use this class for folds or a score of your own, or to see the
    scores of a whole grid. For lists of penalties, scores and choice are those of
    :class:`~sklearn.model_selection.GridSearchCV` over that estimator, up to ``tol``, in less
    time: every sample passes through the frozen layers once, the first stage is fitted once for
    each ``alpha``, and every fit starts from the one with the next stronger penalty.

    Parameters
    ----------
    %NETWORK%
    loss : {"squared_error", "huber"}, default="squared_error"
        The loss: half the squared error; or Huber's loss, which is half the squared error up to
        ``epsilon`` and linear beyond. It is summed over the outputs and averaged over the
        samples.
    epsilon : float, default=1.35
        The absolute error at which Huber's loss turns linear, in the units of ``y``.
    %SEARCH%
    cv : int, splitter, iterable or "loo", default=None
        The folds; None is 5. A splitter by groups takes the ``groups`` of ``fit``. ``"loo"``
        scores leave-one-out predictions, which come from one factorisation for each pair of
        penalties without a fit of the second stage. It needs squared errors, at most 4096
        samples times outputs, and gradient layers that are linear and see one vector per
        sample, or convolutions as large as their input. ``Ω`` then comes from all samples.
    scoring : str, callable or None, default=None
        A scorer, as in :class:`~sklearn.model_selection.GridSearchCV`. None takes the negative
        loss of held-out samples; ``score`` then returns R².
    %REFIT%
    fit_intercept : bool, default=True
        Whether to fit the intercept, which is not penalised.
    %SOLVER%
    %CHECKPOINT%
    %COMPUTATION%

    Attributes
    ----------
    %SEARCH_ATTRIBUTES%
    %MODEL_ATTRIBUTES%

    References
    ----------
    %REFERENCES%

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_gradfeat import GradientFeatureRegressorCV
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = GradientFeatureRegressorCV(cv="loo", random_state=0)
    >>> make_pipeline(StandardScaler(), model).fit(X, y).score(X, y) > 0.5
    True
    """

    _fold_class: Callable[[], Any] = _FoldRegressor
    _default_scoring = "r2"
    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012
        **searched(GradientFeatureRegressor._parameter_constraints),
        "cv": ["cv_object", StrOptions({"loo"})],
    }

    def __init__(
        self,
        backbone: BackboneLike = None,
        *,
        gradient_layers: str | int | Sequence[str] = "last",
        activation_layer: str | int | Sequence[str] | None = "auto",
        preprocess: Preprocess | str | None = "auto",
        negative_slope: float | None = None,
        features: str = "full",
        n_linearizations: int | str = 1,
        parametrization: str = "ntk",
        loss: str = "squared_error",
        epsilon: float = 1.35,
        alphas: Any = 5,
        gradient_alphas: Any = 5,
        cv: Any = None,
        scoring: Any = None,
        refit: bool = True,
        n_jobs: int | None = None,
        fit_intercept: bool = True,
        max_iter: int = 100,
        tol: float = 1e-4,
        checkpoint: str | os.PathLike[str] | None = None,
        batch_size: int = 256,
        feature_store: str | os.PathLike[str] | None = "auto",
        store_dtype: str = "auto",
        device: str | torch.device = "auto",
        precision: str = "auto",
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.gradient_layers = gradient_layers
        self.activation_layer = activation_layer
        self.preprocess = preprocess
        self.negative_slope = negative_slope
        self.features = features
        self.n_linearizations = n_linearizations
        self.parametrization = parametrization
        self.loss = loss
        self.epsilon = epsilon
        self.alphas = alphas
        self.gradient_alphas = gradient_alphas
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.n_jobs = n_jobs
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.checkpoint = checkpoint
        self.batch_size = batch_size
        self.feature_store = feature_store
        self.store_dtype = store_dtype
        self.device = device
        self.precision = precision
        self.random_state = random_state
        self.verbose = verbose

    @fit_together()
    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, **params: Any) -> Self:
        """Choose the penalties, and fit the linear model with them.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Tabular data, images, or any other input of the backbone.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Real targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the samples, in fits and in scores.
        **params : dict
            ``groups`` for the splitter. With metadata routing enabled, also other metadata that
            splitter and scorer request.

        Returns
        -------
        self : GradientFeatureRegressorCV
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, ``X`` or ``y`` is invalid; the message names it.
        """
        return self._fit_search(self._tokens(X), y, sample_weight, params)

    def _check_search(self) -> None:
        super()._check_search()
        if not isinstance(self.cv, str):
            return
        if self.loss != "squared_error":
            raise ValueError(
                f"cv='loo' needs loss='squared_error', but loss is {self.loss!r}. Set cv to a "
                "number of folds."
            )
        for name in ("alphas", "gradient_alphas")[: 1 + (self.features != "activation")]:
            if np.min(getattr(self, name)) == 0:
                raise ValueError(
                    f"{name} contains 0, but cv='loo' needs penalties above zero. Replace 0 by a "
                    "small number, or set cv to a number of folds."
                )
