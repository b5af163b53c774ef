"""Criteria on the training data alone by which penalties could be selected, against test data.

For every pair of penalties of a grid, the model is fitted and two criteria are computed:

* "leave-one-out": the log loss of every sample after a Newton step towards the fit without it,
  with the exact Hessian of all unknowns, at the output weights `Ω` of all samples;
* "degrees of freedom": the training loss plus, averaged over samples, the trace of the Hessian of
  the loss in units of that of the objective.

The table has the test accuracy with the best pair of each criterion, that with the pair of the
smallest test loss, and the highest of the grid. Hessians are inverted by way of the Gram matrix of
the samples, so the samples are few.

    python examples/benchmarks/penalty_criteria.py --data cifar10.zip
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from _datasets import read_images
from _setup import digits, save, two_stages
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.curvature import tangent_gram

N_TRAIN = 400  # with ten classes, the largest Gram matrix
INTERCEPT_PENALTY = 1e-6


def rows(path):
    """Return the model, training data, test data and grid of the random network."""
    model, X, y = digits()
    X, X_test, y, y_test = train_test_split(X, y, train_size=N_TRAIN, random_state=0, stratify=y)
    return model, (X, y), (X_test, y_test), (np.logspace(-4, -1, 4), np.logspace(-4, 0, 5))


def encoder(name):
    """Return the function that does the same for a network of the package."""

    def task(path):
        model = GradientFeatureClassifier(name, gradient_layers=["conv5"], activation_layer=None)
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
    stages = two_stages(model, X, y)
    first = stages.fit_activation(model.alpha)
    linear, solution = stages.fit_gradient(first, model.gradient_alpha, first.model)
    model.__dict__.update(stages.attributes | linear.attributes())
    return stages.second_objective(first, model.gradient_alpha), solution.x


def leverages(objective, curvatures):
    """Return the change of the logits of every sample per change of its own loss gradient.

    With the kernel ``K`` of the samples in units of the penalties, and the square root ``R`` of the
    curvatures, these are the diagonal blocks of ``K - K R (1 + R K R)⁻¹ R K``.
    """
    n_samples, n_outputs, _ = curvatures.shape
    one = torch.eye(n_outputs).double()
    activation = objective.activation.double()
    kernel = torch.kron(activation @ activation.T / objective.alpha + 1 / INTERCEPT_PENALTY, one)
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
    """Return the value of every criterion; smaller is better."""
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
    """Return the accuracies with the selected penalties as a Markdown table."""
    by = ("leave-one-out", "degrees of freedom", "test loss")
    lines = [f"| problem | {' | '.join(by)} | highest |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(row["problem"] for row in found):
        own = [row for row in found if row["problem"] == name]
        chosen = [min(own, key=lambda row, k=k: row[k])["accuracy"] for k in by]
        chosen.append(max(row["accuracy"] for row in own))
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in chosen)} |")
    return "\n".join(lines)


def main():
    """Run the benchmark, write JSON, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/ and test/<class>/*.jpg")
    parser.add_argument("--output", type=Path, default=Path("penalty_criteria.json"))
    arguments = parser.parse_args()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, task in PROBLEMS.items():
            if task is not rows and arguments.data is None:
                print(f"{name}: skipped without --data.")
                continue
            found += compare(name, arguments.data)
            save(found, arguments, n_train=N_TRAIN)
    print("Test accuracy with the best penalties of each criterion:\n")
    print(table(found))


if __name__ == "__main__":
    main()
