"""The network for rows of numbers: wide, and random."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

_WIDTH = 256
_DEPTH = 2


@functools.lru_cache(maxsize=16)
def random_mlp(n_features: int, seed: int) -> nn.Sequential:
    """Return a wide multi-layer perceptron with random weights, in float64.

    The same one for the same arguments, so that folds and candidates share its graph.

    Weights are N(0, 2 / fan_in) and biases N(0, 0.01): the function that the NTK
    parametrization [1]_ draws at its start, with the gain that keeps the scale of the
    activations through rectifiers.

    Parameters
    ----------
    n_features : int
        Number of columns of the input.
    seed : int
        Seed of the weights.

    Returns
    -------
    nn.Sequential
        Linear layers and rectifiers, ending in a rectifier; 256 activations.

    References
    ----------
    .. [1] A. Jacot, F. Gabriel, C. Hongler, Neural Tangent Kernel: Convergence and
       Generalization in Neural Networks, NeurIPS 2018, arXiv:1806.07572.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    fan_in = n_features
    for _ in range(_DEPTH):
        linear = nn.Linear(fan_in, _WIDTH, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.normal_(0, math.sqrt(2 / fan_in), generator=generator)
            linear.bias.normal_(0, 0.1, generator=generator)
        layers += [linear, nn.ReLU()]
        fan_in = _WIDTH
    return nn.Sequential(*layers)
