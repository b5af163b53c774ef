"""Loading of saved estimators."""

from __future__ import annotations

import os
from typing import Any

import torch

from sklearn_gradfeat.backbones import BackboneLike
from sklearn_gradfeat.data import Preprocess, resolve_device
from sklearn_gradfeat.estimators._classifier import (
    GradientFeatureClassifier,
    GradientFeatureClassifierCV,
)
from sklearn_gradfeat.estimators._regressor import (
    GradientFeatureRegressor,
    GradientFeatureRegressorCV,
)
from sklearn_gradfeat.io import load_estimator

_ESTIMATORS = {
    kind.__name__: kind
    for kind in (
        GradientFeatureClassifier,
        GradientFeatureClassifierCV,
        GradientFeatureRegressor,
        GradientFeatureRegressorCV,
    )
}


def load(
    path: str | os.PathLike[str],
    backbone: BackboneLike = None,
    *,
    preprocess: Preprocess | None = None,
    device: str | torch.device | None = None,
    feature_store: str | os.PathLike[str] | None = "auto",
) -> Any:
    """Load an estimator from a file that its method ``save`` wrote.

    Nothing in the file is executed. It holds numbers and names, and no code, so a model over
    your own network needs the code of that network again.

    Parameters
    ----------
    path : str or path-like
        The file.
    backbone : torch.nn.Module, callable or str, default=None
        The architecture, for a model over a module or a callable. A copy of it receives the
        weights in the file. For a model over a named network, pass a network here only to
        avoid its download; it must have the same weights, and needs ``preprocess``.
    preprocess : callable, default=None
        The transform, if the model was fitted with one of your own.
    device : str or torch.device, default=None
        The parameter ``device`` of the model. None is ``"auto"``: a file does not choose the
        device.
    feature_store : "auto", path or None, default="auto"
        The parameter ``feature_store`` of the model. A file does not choose a path either.

    Returns
    -------
    estimator
        A fitted estimator. On the same machine with the same versions, its predictions equal
        those of the saved one to the last bit.

    Raises
    ------
    ValueError
        If the file is damaged, holds no model, or has a newer format; or if the backbone
        differs from the one that the model was fitted on.
    OSError
        If the file cannot be read, or if the weights of a named network cannot be downloaded.

    Examples
    --------
    >>> import os, tempfile
    >>> import sklearn_gradfeat
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = sklearn_gradfeat.GradientFeatureClassifier(alpha=1.0).fit(X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "iris.safetensors")
    ...     model.save(path)
    ...     loaded = sklearn_gradfeat.load(path)
    >>> bool((loaded.predict_proba(X) == model.predict_proba(X)).all())
    True
    """
    if device is not None:
        resolve_device(device)
    return load_estimator(path, _ESTIMATORS, backbone, preprocess, device, feature_store)
