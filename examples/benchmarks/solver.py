"""Passes and seconds of the second stage to shares of the initial gap, with and without its parts.

Solvers start at the fitted activations and run without a tolerance, one after the other:

* "both levels", what `fit` does: quasi-Newton steps in K-FAC's metric, corrected in the
  leading subspace after each of them, where there is one;
* "from a quarter": the same, after five iterations on every fourth sample;
* "K-FAC alone": no correction;
* "Newton-CG": conjugate gradients on the exact Hessian, with the same preconditioner;
* "no preconditioner": plain L-BFGS, for comparison.

The optimum is the lowest objective that any of them reached, which is as far as float32 goes if one
of them had iterations enough. A pass is one evaluation of the head
over all samples: the linear map or its adjoint, or both at the same point. Making the subspace
is no pass; its seconds count, as do those of the preconditioner.

    python examples/benchmarks/solver.py --data cifar10.zip --output solver.json
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from _datasets import read_images
from _setup import digits, docstrings, images, save
from sklearn.exceptions import ConvergenceWarning

from sklearn_gradfeat import GradientFeatureClassifier
from sklearn_gradfeat.curvature._inverses import Inverses
from sklearn_gradfeat.solvers._lbfgs import minimize
from sklearn_gradfeat.solvers._line_search import Line, search
from sklearn_gradfeat.solvers._steps import penalised
from sklearn_gradfeat.training import _stages

SHARES = (0.1, 0.01, 0.001, 0.0001)


def convnet(path, n_train, layers):
    """Return a model and data: a shipped network."""
    X, y = read_images(path, "train", n_train)
    model = GradientFeatureClassifier(
        "convnet-vae", gradient_layers=layers, alpha=1e-4, gradient_alpha=1e-5
    )
    return model, X, y


def efficientnet(path, n_train, layers):
    """Return a model and data: EfficientNet-Lite0."""
    model, X, y = images(path, n_train)
    return model.set_params(gradient_layers=layers), X, y


PROBLEMS = {
    "digits": ("digits, random MLP", lambda path, n: digits()),
    "text": ("docstrings, MiniLM's last layer", lambda path, n: docstrings()),
    "conv5": ("VAE encoder, conv5", lambda path, n: convnet(path, n, ["conv5"])),
    "conv4-5": ("VAE encoder, conv4-5", lambda path, n: convnet(path, n, ["conv4", "conv5"])),
    "head": ("EfficientNet-Lite0, head conv", lambda path, n: efficientnet(path, n, "last")),
    "blocks": (
        "EfficientNet-Lite0, top 3",
        lambda path, n: efficientnet(path, n, 3),
    ),
}


class Watched:
    """An objective that counts passes and remembers when which value was reached."""

    def __init__(self, objective):
        self.objective, self.passes, self.records = objective, 0, []
        self.start = time.perf_counter()

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def forward(self, x):
        self.passes += bool(self.objective.split(x).u.any())
        return self.objective.forward(x)

    def adjoint(self, cotangent):
        self.passes += 1
        return self.objective.adjoint(cotangent)

    def forward_adjoint(self, direction, logits):
        self.passes += 1
        return self.objective.forward_adjoint(direction, logits)

    def reached(self, iteration, value, x):
        """Note where the solver is."""
        self.records.append((value, self.passes, time.perf_counter() - self.start))


def lbfgs(objective, x, inverses, max_iter, *, precondition=True, correct=True):
    """Minimise with the solver of the package, without some of its parts."""
    inverse = inverses.at(objective.objective)
    minimize(
        objective, x, inverse if precondition else lambda logits: torch.clone,
        tolerance=0.0, max_iter=max_iter, callback=objective.reached,
        coarse=inverses.coarse(objective.objective) if correct else None,
    )  # fmt: skip


class Curved:
    """The second-order part of a loss at some logits."""

    def __init__(self, loss, logits):
        self.loss, self.logits, self.n_outputs = loss, logits, loss.n_outputs

    def gradient(self, change, rows=slice(None)):
        """Return the product of the Hessian with a change of logits."""
        at = (self.logits[rows],)
        return torch.func.jvp(lambda logits: self.loss.gradient(logits, rows), at, (change,))[1]


def conjugate_gradients(objective, gradient, logits, inverse, share):
    """Return about the Newton step, and the change of the logits along it."""
    quadratic = replace(objective.objective, loss=Curved(objective.loss, logits))
    zero = torch.zeros_like(logits)
    step, moved, residual = torch.zeros_like(gradient), zero.clone(), -gradient
    natural = inverse(residual)
    direction, square = natural, residual @ natural
    goal = share**2 * square
    for _ in range(50):
        objective.passes += 1
        change, bent = quadratic.forward_adjoint(direction, zero)
        bent += objective.penalty * direction
        length = square / (direction @ bent)
        step, moved = step + length * direction, moved + float(length) * change
        residual = residual - length * bent
        natural, former = inverse(residual), square
        square = residual @ natural
        if square <= goal:
            break
        direction = natural + square / former * direction
    return step, moved


def newton_cg(objective, x, inverses, max_iter):
    """Minimise by truncated Newton steps: conjugate gradients, then an exact line search."""
    loss, penalty = objective.loss, objective.penalty
    logits = objective.forward(x)
    inverse = inverses.at(objective.objective)(logits)
    value, share = loss.value(logits) + penalised(objective, x, x) / 2, 0.3
    while objective.passes < max_iter:
        gradient = objective.adjoint(loss.gradient(logits)) + penalty * x
        direction, change = conjugate_gradients(objective, gradient, logits, inverse, share)
        parts = (penalised(objective, direction, y) for y in (x, direction))
        line = Line(loss, logits, change, *parts)
        step, gain = search(line, value)
        if gain >= 0:
            return
        x, logits, value = x + step * direction, logits + step * change, value + gain
        share = max(share / 2, 0.01)
        objective.reached(None, value, x)


def thinned(objective):
    """Return the objective of every fourth sample."""

    def batches(stride=1):
        start = 0
        for _, boundary in objective.tangent.batches(4 * stride):
            rows = slice(start, start + len(boundary[0]))
            start = rows.stop
            yield rows, boundary

    loss, few = objective.loss, slice(None, None, 4)
    weights = loss.weights[few] / loss.weights[few].sum()
    loss = replace(loss, targets=loss.targets[few], weights=weights)
    tangent = replace(objective.tangent, batches=batches)
    features = objective.activation[few]
    return replace(
        objective, loss=loss, tangent=tangent, activation=features, n_samples=len(features)
    )


def from_a_quarter(objective, x, inverses, max_iter):
    """Minimise over some samples first; their passes count as what they are of the others'."""
    few, own = Watched(thinned(objective.objective)), Inverses()
    inverse, coarse = own.at(few.objective), own.coarse(few.objective)
    x = minimize(few, x, inverse, tolerance=0.0, max_iter=5, coarse=coarse).x
    objective.passes += few.passes / 4
    lbfgs(objective, x, inverses, max_iter)


SOLVERS = {
    "both levels": lbfgs,
    "from a quarter": from_a_quarter,
    "K-FAC alone": partial(lbfgs, correct=False),
    "Newton-CG": newton_cg,
    "no preconditioner": partial(lbfgs, precondition=False, correct=False),
}


def objective_of(model, X, y):
    """Return the objective of the second stage and where it starts."""
    caught = []

    def catching(objective, x, *args, **kwargs):
        if objective.tangent is not None:
            caught.append((objective, x))
            kwargs["max_iter"] = 1
        return minimize(objective, x, *args, **kwargs)

    with mock.patch.object(_stages, "minimize", catching), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, y)
    return caught[0]


def compare(name, model, X, y, solvers, max_iter):
    """Return one row for each solver: what was reached when."""
    objective, x = objective_of(model, X, y)
    runs = {}
    for solver in solvers:
        watched = Watched(objective)
        SOLVERS[solver](watched, x, Inverses(), max_iter)
        runs[solver] = watched.records
    logits = objective.forward(x)
    start = objective.loss.value(logits) + penalised(objective, x, x) / 2
    optimum = min(value for records in runs.values() for value, *_ in records)
    rows = []
    for solver, records in runs.items():
        row = {"problem": name, "n_samples": len(X), "n_unknowns": len(x), "solver": solver}
        for share in SHARES:
            goal = optimum + share * (start - optimum)
            row[f"{share:g}"] = next(((p, s) for value, p, s in records if value <= goal), None)
        rows.append({**row, "passes": records[-1][1], "seconds": records[-1][2]})
    return rows


def table(rows):
    """Return the rows as a Markdown table: passes, and seconds."""
    lines = [f"| problem | solver | {' | '.join(f'{100 * share:g} %' for share in SHARES)} |"]
    lines.append(f"|---|---|{'---:|' * len(SHARES)}")
    for row in rows:
        found = [row[f"{share:g}"] for share in SHARES]
        limit = f"> {row['passes']:g} ({row['seconds']:.1f} s)"
        cells = [limit if f is None else f"{f[0]:g} ({f[1]:.1f} s)" for f in found]
        lines.append(f"| {row['problem']} | {row['solver']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """Run what was asked for, write JSON, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="zip file of train/<class>/*.jpg")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--n-train", type=int, default=10_000, help="images")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--max-iter", type=int, default=200, help="of Newton-CG: passes")
    parser.add_argument("--output", type=Path, default=Path("solver.json"))
    arguments = parser.parse_args()
    rows = []
    for problem in arguments.problems:
        name, load = PROBLEMS[problem]
        if problem in ("conv5", "conv4-5", "head", "blocks") and arguments.data is None:
            print(f"{name}: skipped, there is no --data.")
            continue
        task = load(arguments.data, arguments.n_train)
        rows += compare(name, *task, arguments.solvers, arguments.max_iter)
        save(rows, arguments)
    print(table(rows))


if __name__ == "__main__":
    main()
