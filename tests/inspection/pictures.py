"""Images and an oracle for the tests of the displays."""

import numpy as np
import torch
from torch.func import functional_call, jvp

from tests.tiny import Y

DOUBLE = {"precision": "float64", "max_iter": 15, "gradient_alpha": 1e-3}


def two_channels():
    """Return images of two channels with the classes of ``tests.tiny``."""
    noise = np.random.default_rng(0).normal(size=(24, 2, 5, 5))
    return noise + Y[:, None, None, None]


def gradient_term(model, module, x):
    """``Ω J(x) w₂`` by torch's own forward mode through the module, without folding."""
    names = model.gradient_layers_
    values = {n: p.detach() for n, p in module.double().named_parameters() if n in names}
    moves = {n: torch.as_tensor(model.gradient_coef_[n]) for n in names}

    def activation(values):
        out = functional_call(module, values, (x,))
        return out.flatten(2).mean(2) if out.ndim > 2 else out

    with torch.no_grad():
        tangent = jvp(activation, (values,), (moves,))[1]
    return tangent @ torch.as_tensor(model.omega_).T
