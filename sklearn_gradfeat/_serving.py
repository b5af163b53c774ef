"""What becomes of a fitted estimator: a file, a torch module."""

from __future__ import annotations

import os

import torch
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_gradfeat._arrays import resolve_device
from sklearn_gradfeat._export import LinearizedNetwork
from sklearn_gradfeat._extractor import Extractor
from sklearn_gradfeat._model import Model
from sklearn_gradfeat._persistence import save_estimator


class ServingMixin:
    """Saving and export of fitted estimators."""

    _extractor: Extractor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one file, without pickle.

        :func:`sklearn_gradfeat.load` reads it. The file holds the linear model, the parameters,
        and the weights of the backbone unless that is named or shipped. Of a ``backbone`` or
        ``preprocess`` that is code, only the name is noted: pass it to ``load`` again. Callbacks,
        metadata requests and scikit-learn's output settings are left out.

        Parameters
        ----------
        path : str or path-like
            The file, in the safetensors format. One of that name is replaced once the new one
            is complete.

        Raises
        ------
        ValueError
            If a parameter can be stored by pickle only, such as a ``RandomState``.
        """
        save_estimator(self, path)

    def to_torch(self, device: str | torch.device = "cpu") -> nn.Module:
        """Return the fitted model as one torch module, for ``torch.export`` and ONNX.

        The module holds plain operators: the derivative in the gradient layers is written out
        as a graph. It takes batches of any size.

        Parameters
        ----------
        device : str or torch.device, default="cpu"
            Where the module runs.

        Returns
        -------
        torch.nn.Module
            Maps a batch to what ``predict_proba`` returns, or ``predict`` for regressors. The
            batch is what ``preprocess`` returns; where ``preprocess`` is a torch module, as
            that of a named network is, it is part of this one, and the batch what it takes.
            With ``precision="bfloat16"`` all is computed in float32.

        Raises
        ------
        ValueError
            If ``torch.export`` refuses the backbone, or an operator in the gradient layers has
            no derivative that can be written out.
        """
        check_is_fitted(self)
        extractor = self._extractor.on(resolve_device(device))
        model = Model.of(self, extractor.backbone.example.device, extractor.dtype)
        return LinearizedNetwork(extractor, model, self._output()).frozen()

    def _output(self) -> nn.Module:
        """Return the module from the logits to the output of :meth:`to_torch`."""
        return nn.Identity()
