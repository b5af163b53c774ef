"""The linear model over a network by dense matrices, in float64, without the package."""

import copy

import numpy as np
import torch
from scipy.special import expit, log_expit, logsumexp, softmax
from torch import nn
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.reliability.random_networks import NORMS, called


class DenseNetwork:
    """Activations of the original module as a function of folded parameters.

    Parameters
    ----------
    network : nn.Module
        The original network.
    layers : list of (str, int) or None
        Paths and channel axes of the outputs that make up the activation, each divided by its root
        mean square; None for the output of one module.
    path : str
        The module whose output is the activation, if ``layers`` is None.
    axis : int
        The axis of its channels.
    folded : dict of str to str
        The batch norm after each layer into which one is folded.
    """

    def __init__(self, network, layers, path, axis, folded):
        self.network = copy.deepcopy(network).double()
        for module in self.network.modules():  # the same function, with a shift that can move
            if isinstance(module, NORMS) and not module.affine:
                module.affine = True
                module.weight = nn.Parameter(torch.ones_like(module.running_mean))
                module.bias = nn.Parameter(torch.zeros_like(module.running_mean))
        self.layers, self.path, self.axis, self.folded = layers, path, axis, folded
        self.scales = None

    def balance(self, X, weights):
        """Set the scale of every layer by the samples of the fit."""
        if self.layers is None:
            return
        with torch.no_grad():
            parts = [p.numpy() for p in self._parts({}, X)]
        squares = [float((weights @ p**2).mean()) for p in parts]
        self.scales = [1 / np.sqrt(s) if s > 0 else 1.0 for s in squares]

    def parameters(self, names):
        """Return the values of folded parameters by name."""
        values = dict(self.network.named_parameters())
        found = {}
        for name in names:
            layer, norm = self._fold_of(name)
            if layer is None:
                found[name] = values[name].detach()
                continue
            s, own, mean, shift = self._constants(layer, norm)
            if name == f"{layer}.weight":
                weight = values[name].detach()
                found[name] = weight * s.view(-1, *[1] * (weight.ndim - 1))
            else:
                found[name] = s * (own - mean) + shift
        return found

    def activation(self, theta, X):
        """Return the activations with the folded parameters ``theta``."""
        parts = self._parts(theta, X)
        if self.scales is None:
            return parts[0]
        return torch.cat([s * p for s, p in zip(self.scales, parts, strict=True)], 1)

    def jacobian(self, theta, X, omega):
        """Return ``Ω J`` in the flat vector of the parameters: (n_samples, n_outputs, p)."""
        omega = torch.as_tensor(omega, dtype=torch.float64)

        def outputs(values):
            return self.activation(values, X) @ omega.T

        with sdpa_kernel(SDPBackend.MATH):
            found = jacrev(outputs)(theta)
        return torch.cat([found[n].flatten(2) for n in theta], 2).detach().numpy()

    def _parts(self, theta, X):
        replaced = dict(theta)
        for layer, norm in self.folded.items():
            s, own, mean, _ = self._constants(layer, norm)
            weight = replaced.pop(f"{layer}.weight", None)
            if weight is not None:
                replaced[f"{layer}.weight"] = weight / s.view(-1, *[1] * (weight.ndim - 1))
            for name in (f"{layer}.bias", f"{norm}.bias"):
                if name in theta:
                    del replaced[name]
                    replaced[f"{norm}.bias"] = theta[name] - s * (own - mean)
        outputs = called(self.network, X, replaced)
        if self.layers is None:
            return [_averaged(outputs[self.path], self.axis)]
        return [_averaged(outputs[path], axis) for path, axis in self.layers]

    def _fold_of(self, name):
        path, _, last = name.rpartition(".")
        for layer, norm in self.folded.items():
            if path == layer or (path == norm and last == "bias"):
                return layer, norm
        return None, None

    def _constants(self, layer, norm):
        layer, norm = self.network.get_submodule(layer), self.network.get_submodule(norm)
        s = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        own = torch.zeros_like(s) if layer.bias is None else layer.bias.detach()
        return s, own, norm.running_mean, norm.bias.detach()


def _averaged(output, axis):
    return output.movedim(axis, 1).flatten(2).mean(2) if output.ndim > 2 else output


class Loss:
    """A loss of the logits (n_samples, n_outputs), with weights that add up to one."""

    def __init__(self, kind, targets, weights, epsilon=1.35):
        self.kind, self.targets, self.weights, self.epsilon = kind, targets, weights, epsilon

    def value(self, Z):
        y, rows = self.targets, np.arange(len(Z))
        if self.kind == "multinomial":
            losses = logsumexp(Z, 1) - Z[rows, y]
        elif self.kind == "bernoulli":
            losses = -log_expit((2 * y - 1) * Z).sum(1)
        elif self.kind == "squared":
            losses = ((Z - y) ** 2).sum(1) / 2
        else:
            errors = abs(Z - y)
            near = np.minimum(errors, self.epsilon)
            losses = (near * (errors - near / 2)).sum(1)
        return self.weights @ losses

    def gradient(self, Z):
        y = self.targets
        if self.kind == "multinomial":
            slope = softmax(Z, 1)
            slope[np.arange(len(Z)), y] -= 1
        elif self.kind == "bernoulli":
            slope = expit(Z) - y
        else:
            slope = Z - y if self.kind == "squared" else np.clip(Z - y, -self.epsilon, self.epsilon)
        return slope * self.weights[:, None]

    def hessians(self, Z, majorant):
        """Return the Hessian blocks; or, of Huber's loss, those of a parabola above it."""
        if self.kind == "multinomial":
            p = softmax(Z, 1)
            blocks = p[:, :, None] * (np.eye(Z.shape[1]) - p[:, None])
        else:
            curvature = np.ones_like(Z)
            if self.kind == "bernoulli":
                curvature = expit(Z) * expit(-Z)
            elif self.kind == "huber":
                errors = np.maximum(abs(Z - self.targets), self.epsilon)
                curvature = self.epsilon / errors if majorant else errors <= self.epsilon
            blocks = curvature[:, :, None] * np.eye(Z.shape[1])
        return blocks * self.weights[:, None, None]


def minimum(loss, columns, intercept, shape):
    """Return the smallest ``loss(b + A z) + ‖z‖² / 2`` and the logits there, by Newton's method.

    ``columns`` is a list of arrays (n_samples * n_outputs, p), already divided by the square
    roots of their penalties. The unknowns are the coordinates along the singular vectors of ``A``,
    in units in which the curvature of a squared loss would be one: singular values of 1e6 would
    cost all digits.
    """
    n, c = shape
    A = np.hstack(columns) if columns else np.zeros((n * c, 0))
    left, sizes, _ = np.linalg.svd(A, full_matrices=False)
    free = np.tile(np.eye(c), (n, 1)) if intercept else np.zeros((n * c, 0))
    rows = np.hstack([free, left * (sizes / np.sqrt(1 + sizes**2))])
    penalty = np.append(np.zeros(free.shape[1]), 1 / (1 + sizes**2))
    blocks, x = rows.reshape(n, c, -1), np.zeros(rows.shape[1])

    def logits(x):
        return (rows @ x).reshape(n, c)

    def value(x):
        return loss.value(logits(x)) + penalty @ x**2 / 2

    start = current = value(x)
    stuck = 0
    for i in range(1000):
        Z = logits(x)
        gradient = rows.T @ loss.gradient(Z).ravel() + penalty * x
        curved = np.einsum("nij,njk->nik", loss.hessians(Z, i % 2), blocks).reshape(n * c, -1)
        hessian = rows.T @ curved + np.diag(penalty)
        step = -np.linalg.lstsq(hessian, gradient, rcond=1e-15)[0]
        decrement, t = -gradient @ step, 1.0
        while value(x + t * step) > current - 1e-4 * t * decrement and t > 1e-10:
            t /= 2
        stuck = stuck + 1 if t <= 1e-10 or decrement <= 1e-15 * start else 0
        if stuck == 2:  # both curvatures leave nothing but rounding errors
            return current, logits(x)
        if t > 1e-10:
            x, current = x + t * step, value(x + t * step)
    raise AssertionError("the dense solver did not converge")
