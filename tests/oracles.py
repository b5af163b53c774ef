"""Slow, obviously right versions of what the package computes."""

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logsumexp, softmax
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense_jacobian(module, names, X):
    """Jacobian of the activation in the named parameters, (n, d, n_parameters), float64."""
    module = module.double().eval()
    parameters = {n: p.detach() for n, p in module.named_parameters() if n in names}

    def activation(values):
        out = functional_call(module, values, (torch.as_tensor(X, dtype=torch.float64),))
        return out.flatten(2).mean(2) if out.ndim > 2 else out

    with sdpa_kernel(SDPBackend.MATH):
        blocks = jacrev(activation)(parameters)
    return torch.cat([blocks[n].flatten(2) for n in names], 2).detach().numpy()


def ntk_scales(module, names):
    """The scale of every number in the flat vector of parameters."""
    parameters = dict(module.named_parameters())
    return np.concatenate(
        [
            np.full(
                parameters[n].numel(),
                np.sqrt(1 / parameters[n].shape[0]) if parameters[n].ndim > 1 else np.sqrt(0.1),
            )
            for n in names
        ]
    )


def dense_optimum(f, gradient_features, y, weights, alpha, gradient_alpha, n_outputs, kind):
    """Minimise the objective of stage two over explicit features by dense BFGS/Newton.

    ``gradient_features`` has shape (n, n_outputs, p): the rows Ωᵀ J of every output.
    """
    n, d = f.shape
    p = gradient_features.shape[2]
    w = weights / weights.sum()

    def logits(x):
        W, b, u = x[: n_outputs * d].reshape(n_outputs, d), x[n_outputs * d : -p], x[-p:]
        return f @ W.T + b + gradient_features @ u

    def objective(x):
        Z = logits(x)
        if kind == "multinomial":
            loss = w @ (logsumexp(Z, 1) - Z[np.arange(n), y])
            R = (softmax(Z, 1) - np.eye(n_outputs)[y]) * w[:, None]
        else:
            loss = w @ (-log_expit(-Z) - y * Z).sum(1)
            R = (expit(Z) - y) * w[:, None]
        W, u = x[: n_outputs * d], x[-p:]
        value = loss + alpha / 2 * W @ W + gradient_alpha / 2 * u @ u
        gradient = np.concatenate(
            [
                (R.T @ f).ravel() + alpha * W,
                R.sum(0),
                np.einsum("nc,ncp->p", R, gradient_features) + gradient_alpha * u,
            ]
        )
        return value, gradient

    start = np.zeros(n_outputs * d + n_outputs + p)
    options = {"maxiter": 20000, "maxfun": 40000, "maxcor": 50, "gtol": 1e-11, "ftol": 1e-16}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.fun, logits(found.x)


def dense_regression(
    f, gradient_features, Y, weights, alpha, gradient_alpha, intercept=True, epsilon=None
):
    """Predictions of the regression of stage two over explicit features.

    One row for every sample and output, by normal equations; or Huber's loss by BFGS.
    """
    (n, d), (c, p) = f.shape, gradient_features.shape[1:]
    eye = np.tile(np.eye(c), (n, 1))
    own = np.einsum("nd,ce->nced", f, np.eye(c)).reshape(n * c, c * d)
    rows = np.hstack([own, eye * intercept, gradient_features.reshape(n * c, p)])
    penalty = np.repeat([alpha, 0.0 if intercept else 1.0, gradient_alpha], [c * d, c, p])
    w, y = np.repeat(weights / weights.sum(), c), Y.reshape(-1)
    if epsilon is None:
        x = np.linalg.solve((rows.T * w) @ rows + np.diag(penalty), rows.T @ (w * y))
        return (rows @ x).reshape(n, c)

    def objective(x):
        error = rows @ x - y
        slope = np.clip(error, -epsilon, epsilon)
        loss = np.where(slope == error, error**2 / 2, epsilon * np.abs(error) - epsilon**2 / 2)
        return w @ loss + penalty @ x**2 / 2, rows.T @ (w * slope) + penalty * x

    options = {"maxiter": 20000, "maxfun": 40000, "maxcor": 50, "gtol": 1e-11, "ftol": 1e-16}
    found = minimize(
        objective, np.zeros(len(penalty)), jac=True, method="L-BFGS-B", options=options
    )
    return (rows @ found.x).reshape(n, c)
