"""The classifier, and the one that chooses its penalties."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import available_if
from torch import nn

from sklearn_gradfeat.backbones import BackboneLike
from sklearn_gradfeat.data import Preprocess, encode_classes, fit_together, normalized_weights
from sklearn_gradfeat.estimators._base import BaseGradientFeature
from sklearn_gradfeat.estimators._cross_validation import (
    CrossValidated,
    FoldModel,
    searched,
)
from sklearn_gradfeat.estimators._docstrings import with_shared_text
from sklearn_gradfeat.io import TwoClasses
from sklearn_gradfeat.training import Problem, classification_problem, with_callbacks


def _has_probabilities(estimator: Any) -> bool:
    """Return True if there are probabilities, or raise an error that says how to get them."""
    if estimator.loss == "log_loss":
        return True
    raise AttributeError(
        f"Probabilities are not available with loss={estimator.loss!r}. Set loss='log_loss', or "
        "wrap the estimator in sklearn.calibration.CalibratedClassifierCV."
    )


@with_shared_text
class GradientFeatureClassifier(ClassifierMixin, BaseGradientFeature):
    """Logistic regression on the activations and gradients of a frozen network.

    The model [1]_ is the first-order approximation of fine-tuning the top layers of a
    pretrained network together with its classifier. With the activation ``f(x)`` and its
    Jacobian ``J(x)`` in the parameters θ₂ of the gradient layers, the logits are ::

        b + W f(x) + Ω J(x) w₂

    where ``Ω`` is a logistic regression on ``f`` that is fitted first. The logits are linear in
    the unknowns ``W``, ``b`` and ``w₂``, so the training problem is convex and has one optimum.
    Gradient features are never formed: ``J w₂`` is a Jacobian-vector product that costs about
    as much as the gradient layers themselves, for 2 classes or 2000.

    Parameters
    ----------
    %NETWORK%
    loss : {"log_loss", "squared"}, default="log_loss"
        The loss: cross-entropy; or half the squared error to targets of 1 for the class or the
        labels of a sample and -1 for all others. With ``"squared"`` there are no probabilities.
    alpha : float or "auto", default="auto"
        L2 penalty: ``alpha / 2`` times the squared norm of ``W``, on a loss that is a
        weighted mean. The ``C`` of scikit-learn is ``1 / (alpha * sample_weight.sum())``.
        %ALPHA_AUTO%
    gradient_alpha : float or "auto", default="auto"
        L2 penalty on ``w₂``.
        %GRADIENT_ALPHA_AUTO%
    fit_intercept : bool, default=True
        Whether to fit the intercept, which is not penalised.
    class_weight : dict, "balanced", list of dict or None, default=None
        Factors on the weights of the samples by class, as in scikit-learn.
    %SOLVER%
    %WARM_START%
    %CHECKPOINT%
    %COMPUTATION%

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,) or (n_labels,)
        The classes; for multilabel targets the numbers of the columns.
    %VALIDATION_SCORES%
    %MODEL_ATTRIBUTES%

    See Also
    --------
    GradientFeatureClassifierCV : Chooses the penalties by cross-validation.
    GradientFeatureRegressor : The regressor.

    References
    ----------
    %REFERENCES%

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_gradfeat import GradientFeatureClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> model = make_pipeline(StandardScaler(), GradientFeatureClassifier(random_state=0))
    >>> round(model.fit(X, y).score(X, y), 1)
    1.0
    """

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012
        **BaseGradientFeature._parameter_constraints,
        "loss": [StrOptions({"log_loss", "squared"})],
        "class_weight": [None, dict, list, StrOptions({"balanced"})],
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
        loss: str = "log_loss",
        alpha: float | str = "auto",
        gradient_alpha: float | str = "auto",
        fit_intercept: bool = True,
        class_weight: Any = None,
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
        self.alpha = alpha
        self.gradient_alpha = gradient_alpha
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
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
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            The class of every sample; or, for multilabel targets, an indicator matrix of zeros
            and ones.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the samples.

        Returns
        -------
        self : GradientFeatureClassifier
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, ``X`` or ``y`` is invalid; the message names it.
        """
        return self._fit(X, y, sample_weight)

    def _problem(self, y: npt.NDArray[Any], sample_weight: Any) -> Problem:
        classes, targets = encode_classes(y)
        weights = normalized_weights(y, sample_weight, self.class_weight)
        return classification_problem(classes, targets, weights, self.loss)

    def decision_function(self, X: Any) -> npt.NDArray[Any]:
        """Return the logits.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.

        Returns
        -------
        ndarray of shape (n_samples,), (n_samples, n_classes) or (n_samples, n_labels)
            For two classes, the logit of ``classes_[1]``.
        """
        logits = self._logits(X)
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Return the most probable class, or the labels with a probability above one half.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_labels)
            Classes, or an indicator matrix.
        """
        logits = self._logits(X)
        if self._multilabel:
            return (logits > 0).astype(int)
        one_output = logits.shape[1] == 1
        chosen = (logits[:, 0] > 0).astype(int) if one_output else logits.argmax(1)
        classes: npt.NDArray[Any] = self.classes_[chosen]
        return classes

    @available_if(_has_probabilities)
    def predict_proba(self, X: Any) -> npt.NDArray[Any]:
        """Return probabilities. Available if ``loss="log_loss"``.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.

        Returns
        -------
        ndarray of shape (n_samples, n_classes) or (n_samples, n_labels)
            The probability of every class in the order of ``classes_``, which add up to one; or
            of every label.
        """
        return self._probabilities(self._logits(X))

    @available_if(_has_probabilities)
    def predict_log_proba(self, X: Any) -> npt.NDArray[Any]:
        """Return the logarithms of the probabilities, exact even for tiny ones.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.

        Returns
        -------
        ndarray of shape (n_samples, n_classes) or (n_samples, n_labels)
            Logarithms of the probabilities.
        """
        logits = self._logits(X)
        if self._multilabel:
            logs = log_expit(logits)
        elif logits.shape[1] == 1:
            logs = log_expit(np.hstack([-logits, logits]))
        else:
            logs = log_softmax(logits, axis=1)
        logs[self._probabilities(logits) == 1] = 0  # consistent with a probability rounded to one
        return np.asarray(logs)

    def _probabilities(self, logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self._multilabel:
            return np.asarray(expit(logits))
        if logits.shape[1] == 1:
            return np.asarray(expit(np.hstack([-logits, logits])))
        return np.asarray(softmax(logits, axis=1))

    def _output(self) -> nn.Module:
        if self.loss != "log_loss":
            return nn.Flatten(0) if len(self.coef_) == 1 else nn.Identity()
        if self._multilabel:
            return nn.Sigmoid()
        return TwoClasses() if len(self.coef_) == 1 else nn.Softmax(dim=1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class _FoldClassifier(FoldModel, GradientFeatureClassifier):
    """A classifier of a fold."""


@with_shared_text
class GradientFeatureClassifierCV(CrossValidated, GradientFeatureClassifier):
    """Gradient-feature classifier that chooses its penalties by cross-validation.

    The model [1]_ is that of :class:`GradientFeatureClassifier`, which also chooses its penalties
    by default, in less time. Use this class for folds or a score of your own, or to see the
    scores of a whole grid. For lists of penalties, scores and choice are those of
    :class:`~sklearn.model_selection.GridSearchCV` over that estimator, up to ``tol``, in less
    time: every sample passes through the frozen layers once, the first stage is fitted once for
    each ``alpha``, and every fit starts from the one with the next stronger penalty.

    Parameters
    ----------
    %NETWORK%
    loss : {"log_loss", "squared"}, default="log_loss"
        The loss: cross-entropy; or half the squared error to targets of 1 for the class or the
        labels of a sample and -1 for all others. With ``"squared"`` there are no probabilities.
    %SEARCH%
    cv : int, splitter or iterable, default=None
        The folds; None is 5, stratified by class. A splitter by groups takes the ``groups`` of
        ``fit``.
    scoring : str, callable or None, default=None
        A scorer, as in :class:`~sklearn.model_selection.GridSearchCV`. None takes the negative
        loss of held-out samples, which is the negative log-loss by default; ``score`` then
        returns the accuracy.
    %REFIT%
    fit_intercept : bool, default=True
        Whether to fit the intercept, which is not penalised.
    class_weight : dict, "balanced", list of dict or None, default=None
        Factors on the weights of the samples by class, as in scikit-learn.
    %SOLVER%
    %CHECKPOINT%
    %COMPUTATION%

    Attributes
    ----------
    %SEARCH_ATTRIBUTES%
    classes_ : ndarray of shape (n_classes,) or (n_labels,)
        The classes; for multilabel targets the numbers of the columns.
    %MODEL_ATTRIBUTES%

    References
    ----------
    %REFERENCES%

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_gradfeat import GradientFeatureClassifierCV
    >>> X, y = load_iris(return_X_y=True)
    >>> model = GradientFeatureClassifierCV(alphas=[0.1, 0.01], gradient_alphas=[0.01])
    >>> make_pipeline(StandardScaler(), model).fit(X, y).score(X, y) > 0.95
    True
    >>> model.scores_.shape
    (5, 2, 1)
    """

    _fold_class: Callable[[], Any] = _FoldClassifier
    _default_scoring = "accuracy"
    _parameter_constraints = searched(GradientFeatureClassifier._parameter_constraints)

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
        loss: str = "log_loss",
        alphas: Any = 5,
        gradient_alphas: Any = 5,
        cv: Any = None,
        scoring: Any = None,
        refit: bool = True,
        n_jobs: int | None = None,
        fit_intercept: bool = True,
        class_weight: Any = None,
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
        self.alphas = alphas
        self.gradient_alphas = gradient_alphas
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.n_jobs = n_jobs
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
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
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            The class of every sample; or, for multilabel targets, an indicator matrix of zeros
            and ones.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the samples, in fits and in scores.
        **params : dict
            ``groups`` for the splitter. With metadata routing enabled, also other metadata that
            splitter and scorer request.

        Returns
        -------
        self : GradientFeatureClassifierCV
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, ``X`` or ``y`` is invalid; the message names it.
        """
        return self._fit_search(self._tokens(X), y, sample_weight, params)
