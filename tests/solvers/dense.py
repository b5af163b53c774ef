"""Linear objectives with an explicit matrix, in float64, that count their passes."""

import numpy as np
import torch
from scipy.optimize import minimize as scipy_minimize

from sklearn_gradfeat.linearized import Bernoulli, Huber, Multinomial, Squared

LOSSES = {
    "multinomial": lambda y, w: Multinomial(y.argmax(1), w, y.shape[1]),
    "bernoulli": lambda y, w: Bernoulli((y > 0).double(), w),
    "squared": Squared,
    "huber": lambda y, w: Huber(y, w, 0.4),
}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


class Dense:
    """``loss(A x) + Σ penalty x² / 2`` for a matrix of shape (n_samples, n_outputs, n)."""

    def __init__(self, loss, matrix, penalty):
        self.loss, self.matrix, self.penalty, self.passes = loss, matrix, penalty, 0

    def forward(self, x):
        self.passes += 1
        return self.matrix @ x

    def adjoint(self, cotangent):
        self.passes += 1
        return torch.einsum("ncp,nc->p", self.matrix, cotangent)

    @property
    def penalties(self):
        return (self.penalty,)

    def forward_adjoint(self, direction, logits):
        change = self.forward(direction)
        self.passes -= 1
        return change, self.adjoint(self.loss.gradient(logits + change))

    def value(self, x):
        return self.loss.value(self.matrix @ x) + float(self.penalty @ x**2) / 2

    def gradient(self, x):
        residual = self.loss.gradient(self.matrix @ x)
        return torch.einsum("ncp,nc->p", self.matrix, residual) + self.penalty * x

    def hessian(self, logits):
        """Return the Hessian, with the curvature of the loss between outputs left out."""
        A = self.matrix.flatten(0, 1)
        curvatures = self.loss.curvatures(logits).reshape(-1, 1)
        return A.T @ (curvatures * A) + torch.diag(self.penalty)

    def inverse(self, logits):
        """Return the function that applies the inverse of that Hessian."""
        inverse = torch.linalg.inv(self.hessian(logits))
        return lambda x: inverse @ x

    def optimum(self):
        """Return the minimiser, found by another solver."""

        def value_and_gradient(x):
            x = torch.from_numpy(x)
            return self.value(x), self.gradient(x).numpy()

        start = np.zeros(self.matrix.shape[2])
        options = {"maxiter": 20000, "maxfun": 40000, "gtol": 1e-12, "ftol": 1e-16}
        found = scipy_minimize(
            value_and_gradient, start, jac=True, method="L-BFGS-B", options=options
        )
        return torch.from_numpy(found.x)


def problem(kind, n=30, n_outputs=3, size=8, seed=0):
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss = LOSSES[kind](normal(n, n_outputs, seed=seed + 1), weights / weights.sum())
    penalty = torch.logspace(-3, -1, size, dtype=torch.float64)
    return Dense(loss, normal(n, n_outputs, size, seed=seed + 2), penalty)
