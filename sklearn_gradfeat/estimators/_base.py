"""What every estimator of the package shares in ``fit`` and ``predict``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import nn
from tqdm.auto import tqdm

from sklearn_gradfeat.backbones import on_host
from sklearn_gradfeat.cache import Extractor, Store, build_extractor, disk_store, memory_store
from sklearn_gradfeat.data import (
    in_smaller_batches,
    resolve_device,
    restored_on_error,
    validate_new_samples,
    validate_samples,
)
from sklearn_gradfeat.estimators._printing import PrintedByName
from sklearn_gradfeat.io import LinearizedNetwork, save_estimator
from sklearn_gradfeat.linearized import LinearModel
from sklearn_gradfeat.training import (
    CallbackSupportMixin,
    FitCallbacks,
    Prepared,
    Problem,
    Settings,
    predict_logits,
    train,
    warn_unless_converged,
)


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
        model = LinearModel.from_estimator(self, extractor.backbone.example.device, extractor.dtype)
        return LinearizedNetwork(extractor, model, self._output()).frozen()

    def _output(self) -> nn.Module:
        """Return the module from the logits to the output of :meth:`to_torch`."""
        return nn.Identity()


_NETWORKS = ("backbone", "gradient_backbone")


class BaseGradientFeature(ServingMixin, CallbackSupportMixin, PrintedByName):
    """A linear model over the activations and the gradients of a frozen network."""

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012
        "backbone": [None, str, nn.Module, callable],
        "gradient_layers": [str, Interval(Integral, 1, None, closed="left"), list, tuple],
        "gradient_backbone": [None, str, nn.Module, callable],
        "activation_layer": [None, str],
        "preprocess": [StrOptions({"auto"}), None, callable],
        "negative_slope": [None, Interval(Real, 0, 1, closed="left")],
        "features": [StrOptions({"full", "activation", "gradient"})],
        "omega": [StrOptions({"fitted", "random"})],
        "parametrization": [StrOptions({"ntk", "standard"})],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "gradient_alpha": [None, Interval(Real, 0, None, closed="left")],
        "fit_intercept": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "feature_store": [None, str, os.PathLike],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float64", "float32", "bfloat16"})],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __sklearn_clone__(self) -> Any:
        """Return an unfitted estimator that shares the backbone instead of copying it."""
        parameters = {
            name: value if name in _NETWORKS else clone(value, safe=False)
            for name, value in self.get_params(deep=False).items()
        }
        cloned = type(self)(**parameters)
        for name in ("_metadata_request", "_sklearn_output_config"):
            if name in self.__dict__:
                setattr(cloned, name, copy.deepcopy(getattr(self, name)))
        if hasattr(self, "_skl_callbacks"):
            cloned._skl_callbacks = self._skl_callbacks
        return cloned

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with all tensors in host memory, those of the backbone once."""
        state = dict(super().__getstate__())
        for name in _NETWORKS:
            if isinstance(state.get(name), nn.Module):
                state[name] = on_host(state[name])
        if isinstance(state.get("backbone"), nn.Module) and "_extractor" in state:
            state["_extractor"] = state["_extractor"].sharing(state["backbone"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; the frozen network is independent of the backbone again."""
        super().__setstate__(state)
        if isinstance(self.backbone, nn.Module) and hasattr(self, "_extractor"):
            self._extractor = self._extractor.apart()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _store(self, X: Any) -> Store | None:
        """Return where features are kept, None where that costs more than it saves."""
        if self.feature_store is None:
            return None
        if self.feature_store != "auto":
            return disk_store(self.feature_store)
        # The trunk of the random network takes less time per row than the look-up of a row.
        return None if self.backbone is None and len(X.shape) == 2 else memory_store()

    def _settings(self, seed: int) -> Settings:
        """Return the parameters that training depends on, but for the penalties."""
        drawn = self.omega == "random" and self.features != "activation"
        return Settings(
            self.features,
            self.parametrization,
            self.fit_intercept,
            float(self.tol),
            self.max_iter,
            seed if drawn else None,
        )

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Any:
        """Validate, train, and set the fitted attributes all at once."""
        with restored_on_error(self, "n_features_in_", "feature_names_in_"):
            X, y = validate_samples(self, X, y)
            problem = self._problem(y, sample_weight)
            metadata = {} if sample_weight is None else {"sample_weight": sample_weight}
            callbacks = FitCallbacks(self, self.max_iter, X=X, y=y, metadata=metadata)
            alpha = float(self.alpha)
            own = alpha if self.gradient_alpha is None else float(self.gradient_alpha)
            fitted = self._prepare(X).attempt(
                lambda prepared: self._train(prepared, problem, alpha, own, callbacks)
            )
        self.__dict__.update(fitted)
        callbacks.end()
        return self

    def _problem(self, y: Any, sample_weight: Any) -> Problem:
        """Return what targets and weights make of the fit."""
        raise NotImplementedError

    @torch.inference_mode(False)
    def _prepare(self, X: Any) -> Prepared:
        """Pass the samples through the frozen layers."""
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        extractor, names = build_extractor(
            X,
            backbone=self.backbone,
            gradient_layers=None if self.features == "activation" else self.gradient_layers,
            activation_layer=self.activation_layer,
            preprocess=self.preprocess,
            negative_slope=self.negative_slope,
            device=self.device,
            precision=self.precision,
            seed=seed,
        )
        network = extractor.network(names)
        features = in_smaller_batches(
            lambda size: extractor.cache(
                X, network, size, bool(self.verbose), bool(names), self._store(X)
            ),
            self.batch_size,
        )
        attributes = {"_extractor": extractor, "sample_shape_": tuple(X.shape[1:])}
        return Prepared(network, features, self._settings(seed), attributes)

    @torch.inference_mode(False)
    def _train(
        self,
        prepared: Prepared,
        problem: Problem,
        alpha: float,
        gradient_alpha: float,
        callbacks: FitCallbacks,
    ) -> dict[str, Any]:
        """Run both stages and return the fitted attributes."""
        attributes = prepared.attributes | problem.attributes
        stages, kind = prepared.stages(problem), prepared.settings.features
        warm = self._warm_model(prepared, problem, stages.loss.n_outputs)
        with tqdm(unit="iteration", disable=not self.verbose) as bar:

            def monitor(
                stage: str, iteration: int, value: float, model: Callable[[], LinearModel]
            ) -> bool:
                bar.set_description(f"{stage}, objective {value:.6g}")
                bar.update()
                if stage != kind:
                    return False
                return callbacks.iteration(
                    iteration, lambda: attributes | problem.finished(model()).attributes()
                )

            model, solutions = train(stages, alpha, gradient_alpha, warm, monitor)
        for stage, solution in solutions.items():
            warn_unless_converged(stage, solution, prepared.settings)
        last = solutions[kind]
        return {
            **attributes,
            **problem.finished(model).attributes(),
            "n_iter_": last.n_iter,
            "n_passes_": last.n_passes,
            "objective_path_": np.array(last.objective_path),
        }

    def _warm_model(
        self, prepared: Prepared, problem: Problem, n_outputs: int
    ) -> LinearModel | None:
        """Return the former solution, if it can serve as the start."""
        activation = prepared.samples.activation
        shape = (n_outputs, activation.shape[1])
        if not self.warm_start or getattr(self, "coef_", np.empty(0)).shape != shape:
            return None
        if {n: v.shape for n, v in self.gradient_coef_.items()} != {
            n: tuple(p.shape) for n, p in prepared.network.parameters.items()
        }:
            return None
        return problem.unfinished(
            LinearModel.from_estimator(self, activation.device, activation.dtype)
        )

    @torch.inference_mode(False)
    def _logits(self, X: Any) -> np.ndarray[Any, Any]:
        """Return the logits, of shape (n_samples, n_outputs)."""
        X = validate_new_samples(self, X)
        extractor, model = self._extractor_and_model()
        return in_smaller_batches(
            lambda size: predict_logits(
                extractor, model, X, size, bool(self.verbose), self._store(X)
            ),
            self.batch_size,
        )

    @torch.inference_mode(False)
    def _extractor_and_model(self) -> tuple[Extractor, LinearModel]:
        """Return what was fitted, on the device to compute on."""
        try:
            device = resolve_device(self.device)
        except ValueError:  # unpickled on a machine that lacks the device it was fitted on
            device = resolve_device("auto")
        extractor = self._extractor.on(device)
        return extractor, LinearModel.from_estimator(self, device, extractor.dtype)
