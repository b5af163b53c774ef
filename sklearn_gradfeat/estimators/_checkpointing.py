"""What a fit depends on, which a checkpoint must have been written with."""

from __future__ import annotations

import os
import reprlib
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from sklearn_gradfeat.backbones import default_name, stored_weights
from sklearn_gradfeat.cache import CachedSamples, Extractor
from sklearn_gradfeat.data import Ranks, gather_over_ranks, n_ranks
from sklearn_gradfeat.estimators._same_on_ranks import FITTED, FREE, digest_of
from sklearn_gradfeat.io import Checkpoint, Described, describe

_FREE = (*FREE, "n_jobs", "cv")
_VERSIONS = ("torch", "sklearn_gradfeat")


def open_checkpoint(
    estimator: Any, X: Any, y: npt.NDArray[Any], weights: npt.NDArray[np.float64]
) -> Checkpoint | None:
    """Return the checkpoint of a fit, None without one.

    Raises
    ------
    ValueError
        If the file is not a checkpoint, or is that of a fit with other parameters, targets or
        weights; the message names them.
    OSError
        If no file can be written there.
    """
    if estimator.checkpoint is None:
        return None
    known = {}
    if estimator.warm_start:
        fitted = {name: getattr(estimator, name, None) for name in FITTED}
        known["the fitted model, from which warm_start starts"] = fitted
    return _opened(estimator, estimator.checkpoint, X, y, weights, n_ranks(), known)


def open_checkpoint_of_search(
    estimator: Any,
    X: Any,
    y: npt.NDArray[Any],
    weights: npt.NDArray[np.float64],
    ranks: Ranks,
    folds: Any,
    to_score: dict[str, Any],
) -> Checkpoint | None:
    """Return the checkpoint of a search, None without one: a file for each rank.

    ``folds`` takes the place of ``cv``, and ``to_score`` is the metadata for the scorer. The errors
    are those of :func:`open_checkpoint`.
    """
    if estimator.checkpoint is None:
        return None
    path = os.fspath(estimator.checkpoint) + (f".rank{ranks.rank}" if ranks.rank else "")
    known = {"cv or groups": folds, "the metadata for the scorer": to_score}
    return _opened(estimator, path, X, y, weights, ranks.size, known)


def _opened(
    estimator: Any,
    path: str | os.PathLike[str],
    X: Any,
    y: npt.NDArray[Any],
    weights: npt.NDArray[np.float64],
    n_processes: int,
    known: dict[str, Any],
) -> Checkpoint:
    """Return the checkpoint of a fit that depends on ``known`` as well."""
    is_random = estimator.backbone is None and default_name(tuple(X.shape[1:])) is None
    if is_random and estimator.random_state is None:
        raise ValueError(
            "checkpoint needs random_state: with random_state=None, every fit draws another random "
            "network, so none could go on with the checkpoint of another. Set random_state=0."
        )
    checkpoint = Checkpoint(path)
    parameters = estimator.get_params(deep=False)
    given = {
        "the class": type(estimator).__name__,
        **{name: value for name, value in parameters.items() if name not in _FREE},
        **{f"the version of {name}": import_module(name).__version__ for name in _VERSIONS},
        "the number of processes": n_processes,
    }
    header = {name: _described(value, reprlib.repr(value)) for name, value in given.items()}
    header["y"] = _described(y)
    header["sample_weight or class_weight"] = _described(weights)
    header |= {name: _described(value) for name, value in known.items()}
    checkpoint.check(header)
    return checkpoint


def of_network(extractor: Extractor, names: list[str]) -> dict[str, Described]:
    """Return the digests of a network and its gradient layers."""
    known, module = extractor.backbone.fingerprint, extractor.backbone.module.module
    network = known.digest if known.portable else (describe(module), stored_weights(module))
    precision = str((extractor.dtype, extractor.backbone.dtype))
    return {
        "the network": _described(network),
        "the parameters of gradient_layers": _described(names, reprlib.repr(names)),
        "the precision": _described(precision, precision),
    }


def of_samples(X: Any, samples: CachedSamples) -> dict[str, Described]:
    """Return the digest of the samples."""
    return {"X": _described((str(X.dtype), tuple(X.shape[1:]), samples.names))}


def _described(value: Any, text: str = "") -> Described:
    """Return a digest of the values of all ranks."""
    return Described(digest_of(gather_over_ranks(digest_of(value))).hex(), text)
