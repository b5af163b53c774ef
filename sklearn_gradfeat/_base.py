"""What every estimator of the package shares in ``fit`` and ``predict``."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor, nn
from tqdm.auto import tqdm

from sklearn_gradfeat._arrays import accumulation_device, resolve_device
from sklearn_gradfeat._callbacks import CallbackSupportMixin, FitCallbacks
from sklearn_gradfeat._extractor import Extractor, build_extractor
from sklearn_gradfeat._input import validate_new_samples
from sklearn_gradfeat._losses import Loss
from sklearn_gradfeat._model import Model
from sklearn_gradfeat._prediction import predict_logits
from sklearn_gradfeat._repr import PrintedByName
from sklearn_gradfeat._serving import ServingMixin
from sklearn_gradfeat._training import Settings, train
from sklearn_gradfeat.backbones import Network, on_host
from sklearn_gradfeat.features import Store, disk_store, memory_store
from sklearn_gradfeat.solvers import Solution

_NETWORKS = ("backbone", "gradient_backbone")


class BaseGradientFeature(ServingMixin, CallbackSupportMixin, PrintedByName):
    """A linear model over the activations and the gradients of a frozen network."""

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012
        "backbone": [None, str, nn.Module, callable],
        "gradient_layers": [str, Interval(Integral, 1, None, closed="left"), list, tuple],
        "gradient_backbone": [None, str, nn.Module, callable],
        "activation_layer": [None, str],
        "preprocess": [StrOptions({"auto"}), None, callable],
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
        """Return the parameters that training depends on."""
        return Settings(
            self.features,
            self.parametrization,
            float(self.alpha),
            float(self.alpha if self.gradient_alpha is None else self.gradient_alpha),
            self.fit_intercept,
            float(self.tol),
            self.max_iter,
            seed if self.omega == "random" else None,
        )

    @torch.inference_mode(False)
    def _train(
        self,
        X: Any,
        loss: Callable[[torch.device], Loss],
        callbacks: FitCallbacks,
        attributes: dict[str, Any],
        centre: npt.NDArray[np.float64] | None = None,
    ) -> dict[str, Any]:
        """Run both stages and return the fitted attributes, ``attributes`` among them.

        ``centre`` is what was taken off the targets and goes back to the intercept.
        """
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        extractor, names = build_extractor(self, X, seed)
        network = extractor.network(names)
        features = extractor.features(
            X, network, self.batch_size, bool(self.verbose), bool(names), self._store(X)
        )
        settings = self._settings(seed)
        loss_on = loss(accumulation_device(features.activation.device))
        offset = np.zeros(loss_on.n_outputs) if centre is None else centre
        warm = self._warm_model(features.activation, network, offset)
        attributes |= {"_extractor": extractor, "sample_shape_": tuple(X.shape[1:])}
        with tqdm(unit="iteration", disable=not self.verbose) as bar:

            def monitor(
                stage: str, iteration: int, value: float, model: Callable[[], Model]
            ) -> bool:
                bar.set_description(f"{stage}, objective {value:.6g}")
                bar.update()
                if stage != self.features:
                    return False
                return callbacks.iteration(iteration, lambda: attributes | _fitted(model(), offset))

            model, solutions = train(
                features, network.head, network.parameters, loss_on, settings, warm, monitor
            )
        for stage, solution in solutions.items():
            _warn_unless_converged(stage, solution, settings)
        last = solutions[self.features]
        return {
            **attributes,
            **_fitted(model, offset),
            "n_iter_": last.n_iter,
            "n_passes_": last.n_passes,
            "objective_path_": np.array(last.objective_path),
        }

    def _warm_model(
        self, activation: Tensor, network: Network, offset: npt.NDArray[np.float64]
    ) -> Model | None:
        """Return the former solution, less the offset, if it can serve as the start."""
        shape = (len(offset), activation.shape[1])
        if not self.warm_start or getattr(self, "coef_", np.empty(0)).shape != shape:
            return None
        if {n: v.shape for n, v in self.gradient_coef_.items()} != {
            n: tuple(p.shape) for n, p in network.parameters.items()
        }:
            return None
        return Model.of(self, activation.device, activation.dtype).shifted(-offset)

    @torch.inference_mode(False)
    def _logits(self, X: Any) -> np.ndarray[Any, Any]:
        """Return the logits, of shape (n_samples, n_outputs)."""
        X = validate_new_samples(self, X)
        extractor, model = self._extractor_and_model()
        return predict_logits(
            extractor, model, X, self.batch_size, bool(self.verbose), self._store(X)
        )

    @torch.inference_mode(False)
    def _extractor_and_model(self) -> tuple[Extractor, Model]:
        """Return what was fitted, on the device to compute on."""
        try:
            device = resolve_device(self.device)
        except ValueError:  # unpickled on a machine that lacks the device it was fitted on
            device = resolve_device("auto")
        extractor = self._extractor.on(device)
        return extractor, Model.of(self, device, extractor.dtype)


def _fitted(model: Model, offset: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the attributes that hold a model and the offset of its targets."""
    return {**model.shifted(offset).attributes(), "gradient_layers_": list(model.displacements)}


def _warn_unless_converged(stage: str, solution: Solution, settings: Settings) -> None:
    """Warn with what was reached and what to try."""
    reached = (
        f"The fit of the {stage} features stopped after {solution.n_iter} iterations, where "
        f"a Newton step promises to lower the objective by another {solution.norm**2 / 2:.1e}; "
        f"tol={settings.tol:g} is not met"
    )
    penalties = "alpha" if stage == "activation" else "alpha, gradient_alpha"
    if solution.status == "max_iter":
        warnings.warn(
            f"{reached}. Increase max_iter={settings.max_iter}, {penalties} or tol.",
            ConvergenceWarning,
            stacklevel=2,
        )
    elif solution.status == "stalled":
        warnings.warn(
            f"{reached}, because rounding allows no further progress. Increase tol or alpha, "
            "or set precision='float64'.",
            ConvergenceWarning,
            stacklevel=2,
        )
