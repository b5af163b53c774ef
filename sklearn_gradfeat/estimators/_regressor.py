"""The regressor that chooses its penalties."""

from __future__ import annotations

from numbers import Real

import numpy as np
from sklearn.base import RegressorMixin, _fit_context
from sklearn.utils._param_validation import Interval, StrOptions
from torch import nn

from sklearn_gradfeat.estimators._base import BaseGradientFeature
from sklearn_gradfeat.estimators._cross_validation import CrossValidated, LeftOut, searched
from sklearn_gradfeat.training import (
    Problem,
    centre,
    numeric,
    regression_loss,
    sample_weights,
    with_callbacks,
)


class GradientFeatureRegressor(RegressorMixin, BaseGradientFeature):
    """Ridge or Huber regression on the activations and gradients of a frozen network.

    The model [1]_ is the first-order approximation of fine-tuning the upper layers of a
    pretrained network together with a linear output. With the activation ``f(x)`` and its
    Jacobian ``J(x)`` in the parameters θ₂ of the gradient layers, the predictions are ::

        W f(x) + b + ω̄ J(x) w₂

    where ``ω̄`` is a regression on ``f`` that is fitted first, with the same loss. They are
    linear in the unknowns ``W``, ``b`` and ``w₂``, so the training problem is convex. ``w₂``
    is shared by all outputs. Gradient features are never formed.

    Parameters
    ----------
    backbone : None, str, torch.nn.Module or callable, default=None
        The pretrained network. It is copied and frozen, never changed, and its clones in
        grid searches share one copy.

        - None: for images, ``"convnet-rotation"``; for rows of numbers, a wide random
          multi-layer perceptron.
        - str: ``"convnet-rotation"`` or ``"convnet-vae"``, small networks for 32 x 32 pixels
          that are part of the package; ``"resnet18"`` or ``"torchvision/resnet18"``,
          ``"timm/NAME"``: pretrained weights with their own input transform, without the
          classifier.
        - module: its output is the activation, of shape (n_samples, n_features) or
          (n_samples, n_features, ...), which is averaged over the axes that follow.
        - callable: returns a module; called once in every fit, under ``random_state``.

    gradient_layers : {"last", "all"}, int, str or list of str, default="last"
        The parameters θ₂: ``"last"`` is the topmost residual or transformer block, or the
        topmost convolution of a plain network; k is the topmost k of these; anything else
        is names or glob patterns of submodules or parameters.
    gradient_backbone : None, str, torch.nn.Module or callable, default=None
        To check the method: where ``J`` is taken, in trunk and gradient layers alike, while
        ``f`` is still that of ``backbone``. A network of the same architecture at other
        parameters, such as random ones. None is ``backbone`` itself.
    activation_layer : str, default=None
        The submodule whose output is the activation; None is the backbone itself.
    preprocess : "auto", callable or None, default="auto"
        Applied to each batch, a tensor of the dtype of ``X``, before the network.
        ``"auto"`` is the transform of a named network, which takes uint8 images or floats
        in [0, 1] of any size, grey or RGB, channels first or last; for any other backbone
        it is nothing.
    negative_slope : float, default=None
        Slope below zero of the rectifiers above the gradient layers, at least 0 and below 1, for
        activation and derivative alike: a rectifier passes no derivative where its input is
        negative. None leaves them as they are.
    features : {"full", "activation", "gradient"}, default="full"
        The terms of the model: both, ``W f`` alone, or ``ω̄ J w₂`` alone.
    omega : {"fitted", "random"}, default="fitted"
        ``ω̄``: the first regression on ``f``; or, to check the method, normal random numbers
        with the same mean square.
    parametrization : {"ntk", "standard"}, default="ntk"
        Scale of the displacements ``w₂`` under the penalty: the NTK parametrization
        divides weights by the square root of their output channels and biases by √10.
    loss : {"squared_error", "huber"}, default="squared_error"
        Half the squared error; or Huber's, which is that up to ``epsilon`` and linear
        beyond. Both are summed over the outputs, and averaged over the samples.
    epsilon : float, default=1.35
        The absolute error at which Huber's loss turns linear, in the units of ``y``. (In
        ``HuberRegressor`` it is a multiple of its ``scale_``.)
    alpha : float, default=1e-4
        L2 penalty: ``alpha / 2`` times the squared norm of ``W``, on a loss that is a
        weighted mean. The ``alpha`` of ``Ridge`` is ``alpha * sample_weight.sum()``.
    gradient_alpha : float, default=None
        L2 penalty on ``w₂``; None means ``alpha``. ``w₂`` has no unit: to get ``c`` times the
        predictions for the targets ``c * y``, multiply this by ``c ** 2``.
    fit_intercept : bool, default=True
        Whether to fit the intercept, which is not penalised.
    max_iter : int, default=100
        Largest number of iterations of each of the two fits.
    tol : float, default=1e-4
        Both fits stop when the decrease of the objective that a Newton step promises, half
        the squared norm of the gradient in the metric of the preconditioner, is ``tol``
        times that at the model that predicts nothing.
    warm_start : bool, default=False
        Whether to start from the former solution where it has the right shape. The
        optimum is the same.
    batch_size : int, default=256
        Number of samples that pass through the network at once. It changes results by
        rounding errors only. Where memory runs out it is halved, with a warning.
    feature_store : "auto", path or None, default="auto"
        Where the output of the frozen layers is kept, so that it is computed once per sample
        for all clones, folds, candidates, fits and predictions: in the memory of the process,
        as long as the network lives; or in a directory, shared by processes, now and later,
        which needs the ``disk`` extra. ``"auto"`` is memory, but nothing for
        the random network, whose layers take less time than a look-up. None computes anew.
        :func:`set_config` bounds it.
    device : str or torch.device, default="auto"
        ``"auto"`` is cuda, then mps, then cpu.
    precision : {"auto", "float64", "float32", "bfloat16"}, default="auto"
        Precision of the network and of the results. ``"auto"`` is float64 for rows of
        float64 or integers, and float32 for anything else. ``"bfloat16"`` runs the frozen
        layers below the gradient layers under autocast and the rest in float32; with a
        ``gradient_backbone``, all in float32. For rows of numbers the gradient layers and the
        results are float64 in any case.
    random_state : int, RandomState instance or None, default=None
        Seeds the weights of the random network and of factories, and ``omega="random"``.
        Nothing else is random.
    verbose : int, default=0
        Whether to show progress bars.

    Attributes
    ----------
    coef_ : ndarray of shape (n_outputs, n_features)
        The weights ``W``, zeros if the model has none.
    intercept_ : ndarray of shape (n_outputs,)
        The intercept ``b``.
    omega_ : ndarray of shape (n_outputs, n_features)
        The weights ``ω̄``.
    gradient_coef_ : dict of str to ndarray
        The displacements ``w₂`` by parameter, in its own shape and units.
    gradient_layers_ : list of str
        The parameters θ₂. A batch norm is folded into the layer before it: its bias then
        stands for the bias of the two, its scale is part of the layer's weight. Names in a
        ``gradient_backbone`` begin with "gradient.".
    sample_shape_ : tuple of int
        The shape of one sample.
    n_features_in_ : int
        Length of the second axis of ``X``.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where ``X`` has names that are all strings.
    n_iter_ : int
        Iterations of the last fit.
    n_passes_ : int
        Passes over the data that those took.
    objective_path_ : ndarray of shape (`n_iter_` + 1,)
        The objective at the start and after every iteration. It never increases.

    References
    ----------
    .. [1] F. Mu, Y. Liang, Y. Li, Gradients as CachedSamples for Deep Representation Learning,
       ICLR 2020, arXiv:2004.05529.

    Examples
    --------
    >>> from sklearn.compose import TransformedTargetRegressor
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_gradfeat import GradientFeatureRegressor
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = GradientFeatureRegressor(alpha=1.0, gradient_alpha=0.1, random_state=0)
    >>> model = TransformedTargetRegressor(model, transformer=StandardScaler())
    >>> model = make_pipeline(StandardScaler(), model)
    >>> round(model.fit(X, y).score(X, y), 1)
    0.6
    """

    _parameter_constraints = {  # noqa: RUF012
        **BaseGradientFeature._parameter_constraints,
        "loss": [StrOptions({"squared_error", "huber"})],
        "epsilon": [Interval(Real, 0, None, closed="neither")],
    }

    def __init__(
        self,
        backbone=None,
        *,
        gradient_layers="last",
        gradient_backbone=None,
        activation_layer=None,
        preprocess="auto",
        negative_slope=None,
        features="full",
        omega="fitted",
        parametrization="ntk",
        loss="squared_error",
        epsilon=1.35,
        alpha=1e-4,
        gradient_alpha=None,
        fit_intercept=True,
        max_iter=100,
        tol=1e-4,
        warm_start=False,
        batch_size=256,
        feature_store="auto",
        device="auto",
        precision="auto",
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.gradient_layers = gradient_layers
        self.gradient_backbone = gradient_backbone
        self.activation_layer = activation_layer
        self.preprocess = preprocess
        self.negative_slope = negative_slope
        self.features = features
        self.omega = omega
        self.parametrization = parametrization
        self.loss = loss
        self.epsilon = epsilon
        self.alpha = alpha
        self.gradient_alpha = gradient_alpha
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.warm_start = warm_start
        self.batch_size = batch_size
        self.feature_store = feature_store
        self.device = device
        self.precision = precision
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None):
        """Fit the linear model.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Rows, images, or whatever the backbone takes.
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
            If a parameter, ``X`` or ``y`` cannot be used; the message names it.
        """
        return self._fit(X, y, sample_weight)

    def _problem(self, y, sample_weight):
        y = numeric(y)
        weights = sample_weights(y, sample_weight)
        targets = y.reshape(len(y), -1)
        # With an intercept that changes nothing but the start, which tol refers to.
        offset = centre(targets, weights) if self.fit_intercept else np.zeros(targets.shape[1])
        epsilon = self.epsilon if self.loss == "huber" else None
        return Problem(
            lambda device: regression_loss(targets - offset, weights, epsilon, device),
            {"_single_output": y.ndim == 1},
            offset,
        )

    def predict(self, X):
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

    def _output(self):
        return nn.Flatten(0) if self._single_output else nn.Identity()

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class _LeftRegressor(LeftOut, GradientFeatureRegressor):
    """A model of a fold."""


class GradientFeatureRegressorCV(CrossValidated, GradientFeatureRegressor):
    """Gradient-feature regressor that chooses its penalties by cross-validation.

    The model is that of :class:`GradientFeatureRegressor`. The penalties, scores and choice are
    those of a :class:`~sklearn.model_selection.GridSearchCV` over it, up to ``tol``, in less
    time: every sample passes through the frozen layers once, the first stage is fitted
    once for each ``alpha``, and every fit starts from the one with the next stronger
    penalty.

    Parameters
    ----------
    backbone : None, str, torch.nn.Module or callable, default=None
        The pretrained network. It is copied and frozen, never changed, and its clones in
        grid searches share one copy.

        - None: for images, ``"convnet-rotation"``; for rows of numbers, a wide random
          multi-layer perceptron.
        - str: ``"convnet-rotation"`` or ``"convnet-vae"``, small networks for 32 x 32 pixels
          that are part of the package; ``"resnet18"`` or ``"torchvision/resnet18"``,
          ``"timm/NAME"``: pretrained weights with their own input transform, without the
          classifier.
        - module: its output is the activation, of shape (n_samples, n_features) or
          (n_samples, n_features, ...), which is averaged over the axes that follow.
        - callable: returns a module; called once in every fit, under ``random_state``.

    gradient_layers : {"last", "all"}, int, str or list of str, default="last"
        The parameters θ₂: ``"last"`` is the topmost residual or transformer block, or the
        topmost convolution of a plain network; k is the topmost k of these; anything else
        is names or glob patterns of submodules or parameters.
    gradient_backbone : None, str, torch.nn.Module or callable, default=None
        To check the method: where ``J`` is taken, in trunk and gradient layers alike, while
        ``f`` is still that of ``backbone``. A network of the same architecture at other
        parameters, such as random ones. None is ``backbone`` itself.
    activation_layer : str, default=None
        The submodule whose output is the activation; None is the backbone itself.
    preprocess : "auto", callable or None, default="auto"
        Applied to each batch, a tensor of the dtype of ``X``, before the network.
        ``"auto"`` is the transform of a named network, which takes uint8 images or floats
        in [0, 1] of any size, grey or RGB, channels first or last; for any other backbone
        it is nothing.
    negative_slope : float, default=None
        Slope below zero of the rectifiers above the gradient layers, at least 0 and below 1, for
        activation and derivative alike: a rectifier passes no derivative where its input is
        negative. None leaves them as they are.
    features : {"full", "activation", "gradient"}, default="full"
        The terms of the model: both, ``W f`` alone, or ``ω̄ J w₂`` alone.
    omega : {"fitted", "random"}, default="fitted"
        ``ω̄``: the first regression on ``f``; or, to check the method, normal random numbers
        with the same mean square.
    parametrization : {"ntk", "standard"}, default="ntk"
        Scale of the displacements ``w₂`` under the penalty: the NTK parametrization
        divides weights by the square root of their output channels and biases by √10.
    loss : {"squared_error", "huber"}, default="squared_error"
        Half the squared error; or Huber's, which is that up to ``epsilon`` and linear
        beyond. Both are summed over the outputs, and averaged over the samples.
    epsilon : float, default=1.35
        The absolute error at which Huber's loss turns linear, in the units of ``y``. (In
        ``HuberRegressor`` it is a multiple of its ``scale_``.)
    alphas : int or array-like of shape (n_alphas,), default=5
        The values of ``alpha`` to try, the L2 penalty on ``W``; or how many: these are then
        placed by the scale of the activations, from their largest curvature downward, over
        four powers of ten.
    gradient_alphas : int or array-like of shape (n_gradient_alphas,), default=5
        The same for ``gradient_alpha``, the L2 penalty on ``w₂``. All combinations are tried.
        Without gradient features there is nothing to try.
    cv : int, splitter, iterable or "loo", default=None
        The folds; None is 5. Splitters that need groups get them from the ``groups`` of
        ``fit``. ``"loo"`` scores the predictions of every sample by the model of all others,
        from one factorisation for each pair of penalties, which takes no fit of the second stage
        at all: for squared errors, up to 4096 samples times outputs, and gradient layers that
        are linear, or convolutions as large as their input. There ``ω̄`` remains that of all
        samples, and what a scorer sees of the model besides its predictions is the first stage.
    scoring : str, callable or None, default=None
        A scorer, as in :class:`~sklearn.model_selection.GridSearchCV`; None is R².
    refit : bool, default=True
        Whether to fit the model with the best penalties on all samples. Without that there
        are scores, and nothing to predict with.
    fit_intercept : bool, default=True
        Whether to fit the intercept, which is not penalised.
    max_iter : int, default=100
        Largest number of iterations of each of the two fits.
    tol : float, default=1e-4
        Both fits stop when the decrease of the objective that a Newton step promises, half
        the squared norm of the gradient in the metric of the preconditioner, is ``tol``
        times that at the model that predicts nothing.
    batch_size : int, default=256
        Number of samples that pass through the network at once. It changes results by
        rounding errors only. Where memory runs out it is halved, with a warning.
    feature_store : "auto", path or None, default="auto"
        Where the output of the frozen layers is kept, so that it is computed once per sample
        for all clones, folds, candidates, fits and predictions: in the memory of the process,
        as long as the network lives; or in a directory, shared by processes, now and later,
        which needs the ``disk`` extra. ``"auto"`` is memory, but nothing for
        the random network, whose layers take less time than a look-up. None computes anew.
        :func:`set_config` bounds it.
    device : str or torch.device, default="auto"
        ``"auto"`` is cuda, then mps, then cpu.
    precision : {"auto", "float64", "float32", "bfloat16"}, default="auto"
        Precision of the network and of the results. ``"auto"`` is float64 for rows of
        float64 or integers, and float32 for anything else. ``"bfloat16"`` runs the frozen
        layers below the gradient layers under autocast and the rest in float32; with a
        ``gradient_backbone``, all in float32. For rows of numbers the gradient layers and the
        results are float64 in any case.
    random_state : int, RandomState instance or None, default=None
        Seeds the weights of the random network and of factories, and ``omega="random"``.
        Nothing else is random.
    verbose : int, default=0
        Whether to show progress bars.

    Attributes
    ----------
    alpha_ : float
        The best ``alpha``: the first of those with the highest mean score.
    gradient_alpha_ : float or None
        The best ``gradient_alpha``; None without gradient features.
    best_score_ : float
        Their mean score over the folds.
    scores_ : ndarray of shape (n_folds, n_alphas, n_gradient_alphas)
        All scores; with ``cv="loo"`` there is one fold, of all samples.
    alphas_ : ndarray of shape (n_alphas,)
        The values that were tried, in the order of ``scores_``.
    gradient_alphas_ : ndarray of shape (n_gradient_alphas,) or None
        The same of ``gradient_alpha``.
    coef_ : ndarray of shape (n_outputs, n_features)
        The weights ``W``, zeros if the model has none.
    intercept_ : ndarray of shape (n_outputs,)
        The intercept ``b``.
    omega_ : ndarray of shape (n_outputs, n_features)
        The weights ``ω̄``.
    gradient_coef_ : dict of str to ndarray
        The displacements ``w₂`` by parameter, in its own shape and units.
    gradient_layers_ : list of str
        The parameters θ₂. A batch norm is folded into the layer before it: its bias then
        stands for the bias of the two, its scale is part of the layer's weight. Names in a
        ``gradient_backbone`` begin with "gradient.".
    sample_shape_ : tuple of int
        The shape of one sample.
    n_features_in_ : int
        Length of the second axis of ``X``.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where ``X`` has names that are all strings.
    n_iter_ : int
        Iterations of the last fit.
    n_passes_ : int
        Passes over the data that those took.
    objective_path_ : ndarray of shape (`n_iter_` + 1,)
        The objective at the start and after every iteration. It never increases.

    References
    ----------
    .. [1] F. Mu, Y. Liang, Y. Li, Gradients as CachedSamples for Deep Representation Learning,
       ICLR 2020, arXiv:2004.05529.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from sklearn_gradfeat import GradientFeatureRegressorCV
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = GradientFeatureRegressorCV(alphas=3, gradient_alphas=2, random_state=0)
    >>> model = make_pipeline(StandardScaler(), model).fit(X, y)
    >>> model[-1].best_score_ > 0.4
    True
    """

    _fold_class = _LeftRegressor
    _default_scoring = "r2"
    _parameter_constraints = {  # noqa: RUF012
        **searched(GradientFeatureRegressor._parameter_constraints),
        "cv": ["cv_object", StrOptions({"loo"})],
    }

    def __init__(
        self,
        backbone=None,
        *,
        gradient_layers="last",
        gradient_backbone=None,
        activation_layer=None,
        preprocess="auto",
        negative_slope=None,
        features="full",
        omega="fitted",
        parametrization="ntk",
        loss="squared_error",
        epsilon=1.35,
        alphas=5,
        gradient_alphas=5,
        cv=None,
        scoring=None,
        refit=True,
        fit_intercept=True,
        max_iter=100,
        tol=1e-4,
        batch_size=256,
        feature_store="auto",
        device="auto",
        precision="auto",
        random_state=None,
        verbose=0,
    ):
        self.backbone = backbone
        self.gradient_layers = gradient_layers
        self.gradient_backbone = gradient_backbone
        self.activation_layer = activation_layer
        self.preprocess = preprocess
        self.negative_slope = negative_slope
        self.features = features
        self.omega = omega
        self.parametrization = parametrization
        self.loss = loss
        self.epsilon = epsilon
        self.alphas = alphas
        self.gradient_alphas = gradient_alphas
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.feature_store = feature_store
        self.device = device
        self.precision = precision
        self.random_state = random_state
        self.verbose = verbose

    @with_callbacks
    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X, y, sample_weight=None, **params):
        """Choose the penalties, and fit the linear model with them.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Rows, images, or whatever the backbone takes.
        y : array-like of shape (n_samples,) or (n_samples, n_outputs)
            Real targets.
        sample_weight : array-like of shape (n_samples,), default=None
            Non-negative weights of the samples, in fits and in scores.
        **params : dict
            ``groups`` for the splitter. Where metadata routing is enabled, also what else
            splitter and scorer request.

        Returns
        -------
        self : GradientFeatureRegressorCV
            The fitted estimator.

        Raises
        ------
        ValueError
            If a parameter, ``X`` or ``y`` cannot be used; the message names it.
        """
        return self._fit_search(X, y, sample_weight, params)

    def _check_search(self):
        super()._check_search()
        if not isinstance(self.cv, str):
            return
        if self.loss != "squared_error":
            raise ValueError(
                f"cv='loo' is for loss='squared_error', but loss is {self.loss!r}. Set cv to a "
                "number of folds."
            )
        for name in ("alphas", "gradient_alphas")[: 1 + (self.features != "activation")]:
            if np.min(getattr(self, name)) == 0:
                raise ValueError(
                    f"{name} contains 0, and cv='loo' needs penalties above zero. Take a small "
                    "number, or set cv to a number of folds."
                )
