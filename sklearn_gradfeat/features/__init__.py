"""The trunk's output for any number of samples, each computed once."""

from sklearn_gradfeat.features._trunk import Features, compute_features, trunk_batches

__all__ = ["Features", "compute_features", "trunk_batches"]
