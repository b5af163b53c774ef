"""Criteria on the training data alone that penalties could be chosen by, against test data.

For every pair of penalties of a grid the model is fitted, and judged by

* "leave-one-out": the log loss of every sample after a Newton step towards the fit without it,
  with the exact Hessian of all unknowns, at the output weights `Ω` of all samples;
* "degrees of freedom": the training loss plus, for every sample, the trace of the Hessian of the
  loss in units of that of the objective.

The table has the test accuracy with the pair that each criterion likes best, that with the pair of
the smallest test loss, and the highest in the grid. Hessians are inverted by way of the Gram matrix
of the samples, so these are few.

    python examples/benchmarks/penalty_criteria.py --data cifar10.zip
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from _datasets import read_images
from _setup import digits, save
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.curvature._sample_space import tangent_gram
from sklearn_gradfeat.solvers._lbfgs import minimize
from sklearn_gradfeat.training import _stages

N_TRAIN = 400  # times ten classes is what a Gram matrix may have
FLAT = 1e-6  # the penalty of the intercept


def rows(path):
    """Return model, training and test data of the random network, and its grid."""
    model, X, y = digits()
    X, X_test, y, y_test = train_test_split(X, y, train_size=N_TRAIN, random_state=0, stratify=y)
    return model, (X, y), (X_test, y_test), (np.logspace(-4, -1, 4), np.logspace(-4, 0, 5))


def encoder(name):
    """Return the function that does so for a shipped network."""

    def task(path):
        model = GradientFeatureClassifier(name, gradient_layers=["conv5"])
        train, test = read_images(path, "train", N_TRAIN), read_images(path, "test", 3000)
        return model, train, test, (np.logspace(-4, -1, 4), np.logspace(-6, -2, 5))

    return task


PROBLEMS = {
    "digits, random MLP": rows,
    "rotation encoder, conv5": encoder("convnet-rotation"),
    "VAE encoder, conv5": encoder("convnet-vae"),
}


def fitted(model, X, y):
    """Fit, and return the objective of the second stage and its optimum."""
    caught = []

    def catching(objective, *args, **kwargs):
        solution = minimize(objective, *args, **kwargs)
        caught.append((objective, solution.x))
        return solution

    with mock.patch.object(_stages, "minimize", catching):
        model.fit(X, y)
    return caught[-1]


def leverages(objective, curvatures):
    """Return how much the logits of every sample follow a change of its own loss gradient."""
    n_samples, n_outputs, _ = curvatures.shape
    one = torch.eye(n_outputs).double()
    features = objective.activation.double()
    kernel = torch.kron(features @ features.T / objective.alpha + 1 / FLAT, one)
    kernel += tangent_gram(objective.tangent, n_samples).double() / objective.tangent.alpha
    values, vectors = torch.linalg.eigh(curvatures)
    root = vectors * values.clamp(min=0).sqrt()[:, None] @ vectors.mT
    half = torch.bmm(root, kernel.view(n_samples, n_outputs, -1)).view_as(kernel)
    system = torch.bmm(root, half.T.reshape(n_samples, n_outputs, -1)).view_as(kernel)
    system.diagonal().add_(1)
    solved = torch.linalg.solve_triangular(torch.linalg.cholesky(system), half, upper=False)
    shape = (n_samples, n_outputs, n_samples, n_outputs)
    own = kernel.view(shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    seen = solved.T.reshape(n_samples, n_outputs, -1)
    return own - seen @ seen.mT


def criteria(objective, x):
    """Return the value of every criterion, the smaller the better."""
    loss, logits = objective.loss, objective.forward(x)
    p = logits.softmax(1)
    curvatures = loss.weights[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    leverage = leverages(objective, curvatures)
    gradient = loss.gradient(logits)[:, :, None]
    change = torch.linalg.solve(torch.eye(p.shape[1]) - leverage @ curvatures, leverage @ gradient)
    trace = (leverage * curvatures).sum((1, 2))
    return {
        "leave-one-out": loss.value(logits + change[:, :, 0]),
        "degrees of freedom": loss.value(logits) + float(trace.mean()),
    }


def compare(name, path):
    """Return one row for each pair of penalties."""
    model, train, test, (alphas, gradient_alphas) = PROBLEMS[name](path)
    found = []
    for alpha in alphas.tolist():
        for gradient_alpha in gradient_alphas.tolist():
            model.set_params(alpha=alpha, gradient_alpha=gradient_alpha)
            values = criteria(*fitted(model, *train))
            p = model.predict_proba(test[0])
            found.append(
                {
                    "problem": name,
                    "alpha": alpha,
                    "gradient_alpha": gradient_alpha,
                    **values,
                    "test loss": log_loss(test[1], p, labels=model.classes_),
                    "accuracy": 100 * float((model.classes_[p.argmax(1)] == test[1]).mean()),
                }
            )
    return found


def table(found):
    """Return the choices as a Markdown table."""
    by = ("leave-one-out", "degrees of freedom", "test loss")
    lines = [f"| problem | {' | '.join(by)} | highest |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(row["problem"] for row in found):
        own = [row for row in found if row["problem"] == name]
        chosen = [min(own, key=lambda row, k=k: row[k])["accuracy"] for k in by]
        chosen.append(max(row["accuracy"] for row in own))
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in chosen)} |")
    return "\n".join(lines)


def main():
    """Run what was asked for, write JSON, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/ and test/<class>/*.jpg")
    parser.add_argument("--output", type=Path, default=Path("penalty_criteria.json"))
    arguments = parser.parse_args()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, task in PROBLEMS.items():
            if task is not rows and arguments.data is None:
                print(f"{name}: skipped, there is no --data.")
                continue
            found += compare(name, arguments.data)
            save(found, arguments, n_train=N_TRAIN)
    print("Test accuracy with the penalties that a criterion likes best:\n")
    print(table(found))


if __name__ == "__main__":
    main()
