"""The checks that all ranks of a process group fit the same estimator, and search on the same X."""

from __future__ import annotations

import reprlib
from importlib import import_module
from typing import Any

from sklearn_gradfeat.backbones import FrozenBackbone, UndigestibleError, digest
from sklearn_gradfeat.data import gather_over_ranks, n_ranks

# The network is compared by its digest, and rank 0 draws the seed. The others may differ.
FREE = (
    "backbone", "random_state", "device", "batch_size", "feature_store", "checkpoint", "verbose",
)  # fmt: skip
_VERSIONS = ("torch", "sklearn", "sklearn_gradfeat")
FITTED = ("coef_", "intercept_", "omega_", "gradient_coef_", "linearization_point_")


def check_same_on_ranks(estimator: Any, X: Any, sample_weight: Any, *, fitted: bool) -> None:
    """Raise an error unless the ranks have equal parameters and samples of one kind.

    Parameters
    ----------
    estimator : estimator
        The estimator of this rank.
    X : ndarray or lazy array of shape (n_samples, ...)
        The validated samples of this rank.
    sample_weight : array-like or None
        Their weights.
    fitted : bool
        Whether the fit starts from the fitted model, which must be the same, too.

    Raises
    ------
    ValueError
        If they differ; the message names the parameter and the ranks.
    """
    if n_ranks() == 1:
        return
    compared = {
        "class": type(estimator).__name__,
        **{
            name: value
            for name, value in estimator.get_params(deep=False).items()
            if name not in FREE
        },
        "X.shape[1:]": tuple(X.shape[1:]),
        "X.dtype": str(X.dtype),
        "feature_names_in_": list(getattr(estimator, "feature_names_in_", ())),
        "sample_weight": "None" if sample_weight is None else "given",
        "checkpoint": "None" if getattr(estimator, "checkpoint", None) is None else "given",
        **{f"the version of {name}": import_module(name).__version__ for name in _VERSIONS},
    }
    if fitted:
        compared |= {name: getattr(estimator, name, None) for name in FITTED}
    _compare(compared)


def check_same_network(backbone: FrozenBackbone, names: list[str]) -> None:
    """Raise an error unless the ranks have equal networks and gradient layers."""
    if n_ranks() == 1:
        return
    known = backbone.fingerprint
    value = known.digest if known.portable else dict(backbone.module.state_dict())
    _compare({"backbone": value, "gradient_layers": names})


def check_same_samples(estimator: Any, **values: Any) -> None:
    """Raise an error unless every rank has all samples.

    Parameters
    ----------
    estimator : estimator
        The estimator whose search is split over the ranks.
    **values : objects
        What describes the samples, by name.

    Raises
    ------
    ValueError
        If a rank has another value than rank 0.
    """
    if n_ranks() == 1:
        return
    first, *others = gather_over_ranks({name: digest_of(value) for name, value in values.items()})
    for name, of_first in first.items():
        differing = [f"rank {i}" for i, other in enumerate(others, 1) if other[name] != of_first]
        if differing:
            kind = type(estimator).__name__
            raise ValueError(
                f"{name} of {', '.join(differing)} differs from that of rank 0. The ranks of a "
                f"process group split the fits of {kind} among them, so each rank must pass all "
                "samples, in the same order, and a cv that shuffles needs a random_state. For "
                f"samples that are spread over the ranks, use {kind.removesuffix('CV')}, which "
                "chooses alpha='auto' and gradient_alpha='auto' over all of them."
            )


def _compare(values: dict[str, Any]) -> None:
    """Raise an error that names the first value of which a rank has another one than rank 0."""
    described = {name: (digest_of(value), reprlib.repr(value)) for name, value in values.items()}
    first, *others = gather_over_ranks(described)
    for name, (of_first, shown_first) in first.items():
        differing = [
            (rank, other[name][1])
            for rank, other in enumerate(others, 1)
            if other[name][0] != of_first
        ]
        if not differing:
            continue
        found = ", ".join(f"{shown} on rank {rank}" for rank, shown in differing)
        if name == "backbone":
            found = ", ".join(f"rank {rank}" for rank, _ in differing)
            raise ValueError(
                f"backbone: the network of {found} differs from that of rank 0 in its operators or "
                "its weights. Load the same weights on all ranks."
            )
        raise ValueError(
            f"All ranks of the process group must fit with the same parameters, but {name} is "
            f"{shown_first} on rank 0 and {found}. Pass the same value on all ranks."
        )


def digest_of(value: Any) -> bytes:
    """Return a digest of a value, or of its type for code of the user."""
    try:
        return digest(value)
    except UndigestibleError:
        return digest(type(value).__qualname__)
