"""The steps of ``fit`` and of predictions that all estimators share."""

from __future__ import annotations

import copy
import os
import warnings
from functools import partial
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    TransformerMixin,
    clone,
)
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import nn

from sklearn_gradfeat.backbones import (
    Pickled,
    neutral_state,
    on_host,
    resolve_tokenizer,
    unwrapped,
)
from sklearn_gradfeat.cache import (
    CachedSamples,
    Extractor,
    Store,
    build_extractor,
    disk_store,
    memory_store,
)
from sklearn_gradfeat.data import (
    BatchSize,
    fit_together,
    gather_over_ranks,
    on_all_ranks,
    resolve_device,
    restored_on_error,
    row_blocks,
    validate_new_samples,
    validate_samples,
    warn_of_tabular,
    warn_unless_picklable,
)
from sklearn_gradfeat.estimators._checkpointing import of_network, of_samples, open_checkpoint
from sklearn_gradfeat.estimators._printing import caption, named, text_of
from sklearn_gradfeat.estimators._same_on_ranks import check_same_network, check_same_on_ranks
from sklearn_gradfeat.io import Checkpoint, LinearizedNetwork, save_estimator
from sklearn_gradfeat.linearized import LinearModel, predict_activations, predict_logits
from sklearn_gradfeat.training import (
    CallbackSupportMixin,
    FitSettings,
    Prepared,
    Problem,
    Progress,
    TwoStageFit,
    check_adjointness,
    choose_penalties,
    fit_in_turn,
    warn_unless_converged,
)


class BaseGradientFeature(
    CallbackSupportMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator
):
    """A linear model over the activations and the gradients of a frozen network."""

    _extractor: Extractor

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012
        "backbone": [None, str, nn.Module, callable],
        "gradient_layers": [str, Interval(Integral, 1, None, closed="left"), list, tuple],
        "activation_layer": [
            None,
            str,
            Interval(Integral, 1, None, closed="left"),
            list,
            tuple,
        ],
        "preprocess": [StrOptions({"auto"}), None, callable],
        "negative_slope": [None, Interval(Real, 0, 1, closed="left")],
        "features": [StrOptions({"full", "activation", "gradient"})],
        "n_linearizations": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "parametrization": [StrOptions({"ntk", "standard"})],
        "alpha": [StrOptions({"auto"}), Interval(Real, 0, None, closed="left")],
        "gradient_alpha": [StrOptions({"auto"}), Interval(Real, 0, None, closed="both")],
        "fit_intercept": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "warm_start": ["boolean"],
        "checkpoint": [None, str, os.PathLike],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "feature_store": [None, str, os.PathLike],
        "store_dtype": [StrOptions({"auto", "bfloat16"})],
        "device": [str, torch.device],
        "precision": [StrOptions({"auto", "float64", "float32", "bfloat16"})],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    @neutral_state()
    def _fit(self, X: Any, y: Any, sample_weight: Any) -> Self:
        """Validate, pass the samples through the network, train, and set the attributes."""
        with restored_on_error(self, "n_features_in_", "feature_names_in_"):
            X, y = validate_samples(self, self._tokens(X), y)
            check_same_on_ranks(self, X, sample_weight, fitted=self.warm_start)
            problem = self._problem(y, sample_weight)
            metadata = {} if sample_weight is None else {"sample_weight": sample_weight}
            checkpoint = open_checkpoint(self, X, y, problem.weights)
            with Progress(self, X=X, y=y, metadata=metadata) as progress:
                prepared = self._prepare(X, problem.weights, checkpoint)
                if checkpoint is not None:
                    (journal,) = checkpoint.journals(prepared.samples.activation)
                    prepared = prepared._replace(journal=journal)
                stages = TwoStageFit(prepared, problem)
                alpha, gradient_alpha = self._penalties()
                choice = choose_penalties(prepared, stages, alpha, gradient_alpha, progress)
                warm = self._warm_model(stages)
                one = self.n_linearizations == 1
                several = partial(fit_in_turn, stages, n_models=choice.n_models)
                fit = stages.fit if one else partial(several, stronger=choice.stronger)
                result = fit(choice.alpha, choice.gradient_alpha, warm=warm, progress=progress)
            warn_unless_converged(result, prepared.settings)
        attributes = {"validation_scores_": choice.scores, **result.attributes()}
        self.__dict__.update(prepared.attributes | problem.attributes | attributes)
        progress.end()
        if checkpoint is not None:
            checkpoint.remove()
        return self

    def _penalties(self) -> tuple[float | None, float | None]:
        """Return both penalties, None for those that the fit chooses."""
        if self.features == "gradient" and self.gradient_alpha == np.inf:
            raise ValueError(
                "gradient_alpha=inf leaves out the gradient term, but features='gradient' has no "
                "other. Pass a finite gradient_alpha, or features='activation'."
            )
        given = (None if p == "auto" else float(p) for p in (self.alpha, self.gradient_alpha))
        return next(given), next(given)

    def _problem(self, y: npt.NDArray[Any], sample_weight: Any) -> Problem:
        """Return the loss that targets and weights define."""
        raise NotImplementedError

    def _prepare(
        self, X: Any, weights: npt.NDArray[np.float64], checkpoint: Checkpoint | None = None
    ) -> Prepared:
        """Pass the samples through the frozen layers, and compare them with the checkpoint."""
        if self.features == "gradient" and self.n_linearizations != 1:
            raise ValueError(
                f"n_linearizations={self.n_linearizations!r} needs the whole model, and "
                "features='gradient' leaves out the activations. Set features='full', or "
                "n_linearizations=1."
            )
        warn_unless_picklable(self.preprocess)
        if self.backbone is None and len(X.shape) == 2:
            warn_of_tabular(X, getattr(self, "feature_names_in_", None))
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        seed = gather_over_ranks(seed)[0]
        extractor, names = build_extractor(
            X,
            backbone=self.backbone,
            gradient_layers=self.gradient_layers,
            has_gradient=self.features != "activation",
            activation_layer=self.activation_layer,
            preprocess=self.preprocess,
            negative_slope=self.negative_slope,
            device=self.device,
            precision=self.precision,
            store_dtype=self.store_dtype,
            seed=seed,
        )
        check_same_network(extractor.backbone, names)
        if checkpoint is not None:
            checkpoint.check(of_network(extractor, names))
        samples = self._pass(X, extractor, names)
        extractor, samples = extractor.balanced(samples, weights)
        if checkpoint is not None:
            checkpoint.check(of_samples(X, samples))
        return self._prepared(X, extractor, names, samples)

    def _pass(self, X: Any, extractor: Extractor, names: list[str]) -> CachedSamples:
        """Pass samples through the layers below the parameters ``names``."""
        network = extractor.network(names)
        batch_size = BatchSize(min(self.batch_size, X.shape[0]))
        return extractor.cache(X, network, batch_size, bool(self.verbose), self._store(X))

    def _prepared(
        self, X: Any, extractor: Extractor, names: list[str], samples: CachedSamples
    ) -> Prepared:
        """Return samples that passed the frozen layers, with the settings of a fit."""
        network = extractor.network(names)
        if network.parameters:
            check_adjointness(network, samples)
        settings = FitSettings(
            self.features,
            self.parametrization,
            self.fit_intercept,
            float(self.tol),
            self.max_iter,
            None if self.n_linearizations == "auto" else self.n_linearizations,
        )
        attributes = {"_extractor": extractor, "sample_shape_": tuple(X.shape[1:])}
        return Prepared(network, samples, settings, attributes)

    @neutral_state()
    def _tokens(self, X: Any) -> Any:
        """Return texts as token ids with a mask, if the backbone is a named network for texts."""
        tokenizer = resolve_tokenizer(self.backbone)
        if tokenizer is None:
            return X
        tokens = tokenizer(X)
        longest = max(gather_over_ranks(tokens.shape[-1]))
        return tokens if tokens.shape[-1] == longest else tokenizer(X, longest)

    def _new_tokens(self, X: Any) -> Any:
        """Return new texts as token ids with a mask, of the length in ``fit``."""
        check_is_fitted(self)
        tokenizer = self._extractor.tokenizer
        return X if tokenizer is None else tokenizer(X, self.sample_shape_[-1])

    def _store(self, X: Any) -> Store | None:
        """Return the store for the output of the frozen layers, or None to keep nothing."""
        if self.feature_store is None:
            return None
        if self.feature_store != "auto":
            return disk_store(self.feature_store)
        # The trunk of the random network takes less time per sample than a look-up.
        return None if self.backbone is None and len(X.shape) == 2 else memory_store()

    def _warm_model(self, stages: TwoStageFit) -> LinearModel | None:
        """Return the previous solution, if it can be the start of a fit."""
        activation = stages.samples.activation
        shape = (stages.loss.n_outputs, activation.shape[1])
        if not self.warm_start or getattr(self, "coef_", np.empty(0)).shape != shape:
            return None
        shapes = {name: tuple(value.shape) for name, value in stages.parameters.items()}
        if {name: value.shape for name, value in self.gradient_coef_.items()} != shapes:
            return None
        return LinearModel.from_estimator(self, activation.device, activation.dtype)

    @neutral_state()
    def _logits(self, X: Any) -> npt.NDArray[Any]:
        """Return the logits, of shape (n_samples, n_outputs)."""
        X = validate_new_samples(self, self._new_tokens(X))
        extractor, model = self._extractor_and_model()
        batch_size = BatchSize(self.batch_size)
        return predict_logits(extractor, model, X, batch_size, bool(self.verbose), self._store(X))

    @neutral_state()
    def transform(self, X: Any) -> npt.NDArray[Any]:
        """Return the activations ``f(x)`` of the frozen network, which may have moved.

        These are the features of the first term of the model, ``W f``, so a model of other
        features, or another estimator, can be compared and combined with it.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            The activations. :meth:`set_output` chooses another container.
        """
        X = validate_new_samples(self, self._new_tokens(X))
        extractor, model = self._extractor_and_model()
        batch_size, verbose = BatchSize(self.batch_size), bool(self.verbose)
        return predict_activations(extractor, model, X, batch_size, verbose, self._store(X))

    @property
    def activation_layers_(self) -> dict[str, float]:
        """The layers of the activation from bottom to top, and their scales."""
        check_is_fitted(self)
        return self._extractor.activation_layers

    @property
    def _n_features_out(self) -> int:
        """The number of columns of :meth:`transform`, which :meth:`get_feature_names_out` names."""
        n_features: int = self.coef_.shape[1]
        return n_features

    @neutral_state()
    def _extractor_and_model(self) -> tuple[Extractor, LinearModel]:
        """Return the fitted network and linear model, on the device of the computation."""
        try:
            device = resolve_device(self.device)
        except ValueError:  # the estimator was fitted on a device that this machine lacks
            device = resolve_device("auto")
        extractor = self._extractor.on(device)
        return extractor, LinearModel.from_estimator(self, device, extractor.dtype)

    @fit_together()
    @neutral_state()
    def merge(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Move the network by the gradient term, and fit the output weights again.

        The parameters θ₂ of the frozen copy move by ``w₂``. The model has no gradient term then:
        a prediction is one forward pass, and :meth:`to_torch` returns an ordinary network. The
        penalty on the output weights is ``alpha_``. A model without a gradient term stays as it
        is.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            Samples of the shape that the estimator was fitted on, such as the same ones.
        y : array-like
            Their targets. Classifiers need the same classes.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples.

        Returns
        -------
        self
            The estimator.
        """
        tokens = self._new_tokens(X)
        X, y = validate_new_samples(self, tokens), validate_samples(copy.copy(self), tokens, y)[1]
        check_same_on_ranks(self, X, sample_weight, fitted=True)
        problem = self._problem(y, sample_weight)
        self._check_same_targets(problem)
        extractor, model = self._extractor_and_model()
        if not model.moves:
            return self
        names = list(model.displacements)
        prepared = self._prepared(X, extractor, names, self._pass(X, extractor, names))
        stages = TwoStageFit(prepared, problem).moved(model.total)
        activation = stages.samples.activation
        finite = (
            torch.isfinite(activation[rows]).all()
            for rows in row_blocks(*activation.shape, device=activation.device)
        )
        if not on_all_ranks(all(map(bool, finite))):
            raise ValueError(
                "The moved network returns NaN or infinity: gradient_alpha_="
                f"{self.gradient_alpha_:g} allows the parameters to move too far. Fit with a "
                "larger gradient_alpha."
            )
        merged = stages.fit_activation(self.alpha_).model
        self.__dict__.update(problem.restored(merged).attributes())
        return self

    def _check_same_targets(self, problem: Problem) -> None:
        """Raise an error unless targets are of the kind of those in ``fit``."""
        classes = problem.attributes.get("classes_")
        if classes is not None and not np.array_equal(classes, self.classes_):
            raise ValueError(
                f"y has the classes {classes}, but the estimator was fitted with {self.classes_}. "
                "Pass targets of all these classes."
            )
        kinds = ("_multilabel", "_single_output")
        same = all(
            value == getattr(self, name)
            for name, value in problem.attributes.items()
            if name in kinds
        )
        if not same or len(problem.offset) != len(self.intercept_):
            raise ValueError(
                "y has another shape than in fit: pass one column for each output or label of the "
                f"fitted model, which has {len(self.intercept_)}."
            )

    @neutral_state()
    def fine_tuned_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights of the backbone, with the gradient layers moved.

        The displacements ``gradient_coef_`` are added to the pretrained weights, and batch norms
        are taken out of the layers that they were folded into. So the weights load into the
        module that was passed as ``backbone``, before :func:`torch.compile`. In evaluation mode,
        the activations of this module are then those of a merged estimator, see :meth:`transform`
        and :meth:`merge`. A model with a gradient term has other predictions: there is a warning.
        The names of a named network of Hugging Face begin with ``model.``.

        Returns
        -------
        dict of str to torch.Tensor
            The state of the backbone, in host memory, for ``load_state_dict``.

        Raises
        ------
        ValueError
            If the backbone computes weights from others, as ``torch.nn.utils.parametrize`` does;
            with a ``negative_slope``, which no weight holds; or if layers share a batch norm
            that would have to change.
        """
        check_is_fitted(self)
        extractor, model = self._extractor_and_model()
        if extractor.negative_slope is not None:
            raise ValueError(
                f"negative_slope={extractor.negative_slope:g} is part of the fitted network and "
                "not of its weights. Use to_torch(), or fit with negative_slope=None."
            )
        state = extractor.backbone.displaced_state(model.total)
        if isinstance(self.backbone, nn.Module):
            expected = unwrapped(self.backbone).state_dict()
            if set(expected) != set(state):
                name = min(set(expected) ^ set(state))
                raise ValueError(
                    f"The weights do not fit the backbone, which computes {name!r} from others or "
                    "other tensors from it. Remove the parametrizations, or use to_torch()."
                )
        if model.moves:
            warnings.warn(
                "The model has a gradient term, so the moved weights have other predictions. Call "
                "merge(X, y) before fine_tuned_state_dict() for a model that has none.",
                stacklevel=2,
            )
        return state

    @neutral_state()
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to one file, without pickle.

        :func:`sklearn_gradfeat.load` reads it. The file holds the linear model, the parameters,
        and the weights of the backbone unless it is a named network or part of the package.
        For a ``backbone`` or ``preprocess`` that is code, the file holds only the name: pass the
        code to ``load`` again. Callbacks, metadata requests and output settings of scikit-learn
        are left out.

        Parameters
        ----------
        path : str or path-like
            The file, in the safetensors format. An existing file is replaced once the new one
            is complete.

        Raises
        ------
        ValueError
            If a parameter can only be stored by pickle, such as a ``RandomState``.
        """
        save_estimator(self, path)

    @neutral_state()
    def to_torch(self, device: str | torch.device = "cpu") -> nn.Module:
        """Return the fitted model as one torch module, for ``torch.export`` and ONNX.

        The module consists of plain operators: the derivative in the gradient layers is part of
        the graph. It takes batches of any size.

        Parameters
        ----------
        device : str or torch.device, default="cpu"
            The device of the module.

        Returns
        -------
        torch.nn.Module
            Maps a batch to probabilities, or to predictions for regressors and for squared
            errors. The batch is the output of ``preprocess``. A ``preprocess`` that is a torch
            module, such as that of a named network, is part of the returned module. With
            ``precision="bfloat16"`` the module computes in float32, and it rounds nothing with
            ``store_dtype="bfloat16"``.

        Raises
        ------
        ValueError
            If ``torch.export`` refuses the backbone, or if an operator in the gradient layers
            has no derivative that can be traced.
        """
        check_is_fitted(self)
        extractor = self._extractor.on(resolve_device(device))
        device = extractor.backbone.example.device
        model = LinearModel.from_estimator(self, device, extractor.dtype)
        return LinearizedNetwork(extractor, model, self._output()).frozen()

    def _output(self) -> nn.Module:
        """Return the module from the logits to the output of :meth:`to_torch`."""
        return nn.Identity()

    def __sklearn_clone__(self) -> Any:
        """Return an unfitted estimator that shares the backbone instead of copying it."""
        parameters = {
            name: value if name == "backbone" else clone(value, safe=False)
            for name, value in self.get_params(deep=False).items()
        }
        cloned = type(self)(**parameters)
        for name in ("_metadata_request", "_sklearn_output_config"):
            if name in vars(self):
                setattr(cloned, name, copy.deepcopy(getattr(self, name)))
        if hasattr(self, "_skl_callbacks"):
            cloned._skl_callbacks = self._skl_callbacks
        return cloned

    def __getstate__(self) -> dict[str, Any]:
        """Return the state in host memory; backbone and frozen copy share equal tensors."""
        state = dict(super().__getstate__())
        if isinstance(self.backbone, nn.Module):
            if "_extractor" in state:
                state["backbone"] = on_host(self.backbone)
                state["_extractor"] = state["_extractor"].sharing(state["backbone"])
            else:
                state["backbone"] = Pickled(self.backbone)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; the frozen network is independent of the backbone again."""
        if isinstance(state["backbone"], Pickled):  # of copy.copy, which pickles nothing
            state["backbone"] = state["backbone"].module
        super().__setstate__(state)
        if "gradient_coef_" in state:  # pickles of older versions lack the point
            self.__dict__.setdefault("linearization_point_", {})
        if isinstance(self.backbone, nn.Module) and hasattr(self, "_extractor"):
            self._extractor = self._extractor.apart()

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        """Return the estimator as text, with a name in place of a network."""
        return text_of(self)

    def _get_params_html(self, deep: bool = True, doc_link: str = "") -> Any:
        """Return the table of parameters in the HTML diagram, with the name of a network."""
        table = super()._get_params_html(deep, doc_link)
        if isinstance(self.backbone, nn.Module):
            table["backbone"] = f"<{named(self.backbone)}>"
        return table

    def _sk_visual_block_(self) -> Any:
        """Return the block of the HTML diagram, with the backbone as its caption."""
        try:
            from sklearn.utils._repr_html.estimator import _VisualBlock
        except ImportError:  # scikit-learn 1.6
            from sklearn.utils._estimator_html_repr import _VisualBlock
        name = type(self).__name__
        return _VisualBlock(
            "single", self, names=name, name_details=str(self), name_caption=caption(self)
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags
