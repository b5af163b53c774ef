"""The trunk's output for any number of samples, each computed once."""

from sklearn_gradfeat.features._trunk import (
    NOT_FINITE,
    Features,
    compute_features,
    trunk_batches,
)

__all__ = ["NOT_FINITE", "Features", "compute_features", "trunk_batches"]
